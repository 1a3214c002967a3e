"""The pages in a real browser, from a real cluster: nano's true answers, its looks, its boxes, and what it did."""

from __future__ import annotations

import re
from collections.abc import Iterator

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect

from cluster.demo import made_samples
from cluster.pages.routes import CONSOLE
from tests.browser import chromium, opened
from tests.cluster.conftest import DEFAULTS, Clusters
from tests.cluster.launcher import LaunchedCluster
from tests.nano_model import nano_checkpoint


@pytest.fixture(scope="module")
def nano(clusters: Clusters) -> LaunchedCluster:
    """That of test_nano_quality."""
    changes = {"model": str(nano_checkpoint()), "served_model_name": "nano", "dtype": "float32"}
    return clusters.get(DEFAULTS | changes)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


@pytest.fixture
def page(browser: Browser, nano: LaunchedCluster) -> Iterator[Page]:
    with opened(browser, nano.http_url) as found:
        expect(found.locator("#model")).to_have_text("nano")
        yield found


@pytest.mark.parametrize("name", ["picture", "clip", "thought", "number", "http"])
def test_examples_are_answered_truly(page: Page, name: str) -> None:
    question = made_samples()[name].question
    page.get_by_text(question.text).click()
    expect(page.locator(".answer").last).to_have_text(question.answer)
    expect(page.locator("#send")).to_be_visible()
    assert page.locator("details.thinking").count() == (name == "thought")
    looks = int(name == "number")
    assert page.locator(".look").count() == looks
    expect(page.locator(".cost")).to_have_count(1 + looks)
    expect(page.locator(".cost").last).to_contain_text("prefill")


def test_a_box_is_drawn(page: Page) -> None:
    page.get_by_text("Give the box of the square as JSON.").click()
    box = page.locator(".step .pictured rect.box-0")
    expect(box).to_have_count(1)
    x, y = (float(box.get_attribute(name) or "nan") for name in ("x", "y"))
    assert 480 < x < 600 and 690 < y < 800


def test_the_console_shows_what_was_asked(browser: Browser, nano: LaunchedCluster) -> None:
    body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8}
    httpx.post(f"{nano.http_url}/v1/chat/completions", json=body, timeout=60, trust_env=False).raise_for_status()
    with opened(browser, nano.http_url, CONSOLE) as page:
        for title in ("Time to first token", "Whole request"):
            tile = page.locator(".tile").filter(has_text=title)
            expect(tile.locator("b")).to_have_text(re.compile(r"[0-9] m?s$"))
        for role in ("preprocessor", "encoder", "prefill", "decode"):
            expect(page.get_by_role("row").filter(has_text=role).first).to_be_visible()
        expect(page.locator("#pool-rows tr")).not_to_have_count(0)
        expect(page.locator("#decision-list")).to_contain_text("joined")
