"""Names that vLLM and FastDeploy have for parsers of this model's output, and what they mean here.

There is one reasoning parser, ``parsers.ReasoningParser``: whether an output begins with thinking is told by its
prompt, so the names, which stand for checkpoints, need not differ. ``ernie-45-vl-thinking`` of FastDeploy says of a
whole reply without ``</think>`` that it is all answer, and of the same reply in a stream that it is all reasoning: here
it is reasoning in both.

Tool call parsers differ in one thing: ``ernie45`` finds calls anywhere in an answer, ``ernie-45-vl-thinking`` only
where nothing but whitespace stands before them.
"""

from __future__ import annotations

from typing import Literal, get_args

ReasoningParserName = Literal["ernie45", "ernie-45-vl", "ernie-45-vl-thinking"]
ToolCallParserName = Literal["ernie45", "ernie-45-vl-thinking"]
REASONING_PARSERS: tuple[str, ...] = get_args(ReasoningParserName)
TOOL_CALL_PARSERS: tuple[str, ...] = get_args(ToolCallParserName)


def calls_lead(name: ToolCallParserName) -> bool:
    """Whether calls count only before all text."""
    return name == "ernie-45-vl-thinking"
