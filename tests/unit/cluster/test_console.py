"""The console in a real browser, against simulated clusters."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, Route, expect

from actors.types import EngineRole
from cluster.pages.routes import CONSOLE
from tests.browser import chromium, opened, served_beside
from tests.doubles import ScriptedService
from tests.unit.cluster.console_feed import BEGAN, Simulated, decision, eight, large, small
from tests.unit.cluster.test_http_api import serving

SCREENSHOTS = os.environ.get("ERNIE_SCREENSHOTS")
CLUSTERS: dict[str, Callable[[], Simulated]] = {
    "idle": lambda: small(0),
    "load": lambda: eight(180),
    "hundred": lambda: large(900),
}
STATUS = "**/status"
LEAST_CONTRAST = 4.5
ROLES = """rows => Object.fromEntries(rows.map(row => [".name", ".role .long"]
    .map(part => row.querySelector(part).textContent)))"""
CONTRASTS = (Path(__file__).parent / "contrasts.js").read_text()


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with served_beside(serving(ScriptedService())) as (found, _):
        yield found


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


class Console:
    """The page with a simulated cluster behind it; its clock stands still but for ``run``."""

    def __init__(self, feed: Simulated) -> None:
        self.feed = feed
        self.asked = 0
        self.answers = True
        self.page: Page

    def prepare(self, page: Page) -> None:
        self.page = page
        page.clock.install(time=BEGAN)
        page.clock.pause_at(BEGAN + 1)
        page.route(STATUS, self._answer)

    def _answer(self, route: Route) -> None:
        self.asked += 1
        if self.answers:
            route.fulfill(json=self.feed.next())
        else:
            route.fulfill(status=503, json={"error": {"message": "gone"}})

    def run(self, seconds: int) -> None:
        for _ in range(seconds):
            with self.page.expect_event("requestfinished"):
                self.page.clock.run_for(1000)

    def hide(self, hidden: bool) -> None:
        self.page.evaluate(
            "hidden => { Object.defineProperty(document, 'hidden', { value: hidden, configurable: true });"
            " document.dispatchEvent(new Event('visibilitychange')); }",
            hidden,
        )


@pytest.fixture
def console(request: pytest.FixtureRequest, browser: Browser, url: str) -> Iterator[Console]:
    """Of a small cluster with some load."""
    shown = Console(small(40))
    with opened(browser, url, CONSOLE, shown.prepare):
        yield shown


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", CLUSTERS)
def test_clusters_are_shown_whole(browser: Browser, url: str, name: str, scheme: Any) -> None:
    shown = Console(CLUSTERS[name]())
    size = {"width": 1280, "height": 900}
    with opened(browser, url, CONSOLE, shown.prepare, viewport=size, color_scheme=scheme) as page:
        shown.run(40 if SCREENSHOTS else 2)
        status = shown.feed.next()
        roles = page.locator(".node tr:has(.bar)").evaluate_all(ROLES)
        assert roles == {engine["id"]: engine["role"] for engine in status["engines"]}
        for entry in status["decisions"]:
            expect(page.locator("#decision-list")).to_contain_text(entry["reason"])
        told = page.locator("#decision-list li").first
        last = status["decisions"][-1]
        expect(told).to_contain_text(f"{last['subject']} {last['change'].replace('->', chr(0x2192))}")
        assert page.locator(".node h3").all_inner_texts() == sorted(
            {engine["node"] for engine in status["engines"]}, key=lambda node: int(node.split(".")[-1])
        )
        for pool in status["pools"]:
            cells = page.locator("#pool-rows tr").filter(has_text=pool["name"]).first.locator("td")
            assert cells.all_inner_texts()[:2] == [str(pool["replicas"]), str(pool["target"])]
        for width in (1280, 400):
            page.set_viewport_size({"width": width, "height": 900})
            assert page.evaluate("document.documentElement.scrollWidth") == width
            assert page.evaluate(CONTRASTS, LEAST_CONTRAST) == []
            if SCREENSHOTS:
                page.wait_for_timeout(700)
                page.screenshot(path=Path(SCREENSHOTS) / f"{name}-{scheme}-{width}.png", full_page=True)


def test_stages_count_and_place_requests(console: Console) -> None:
    page = console.page
    console.run(1)
    shown = dict(
        zip(page.locator(".stage span").all_inner_texts(), page.locator(".stage b").all_inner_texts(), strict=True)
    )
    assert list(shown) == ["queued", "preprocess", "encode", "prefill", "transfer", "decode"]
    active = page.locator(".tile").filter(has=page.get_by_role("heading", name="Requests", exact=True)).locator("b")
    assert sum(map(int, shown.values())) == int(active.inner_text()) > 20
    assert page.locator(".decode .dots i").count() == int(shown["decode"])
    decode = console.feed.engine_ids[1].rpartition("-")[2]
    expect(page.locator("#flow .decode .where")).to_have_text(f"at {decode}")


def test_the_dots_stand_for_more_where_there_are_many(browser: Browser, url: str) -> None:
    shown = Console(large(900))
    with opened(browser, url, CONSOLE, shown.prepare, reduced_motion="reduce") as page:
        expect(page.locator("#dot-means")).to_have_text("a dot is 20 requests")
        assert 10 < page.locator("#flow .decode .dots i").count() <= 36
        expect(page.locator("#flow .decode .where")).to_contain_text("72 engines, most ")
        assert page.evaluate("document.getAnimations().length") == 0


def test_a_role_changes_in_place(console: Console) -> None:
    page, feed = console.page, console.feed
    name = feed.engine_ids[0]
    button = page.get_by_role("button", name=name)
    button.focus()
    log = page.get_by_role("log", name="Decisions")
    expect(log).to_have_attribute("aria-live", "polite")
    count = log.locator("li").count()
    feed.change_role(0, EngineRole.COLOCATED)
    why = decision(9, 0, "role", "engine", name, "prefill -> colocated", "queues <b>too</b> long")
    feed.decisions += (why,)
    kept = button.element_handle()
    console.run(1)
    expect(page.get_by_role("row").filter(has_text=name).locator(".role .long")).to_have_text("colocated")
    assert kept.evaluate("e => document.activeElement === e")
    assert log.locator("li").count() == count + 1
    expect(log.locator("li").first).to_contain_text("queues <b>too</b> long")
    page.get_by_role("button", name="fleet", exact=True).click()
    expect(log.locator("li")).to_have_count(1)


def test_details_of_a_worker_stay_up_to_date(console: Console) -> None:
    page, feed = console.page, console.feed
    name = feed.engine_ids[1]
    page.get_by_role("button", name=name).focus()
    page.keyboard.press("Enter")
    dialog = page.get_by_role("dialog", name=name)
    for told in ("decode", "bfloat16", "41% of 1.00M tokens", "attention: varlen", " in decode"):
        expect(dialog).to_contain_text(told)
    feed.unready = ((name, "draining"),)
    console.run(1)
    expect(dialog).to_contain_text("draining")
    page.keyboard.press("Escape")
    expect(dialog).to_have_count(0)
    expect(page.get_by_role("button", name=name)).to_be_focused()
    expect(page.get_by_role("row").filter(has_text=name).locator(".bar span")).to_have_text("draining")


def test_silence_is_told_and_ends(console: Console) -> None:
    page = console.page
    console.answers = False
    console.run(5)
    expect(page.get_by_role("alert")).to_contain_text("has not answered since")
    expect(page.locator("body")).to_have_class("stale")
    expect(page.locator("#model")).to_have_class("away")
    console.answers = True
    console.run(1)
    expect(page.get_by_role("alert")).to_have_count(0)
    expect(page.locator("body")).to_have_class("")
    expect(page.locator("#model")).to_have_class("ready")


def test_a_cluster_that_is_not_ready_says_why(console: Console) -> None:
    console.feed.missing = "no prefill and decode path"
    console.run(1)
    expect(console.page.get_by_role("status")).to_contain_text("not ready: no prefill and decode path")


def test_a_hidden_page_asks_nothing(console: Console) -> None:
    console.run(1)
    console.hide(True)
    before = console.asked
    console.page.clock.run_for(10_000)
    assert console.asked == before
    with console.page.expect_response(STATUS):
        console.hide(False)
    expect(console.page.get_by_role("alert")).to_have_count(0)
    console.run(1)
    assert console.asked == before + 2


def test_what_is_not_told_is_not_shown(browser: Browser, url: str) -> None:
    shown = Console(replace(small(40), without=("flow", "pools", "decisions", "latency")))
    with opened(browser, url, CONSOLE, shown.prepare) as page:
        shown.run(1)
        assert page.locator("main section:visible").evaluate_all("all => all.map(e => e.id)") == ["figures", "nodes"]
        assert page.locator(".tile:visible h3").all_inner_texts() == ["Requests", "KV cache"]


def test_the_page_can_be_heard_and_left(console: Console) -> None:
    page = console.page
    for name in ("Key figures", "Requests", "Nodes", "Pools", "Decisions"):
        expect(page.get_by_role("region", name=name)).to_have_count(1)
    for role in ("main", "banner", "navigation", "contentinfo"):
        expect(page.get_by_role(role)).to_have_count(1)
    expect(page.get_by_role("img", name="In the last 5 minutes: ").first).to_have_count(1)
    nameless = page.evaluate("""() => [...document.querySelectorAll("button, a, table, dialog, th, [role=img]")]
        .filter((e) => !e.closest("[hidden]") && !(e.ariaLabel || e.textContent.trim() || e.title))
        .map((e) => e.outerHTML)""")
    assert nameless == []
    page.get_by_role("link", name="Playground").click()
    expect(page.locator("#composer")).to_be_visible()
    page.get_by_role("link", name="Console").click()
    expect(page.locator("#flow")).to_be_visible()
