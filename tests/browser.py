"""A real browser without a window, for tests of pages."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager
from typing import Any

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, expect, sync_playwright

WAIT_MS = 30_000
"""As long as only a page that hangs takes."""
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """The Chromium of this machine; skips the test where there is none."""
    found = next((path for name in NAMES if (path := shutil.which(name)) is not None), None)
    if found is None:
        pytest.skip(f"no browser is installed: none of {', '.join(NAMES)}")
    with sync_playwright() as playwright:
        # Chromium's sandbox does not start for root.
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=found, args=arguments)
        try:
            yield browser
        finally:
            browser.close()


@contextlib.contextmanager
def served_beside(server: AbstractAsyncContextManager[str]) -> Iterator[tuple[str, asyncio.AbstractEventLoop]]:
    """Serves on a loop of its own: a browser's holds this thread. Yields the address and that loop."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        url = asyncio.run_coroutine_threadsafe(server.__aenter__(), loop).result(30)
        try:
            yield url, loop
        finally:
            asyncio.run_coroutine_threadsafe(server.__aexit__(None, None, None), loop).result(30)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@contextlib.contextmanager
def opened(
    browser: Browser, url: str, path: str = "", prepare: Callable[[Page], None] = lambda page: None, **options: Any
) -> Iterator[Page]:
    """The page ``path`` of the router at ``url``, the playground unless given, ready. An error in it, or anything it
    asks of another place, fails the test. ``prepare`` gets it before it is loaded.
    """
    wrong: list[str] = []

    def told(message: ConsoleMessage) -> None:
        # Browsers report replies with an error status as well.
        if message.type == "error" and "status of" not in message.text:
            wrong.append(message.text)

    context = browser.new_context(**options)
    page = context.new_page()
    page.set_default_timeout(WAIT_MS)
    expect.set_options(timeout=WAIT_MS)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", told)
    page.on("request", lambda asked: None if asked.url.startswith((url, "data:", "blob:")) else wrong.append(asked.url))
    prepare(page)
    page.goto(url + path)
    expect(page.locator("#model.ready")).to_be_visible()
    try:
        yield page
        assert wrong == []
    finally:
        context.close()
