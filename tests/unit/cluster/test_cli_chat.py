"""``ernie chat`` against the facade, its output captured."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from actors.errors import Overloaded
from actors.types import FinishReason, ImagePart, MediaSource, TextPart, ThinkingMode, ToolCallDelta
from cluster.cli_chat import run_chat
from cluster.client.looking import ZOOM
from cluster.generation import ChoiceFinished, Delta, GenerateCall
from tests.doubles import FINISHED, SCRIPT, STARTED, Pause, ScriptedService
from tests.doubles import grpc_serving_in_a_thread as running


def chat(prompt: str, **options: Any) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    code = run_chat(
        prompt,
        console=Console(file=out, width=100, highlight=False),
        errors=Console(file=err, width=100, highlight=False),
        **options,
    )
    return code, out.getvalue(), err.getvalue()


def test_a_reply_with_thinking(tmp_path: Path) -> None:
    picture = tmp_path / "a.png"
    picture.write_bytes(b"png")
    with running(ScriptedService) as (address, service):
        code, out, err = chat(
            "What?", images=[str(picture)], think=True, max_tokens=7, temperature=0.0, address=address
        )
    assert (code, err) == (0, "")
    assert out.startswith(
        "Thinking\nhmm.\nAnswer\nA cät\n12 prompt tokens (6 media, 4 cached), 5 generated (2 thinking)"
    )
    assert "ended by stop, first token after 250.0 ms" in out
    rows = [line.split() for line in out.splitlines()[5:]]
    assert ["queued", "1.0", "ms"] in rows
    assert ["decode", "1.50", "s", "#" * 26] in rows
    assert ["total", "1.70", "s"] in rows
    (call,) = service.calls
    assert call.messages[0].parts == (ImagePart(source=MediaSource(content=b"png")), TextPart(text="What?"))
    assert (call.thinking, call.max_tokens, call.temperature) == (ThinkingMode.ON, 7, 0)
    assert (call.top_p, call.seed, call.return_timings) == (None, None, True)


def test_a_reply_without_thinking_has_no_headings() -> None:
    script = (STARTED, Delta(text="[b]x[/b] :smile:"), ChoiceFinished(reason=FinishReason.LENGTH), FINISHED)
    with running(lambda: ScriptedService(script=script)) as (address, service):
        code, out, _ = chat("hi", show_timings=False, address=address)
    assert code == 0
    assert out.splitlines()[0] == "[b]x[/b] :smile:"
    assert "Answer" not in out and "Thinking" not in out
    assert service.calls[0].thinking is ThinkingMode.AUTO and not service.calls[0].return_timings


@pytest.mark.parametrize(
    ("script", "code", "text"),
    [
        ((Overloaded("queue full", retry_after_s=0.1),), 1, "RESOURCE_EXHAUSTED: queue full - try again in 0.1 s"),
        ((*SCRIPT[:2], KeyError("x")), 1, "INTERNAL: internal error"),
        ((STARTED, ChoiceFinished(reason=FinishReason.CANCELLED), FINISHED), 1, ""),
    ],
)
def test_failures(script: Any, code: int, text: str) -> None:
    with running(lambda: ScriptedService(script=script)) as (address, _):
        got, _, err = chat("hi", address=address)
    assert (got, err.strip()) == (code, text)


def test_wrong_fields_are_named() -> None:
    with running(ScriptedService) as (address, _):
        code, _, err = chat("hi", temperature=5, address=address)
    assert code == 1 and "sampling_params.temperature must be between" in err


def test_nobody_listens() -> None:
    with running(ScriptedService) as (address, _):
        pass
    code, _, err = chat("hi", address=address)
    assert code == 3 and f"nothing answers at {address}" in err


def test_unreadable_files(tmp_path: Path) -> None:
    code, _, err = chat("hi", images=[str(tmp_path / "none.png")])
    assert code == 2 and "none.png: No such file" in err


def test_calls_are_printed_plainly(tmp_path: Path) -> None:
    tools = tmp_path / "tools.json"
    tools.write_text('[{"type": "function", "function": {"name": "look"}}]')
    script = (
        STARTED,
        Delta(reasoning="hm"),
        Delta(text="[b]So[/b]", tool_calls=(ToolCallDelta(index=0, id="c1", name="look", arguments='{"at": '),)),
        Delta(tool_calls=(ToolCallDelta(index=0, arguments="[1]}"), ToolCallDelta(index=1, id="c2", name="wait"))),
        Delta(tool_calls=(ToolCallDelta(index=1, arguments="{}"),)),
        ChoiceFinished(reason=FinishReason.TOOL_CALLS),
        FINISHED,
    )
    with running(lambda: ScriptedService(script=script)) as (address, service):
        code, out, err = chat("What?", tools=str(tools), show_timings=False, address=address)
    assert (code, err) == (0, "")
    assert out.startswith('Thinking\nhm\nAnswer\n[b]So[/b]\nCall 1\nlook({"at": [1]})\nCall 2\nwait({})\n12 prompt')
    assert "ended by tool_calls" in out
    assert [tool.name for tool in service.calls[0].tools] == ["look"]


@pytest.mark.parametrize(
    "content", [None, "{", "5", "{}", '""', "null", '["f"]', '{"name": "f"}', '[{"type": "function", "function": {}}]']
)
def test_unreadable_tools(content: str | None, tmp_path: Path) -> None:
    tools = tmp_path / "tools.json"
    if content is not None:
        tools.write_text(content)
    code, _, err = chat("hi", tools=str(tools))
    assert code == 2 and "tools.json: " in err.replace("\n", "")


LOOK = ToolCallDelta(index=0, id="c1", name=ZOOM, arguments='{"bbox_2d": [0, 500, 500, 1000], "label": "sign"}')
BOXES = 'There: [{"bbox_2d": [100, 100, 400, 400], "label": "cat"}, {"bbox_2d": [500, 100, 900, 400], "label": "dog"}]'


def looking(*answers: str | ToolCallDelta) -> Callable[[], ScriptedService]:
    """A service that answers one text or call a request, in turn."""

    class Answering(ScriptedService):
        async def generate(self, call: GenerateCall) -> AsyncGenerator[Any, None]:
            answer = answers[len(self.calls)]
            self.calls.append(call)
            said = Delta(text=answer) if isinstance(answer, str) else Delta(tool_calls=(answer,))
            reason = FinishReason.STOP if isinstance(answer, str) else FinishReason.TOOL_CALLS
            for event in (STARTED, said, ChoiceFinished(reason=reason), FINISHED):
                yield event

    return Answering


@pytest.fixture
def picture(tmp_path: Path) -> str:
    file = tmp_path / "a.png"
    Image.new("RGB", (200, 100), "white").save(file)
    return str(file)


def test_the_model_looks_closer(picture: str) -> None:
    wrong = replace(LOOK, arguments="{}")
    with running(looking(LOOK, wrong, "42")) as (address, service):
        code, out, err = chat("What?", images=[picture], zoom=True, show_timings=False, address=address)
    assert (code, err) == (0, "")
    assert "From 0, 500 to 500, 1000 of picture 1: cut out, and shown to the model.\n" in out
    assert "That call is wrong, and the model is told: bbox_2d must be four numbers" in out
    assert "\n42\n12 prompt tokens" in out
    assert [len(call.messages) for call in service.calls] == [1, 3, 5]


def test_boxes_are_drawn(picture: str, tmp_path: Path) -> None:
    drawn = tmp_path / "out.png"
    with running(looking(LOOK, BOXES)) as (address, _):
        code, out, _ = chat("Where?", images=[picture], zoom=True, draw=str(drawn), address=address)
    assert code == 0 and f"{drawn}: 3 boxes on picture 1" in out.replace("\n", "")
    with Image.open(drawn) as image:
        assert image.size == (200, 100)
        for corner in ((0, 60), (30, 39), (110, 39)):
            assert image.convert("RGB").getpixel(corner) != (255, 255, 255)
    assert {file.name for file in tmp_path.iterdir()} == {"a.png", "out.png"}


def test_boxes_of_two_pictures(picture: str, tmp_path: Path) -> None:
    first = replace(LOOK, arguments='{"bbox_2d": [0, 0, 500, 500], "img_idx": 0}')
    with running(looking(first, BOXES)) as (address, _):
        options: dict[str, Any] = {"images": [picture, picture], "zoom": True, "draw": str(tmp_path / "out.jpg")}
        code, out, _ = chat("Where?", address=address, **options)
    assert code == 0 and "out-1.jpg: 1 box on picture 1" in out and "out.jpg: 2 boxes on picture 2" in out
    assert (tmp_path / "out-1.jpg").exists() and (tmp_path / "out.jpg").exists()


def test_no_boxes(picture: str, tmp_path: Path) -> None:
    with running(looking("none")) as (address, _):
        code, out, _ = chat("Where?", images=[picture], draw=str(tmp_path / "out.png"), address=address)
    assert code == 0 and "There is no box in the answer" in out and not (tmp_path / "out.png").exists()


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        ({"draw": "out.png"}, "there is no picture to draw on"),
        ({"draw": "out.xyz", "images": ["picture"]}, "must end like a picture file"),
        ({"draw": "out.png", "images": ["https://a/b.png"]}, "by its URL"),
        ({"draw": "out.png", "images": ["data:,text"]}, "a picture cannot be read"),
        ({"zoom": True}, "there is no picture to look at"),
        ({"zoom": True, "images": ["data:,text"]}, "a picture cannot be read"),
    ],
)
def test_what_cannot_be_drawn_or_looked_at(options: dict[str, Any], wrong: str, picture: str) -> None:
    if options.get("images") == ["picture"]:
        options = options | {"images": [picture]}
    code, _, err = chat("hi", **options)
    assert code == 2 and wrong in err.replace("\n", "")


def test_a_file_that_cannot_be_written(picture: str, tmp_path: Path) -> None:
    with running(looking(BOXES)) as (address, _):
        code, _, err = chat("Where?", images=[picture], draw=str(tmp_path / "none" / "out.png"), address=address)
    assert code == 2 and "cannot write" in err


def test_an_interrupt_ends_the_request_too() -> None:
    service = ScriptedService(script=(*SCRIPT[:2], Pause()))
    root = Path(__file__).resolve().parents[3]
    with running(lambda: service) as (address, _):
        command = [sys.executable, "-m", "cluster.cli", "chat", "hi", "--address", address]
        path = os.pathsep.join([str(root), str(root / "proto")])
        asking = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
            # What is started in the background of a script inherits that it ignores the signal.
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        )
        assert asking.stdout is not None and asking.stdout.read(len("Thinking")) == "Thinking"
        asking.send_signal(signal.SIGINT)
        _, err = asking.communicate(timeout=100)
        assert (asking.returncode, err) == (130, "interrupted\n")
        while service.ended.empty():
            time.sleep(0.01)
        assert service.ended.get_nowait() == "closed"
