"""The playground in a real browser, against the facade and a scripted model."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, expect

from actors.errors import InvalidRequest, Overloaded
from actors.types import FinishReason, ImagePart, MessageRole, TextPart, ThinkingMode, ToolCallDelta, VideoPart
from cluster.boxes import find_boxes
from cluster.client.looking import MAX_ROUNDS, ZOOM, tools
from cluster.demo import made_samples
from cluster.generation import ChoiceFinished, Delta, GenerateCall, ToolMode
from cluster.pictures import crop, enlarged, open_upright
from tests.browser import chromium, opened, served_beside
from tests.doubles import FINISHED, STARTED, Pause, ScriptedService
from tests.media import png
from tests.unit.cluster.test_boxes import CASES
from tests.unit.cluster.test_http_api import serving

STATIC = Path(__file__).resolve().parents[3] / "cluster" / "pages" / "playground"
PICTURE = png(200, 100, 1)
Answer = tuple[Any, ...] | str


def calls(*arguments: Any) -> Answer:
    """A reply that looks closer."""
    return (
        *(
            Delta(tool_calls=(ToolCallDelta(index=i, id=f"c{i}", name=ZOOM, arguments=json.dumps(a)),))
            for i, a in enumerate(arguments)
        ),
        ChoiceFinished(reason=FinishReason.TOOL_CALLS),
    )


@dataclass
class Model(ScriptedService):
    """Answers each request in turn with a text or with steps."""

    answers: list[Answer | Exception] = field(default_factory=list)

    async def generate(self, call: GenerateCall) -> AsyncGenerator[Any, None]:
        answer = self.answers.pop(0) if self.answers else "nothing more"
        self.calls.append(call)
        if isinstance(answer, Exception):
            raise answer
        steps = (Delta(text=answer), ChoiceFinished(reason=FinishReason.STOP)) if isinstance(answer, str) else answer
        try:
            for step in (STARTED, *steps, FINISHED):
                if isinstance(step, Pause):
                    self.paused.set()
                    await self.resume.wait()
                elif isinstance(step, Exception):
                    raise step
                else:
                    yield step
        finally:
            self.ended.put_nowait("over")


@dataclass
class Served:
    url: str
    model: Model
    loop: asyncio.AbstractEventLoop

    def resume(self) -> None:
        self.loop.call_soon_threadsafe(self.model.resume.set)


@pytest.fixture
def served() -> Iterator[Served]:
    """The facade on a loop of its own."""
    model = Model()
    with served_beside(serving(model)) as (url, loop):
        yield Served(url, model, loop)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


@pytest.fixture
def page(browser: Browser, served: Served) -> Iterator[Page]:
    with opened(browser, served.url) as found:
        yield found


def attach(page: Page, *files: tuple[str, str, bytes]) -> None:
    page.locator("#files").set_input_files([{"name": n, "mimeType": t, "buffer": c} for n, t, c in files])


def ask(page: Page, text: str, *, pictures: int = 0) -> None:
    attach(page, *((f"{i}.png", "image/png", PICTURE) for i in range(pictures)))
    expect(page.locator("#attachments li")).to_have_count(pictures)
    page.locator("#text").fill(text)
    page.locator("#text").press("Enter")


def wait_idle(page: Page) -> None:
    expect(page.locator("#send")).to_be_visible()


def test_an_answer_with_its_thinking_and_its_cost(page: Page, served: Served) -> None:
    served.model.answers = [
        (
            Delta(reasoning="Let me "),
            Delta(reasoning="see."),
            Pause(),
            Delta(text="A **cat**, <b>not</b>"),
            Delta(text=" a dog.\n\n- one\n- two\n\n```\nx < y\n```"),
            ChoiceFinished(reason=FinishReason.LENGTH),
        )
    ]
    page.locator("#thinking").select_option("on")
    ask(page, "What is <i>this</i>?", pictures=1)
    thinking = page.locator("details.thinking")
    expect(thinking).to_have_attribute("open", "")
    expect(thinking).to_contain_text("Let me see.")
    expect(page.locator("#stop")).to_be_visible()
    served.resume()
    wait_idle(page)
    assert thinking.get_attribute("open") is None
    expect(thinking.locator("summary")).to_contain_text("Thought for")
    answer = page.locator(".answer")
    expect(answer.locator("p").first).to_have_text("A cat, <b>not</b> a dog.")
    expect(answer.locator("strong")).to_have_text("cat")
    assert answer.locator("li").all_inner_texts() == ["one", "two"]
    expect(answer.locator("pre")).to_have_text("x < y")
    cost = page.locator(".cost")
    assert cost.locator("li").all_inner_texts() == ["queued 1.0 ms", "prefill 200 ms", "decode 1.50 s"]
    expect(cost).to_contain_text("1.70 s · 12 prompt tokens (6 media, 4 cached) · 5 generated (2 thinking)")
    expect(cost).to_contain_text("first token after 250 ms")
    expect(cost).to_contain_text("cut off")
    expect(page.locator(".said")).to_have_text("What is <i>this</i>?")
    (call,) = served.model.calls
    assert call.thinking is ThinkingMode.ON and call.return_timings and not call.tools
    image, text = call.messages[0].parts
    assert isinstance(image, ImagePart) and image.source.content == PICTURE
    assert text == TextPart(text="What is <i>this</i>?")


def uri(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def test_the_conversation_goes_on_and_begins_anew(page: Page, served: Served) -> None:
    served.model.answers = ["one", "two", "three"]
    for number, text in enumerate(("first", "second")):
        ask(page, text)
        expect(page.locator(".answer")).to_have_count(number + 1)
        wait_idle(page)
    page.locator("#new-chat").click()
    expect(page.locator("#welcome")).to_be_visible()
    ask(page, "third")
    expect(page.locator(".answer")).to_have_text("three")
    roles = [[message.role for message in call.messages] for call in served.model.calls]
    assert roles[1] == [MessageRole.USER, MessageRole.ASSISTANT, MessageRole.USER]
    assert len(roles[2]) == 1


def test_the_model_looks_closer(page: Page, served: Served) -> None:
    box = [500, 400, 740, 640]
    served.model.answers = [calls({"bbox_2d": box, "label": "sign"}), calls({"bbox_2d": [1, 2, 3]}), "42"]
    page.locator("#zoom").check()
    ask(page, "What does it say?", pictures=1)
    expect(page.locator(".answer")).to_have_text("42")
    wait_idle(page)
    looks = page.locator(".look")
    expect(looks).to_have_count(2)
    expect(looks.nth(0).locator(".pictured span")).to_have_text("sign")
    expect(looks.nth(1)).to_contain_text("bbox_2d must be four numbers from 0 to 1000: x1, y1, x2, y2")
    first, second, third = served.model.calls
    declared = tools()[0]["function"]
    assert first.tools[0].parameters == declared["parameters"]
    assert (first.tools[0].name, first.tools[0].description) == (declared["name"], declared["description"])
    (seen,) = second.messages[-1].parts
    assert isinstance(seen, ImagePart) and seen.source.content is not None
    shown = open_upright(seen.source.content)
    ours = enlarged(crop(open_upright(PICTURE), box))
    assert shown.size == ours.size
    # The same part: browsers and pillow enlarge a little differently.
    small = [image.resize((8, 8), Image.Resampling.BOX).tobytes() for image in (shown, ours)]
    assert max(abs(a - b) for a, b in zip(*small, strict=True)) < 24
    (told,) = third.messages[-1].parts
    assert isinstance(told, TextPart) and told.text.startswith("Error: bbox_2d must be four numbers")
    rect = page.locator(".look svg rect").last
    assert [rect.get_attribute(name) for name in ("x", "y", "width", "height")] == ["500", "400", "240", "240"]


def test_looks_are_bounded(page: Page, served: Served) -> None:
    served.model.answers = [calls({"bbox_2d": [0, 0, 500, 500], "img_idx": 0})] * (MAX_ROUNDS - 1) + ["at last"]
    page.locator("#zoom").check()
    ask(page, "What?", pictures=2)
    expect(page.locator(".answer")).to_have_text("at last")
    assert [call.tool_choice.mode for call in served.model.calls] == [ToolMode.AUTO] * (MAX_ROUNDS - 1) + [
        ToolMode.NONE
    ]
    assert "img_idx" in (served.model.calls[0].tools[0].parameters or {})["properties"]


def test_boxes_are_drawn_on_the_picture(page: Page, served: Served) -> None:
    served.model.answers = [
        '[{"bbox_2d": [100, 200, 300, 400], "label": "cat"}, {"bbox_2d": [500, 0, 900, 400], "label": "dog"}]'
    ]
    ask(page, "Where?", pictures=1)
    expect(page.locator(".step .pictured span")).to_have_text(["cat", "dog"])
    rect = page.locator(".step .pictured rect.box-0")
    assert [rect.get_attribute(name) for name in ("x", "y", "width", "height")] == ["100", "200", "200", "200"]
    assert page.locator(".pictured img").get_attribute("src") == uri(PICTURE)


def test_boxes_are_found_as_in_python(page: Page) -> None:
    texts = [text for text, _ in CASES]
    found = page.evaluate(
        "async (texts) => { const { findBoxes } = await import('/playground/boxes.js'); return texts.map(findBoxes); }",
        texts,
    )
    for text, boxes in zip(texts, found, strict=True):
        here = [(list(box.corners), box.label) for box in find_boxes(text)]
        assert [(box["corners"], box["label"]) for box in boxes] == here, text[:80]


def test_stop_ends_the_request_and_keeps_what_came(page: Page, served: Served) -> None:
    served.model.answers = [(Delta(text="Once upon"), Pause()), "again"]
    ask(page, "Tell me a story")
    expect(page.locator(".answer")).to_have_text("Once upon")
    page.locator("#stop").click()
    wait_idle(page)
    expect(page.locator(".aside")).to_have_text("Stopped.")
    assert asyncio.run_coroutine_threadsafe(served.model.ended.get(), served.loop).result(30) == "over"
    ask(page, "Go on")
    expect(page.locator(".answer")).to_have_count(2)
    assert served.model.calls[1].messages[1].parts == (TextPart(text="Once upon"),)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (InvalidRequest("temperature is wrong", field="temperature"), "temperature is wrong"),
        (Overloaded("queue full", retry_after_s=1), "queue full"),
        ((Delta(text="Once"), InvalidRequest("late")), "late"),
    ],
)
def test_errors_are_told_and_the_request_can_be_sent_again(page: Page, served: Served, error: Any, told: str) -> None:
    served.model.answers = [error, "fine now"]
    ask(page, "hi")
    failure = page.locator(".failure")
    expect(failure).to_contain_text(told)
    failure.get_by_role("button", name="Try again", exact=True).click()
    expect(page.locator(".answer")).to_have_text("fine now")
    expect(failure).to_have_count(0)
    first, again = served.model.calls
    assert again.messages == first.messages and len(first.messages) == 1


def test_dropped_and_pasted_files(page: Page, served: Served) -> None:
    give = """([type, names]) => {
        const data = new DataTransfer();
        for (const [name, kind] of names) data.items.add(new File(["x"], name, { type: kind }));
        const target = type === "paste" ? document : window;
        const options = { bubbles: true, cancelable: true };
        const event = type === "paste" ? new ClipboardEvent(type, { clipboardData: data, ...options })
            : new DragEvent(type, { dataTransfer: data, ...options });
        target.dispatchEvent(event);
    }"""
    files = [["a.png", "image/png"], ["b.mp4", "video/mp4"], ["c.pdf", "application/pdf"]]
    page.evaluate(give, ["dragenter", files])
    expect(page.locator("body")).to_have_class("dropping")
    page.evaluate(give, ["drop", files])
    expect(page.locator("body")).not_to_have_class("dropping")
    expect(page.locator("#attachments li")).to_have_count(2)
    expect(page.locator("#notice")).to_have_text("c.pdf is neither a picture nor a video.")
    page.evaluate(give, ["paste", [["d.jpg", "image/jpeg"]]])
    expect(page.locator("#attachments li")).to_have_count(3)
    page.get_by_role("button", name="Remove a.png").click()
    expect(page.locator("#attachments li")).to_have_count(2)
    page.locator("#send").click()
    expect(page.locator(".answer")).to_have_count(1)
    video, image = served.model.calls[0].messages[0].parts
    assert isinstance(video, VideoPart) and video.source.content == b"x"
    assert isinstance(image, ImagePart) and image.source.content == b"x"


def test_settings_go_into_requests_and_are_kept(page: Page, served: Served) -> None:
    page.locator("#open-settings").click()
    page.get_by_label("Instructions").fill("Be brief.")
    page.get_by_label("Temperature").fill("0.5")
    page.get_by_label("Longest reply").fill("77")
    page.get_by_role("button", name="Done").click()
    page.locator("#thinking").select_option("off")
    page.reload()
    ask(page, "hi")
    expect(page.locator(".answer")).to_have_count(1)
    (call,) = served.model.calls
    assert (call.temperature, call.max_tokens, call.top_p, call.seed) == (0.5, 77, None, None)
    assert call.thinking is ThinkingMode.OFF
    assert (call.messages[0].role, call.messages[0].parts) == (MessageRole.SYSTEM, (TextPart(text="Be brief."),))
    page.locator("#open-settings").click()
    page.get_by_role("button", name="Reset").click()
    page.get_by_role("button", name="Done").click()
    ask(page, "hi")
    expect(page.locator(".answer")).to_have_count(2)
    assert served.model.calls[1].temperature is None and served.model.calls[1].thinking is ThinkingMode.AUTO


def test_examples_are_sent_with_their_pictures(page: Page, served: Served) -> None:
    examples = page.locator("#examples button")
    expect(examples).to_have_count(6)
    examples.nth(3).click()
    expect(page.locator(".answer")).to_have_count(1)
    (call,) = served.model.calls
    assert [tool.name for tool in call.tools] == [ZOOM] and call.temperature == 0
    image, text = call.messages[0].parts
    assert isinstance(image, ImagePart) and image.source.content == (STATIC / "samples" / "number.png").read_bytes()
    assert text == TextPart(text=made_samples()["number"].question.text)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_and_follows_the_theme(browser: Browser, served: Served, scheme: Any) -> None:
    served.model.answers = ["long " * 300 + "x" * 500]
    size = {"width": 360, "height": 640}
    with opened(browser, served.url, viewport=size, color_scheme=scheme, has_touch=True) as page:
        ask(page, "y" * 300, pictures=1)
        expect(page.locator(".answer")).to_have_count(1)
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        assert page.evaluate(
            "document.getElementById('scroll').scrollWidth <= document.getElementById('scroll').clientWidth"
        )
        dark = "rgb(22, 23, 27)"
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (ground == dark) == (scheme == "dark")
        page.locator("#theme").click()
        page.locator("#theme").click()
        expect(page.locator("html")).to_have_attribute("data-theme", "dark")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == dark


def test_every_control_has_a_name(page: Page) -> None:
    page.locator("#open-settings").click()
    nameless = page.evaluate("""() => [...document.querySelectorAll("button, input, select, textarea")]
        .filter((e) => !e.hidden && !(e.ariaLabel || e.labels?.length || e.textContent.trim() || e.title))
        .map((e) => e.outerHTML)""")
    assert nameless == []
