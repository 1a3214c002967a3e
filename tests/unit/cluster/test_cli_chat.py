"""``ernie chat`` against the facade, its output captured."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from actors.errors import Overloaded
from actors.types import FinishReason, ImagePart, MediaSource, TextPart, ThinkingMode, ToolCallDelta
from cluster.cli_chat import run_chat
from cluster.generation import ChoiceFinished, Delta
from tests.doubles import FINISHED, SCRIPT, STARTED, ScriptedService
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
    "content", [None, "{", "5", '["f"]', '{"name": "f"}', '[{"type": "function", "function": {}}]']
)
def test_unreadable_tools(content: str | None, tmp_path: Path) -> None:
    tools = tmp_path / "tools.json"
    if content is not None:
        tools.write_text(content)
    code, _, err = chat("hi", tools=str(tools))
    assert code == 2 and "tools.json: " in err.replace("\n", "")
