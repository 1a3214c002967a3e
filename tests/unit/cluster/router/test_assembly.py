"""How a reply is read depends on what was asked and on the parser of the deployment."""

from __future__ import annotations

from typing import Any

import pytest

from actors.processing.parser_names import calls_lead
from actors.processing.tokenizer import TextTokenizer
from actors.types import FinishReason, SequenceKey, Structure, StructureKind, TokenEvent
from cluster.generation import GenerateCall, Tool, ToolChoice, ToolMode
from cluster.router.assembly import _output
from tests.tiny_model import tiny_checkpoint
from tests.unit.cluster.router.world import SCORE

CALL = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
TOOLS = (Tool(name="f"),)
OBJECT = Structure(kind=StructureKind.JSON_OBJECT)


@pytest.mark.parametrize(
    ("parser", "asked", "reply", "text", "calls", "reason"),
    [
        ("ernie45", {"tools": TOOLS}, "Look.\n" + CALL, "Look.", 1, FinishReason.TOOL_CALLS),
        ("ernie45", {}, CALL, CALL, 0, FinishReason.STOP),
        ("ernie-45-vl-thinking", {"tools": TOOLS}, "Look.\n" + CALL, "Look.\n" + CALL, 0, FinishReason.STOP),
        ("ernie-45-vl-thinking", {"tools": TOOLS}, "\n" + CALL, "", 1, FinishReason.TOOL_CALLS),
        # What looks like a call inside a structured answer is part of it.
        ("ernie45", {"tools": TOOLS, "structure": OBJECT}, '{"a": "<tool_call>{"', '{"a": "<tool_call>{"', 0,
         FinishReason.STOP),
        ("ernie45", {"tools": TOOLS, "structure": OBJECT}, CALL, "", 1, FinishReason.TOOL_CALLS),
        ("ernie45", {"tools": TOOLS, "tool_choice": ToolChoice(mode=ToolMode.NONE)}, CALL, CALL, 0, FinishReason.STOP),
        ("ernie45", {"tools": TOOLS, "structure": OBJECT, "stop": ("name",)}, CALL, "", 1, FinishReason.TOOL_CALLS),
    ],
)  # fmt: skip
def test_what_is_a_call(
    parser: Any, asked: dict[str, Any], reply: str, text: str, calls: int, reason: FinishReason
) -> None:
    tokenizer = TextTokenizer.from_dir(tiny_checkpoint())
    output = _output(tokenizer, SCORE, calls_lead(parser), GenerateCall(messages=(), **asked), False)  # type: ignore[arg-type]
    ids = [*tokenizer.encode(reply), 2]
    deltas = [
        output.push(
            [
                TokenEvent(
                    key=SequenceKey("r", 0, 0),
                    index=index,
                    token_id=token,
                    finish=FinishReason.STOP if index == len(ids) - 1 else None,
                )
            ]
        )
        for index, token in enumerate(ids)
    ]
    assert "".join(delta.text for delta in deltas) == text
    begun = [call for delta in deltas for call in delta.tool_calls if call.id]
    assert len(begun) == calls and all(call.name == "f" for call in begun)
    assert output.ending is not None and output.ending.reason is reason
