"""From token ids to what the client sees of one choice. Pure.

    tokens in index order -> text -> reasoning apart -> cut at stop strings -> tool calls apart -> finish reason

Stop strings see an answer as the model writes it, calls and their markers included: a call that one cuts is left
unfinished.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from actors.errors import InternalError
from actors.processing.tool_calls import joined
from actors.types import FinishReason, TokenEvent, TokenLogprobs, ToolCallDelta
from cluster.generation import Delta, PositionScores

if TYPE_CHECKING:
    from actors.processing.detokenize import IncrementalDetokenizer
    from actors.processing.parsers import ReasoningParser, StopStrings
    from actors.processing.tool_calls import ToolCallParser


@dataclass(frozen=True, kw_only=True, slots=True)
class Ending:
    """Why the reply is over. ``stop_reason`` is the stop string or token id, None for an end token."""

    reason: FinishReason
    stop_reason: str | int | None = None


class OutputAssembler:
    """Takes the token events of one attempt after the other, whichever engine sent them, and releases text in index
    order.

    Args:
        tools: given when the model may call some.
        stop_token_ids: the caller's own.
        min_tokens: no stop string is completed by so many first tokens.
        score: given when the caller asked for log-probabilities.
    """

    def __init__(
        self,
        detokenizer: IncrementalDetokenizer,
        reasoning: ReasoningParser,
        stop: StopStrings,
        *,
        tools: ToolCallParser | None = None,
        stop_token_ids: tuple[int, ...],
        min_tokens: int = 0,
        score: Callable[[TokenLogprobs], PositionScores] | None = None,
    ) -> None:
        self._detokenizer = detokenizer
        self._reasoning = reasoning
        self._stop = stop
        self._tools = tools
        self._stop_token_ids = frozenset(stop_token_ids)
        self._min_tokens = min_tokens
        self._score = score
        self._early: dict[int, TokenEvent] = {}
        self._first = 0
        self.token_ids: list[int] = []
        self.reasoning_tokens = 0
        self.ending: Ending | None = None
        self.engine_finished = False

    def begin_attempt(self) -> None:
        """From here on tokens come of another attempt, which goes on behind those taken. All else stays as it is."""
        self._early.clear()
        self._first = len(self.token_ids)

    def push(self, events: list[TokenEvent]) -> Delta:
        """Returns the text that became certain. Known indices are dropped; after ``ending`` is set nothing changes.

        Raises:
            InternalError: a token is missing that should have come before. Only an attempt's first may be late: it
                comes from the prefill engine.
        """
        for event in events:
            if event.index >= len(self.token_ids):
                self._early[event.index] = event
        first = len(self.token_ids)
        text = thought = ""
        calls: list[ToolCallDelta] = []
        scores: list[PositionScores] = []
        while self.ending is None and len(self.token_ids) in self._early:
            event = self._early.pop(len(self.token_ids))
            more_text, more_thought, more_calls = self._take(event)
            text += more_text
            thought += more_thought
            calls += more_calls
            if self._score is not None:
                scores.append(self._scored(event))
        if self.ending is None and self._early and len(self.token_ids) != self._first:
            raise InternalError(f"token {len(self.token_ids)} is missing before token {min(self._early)}")
        return Delta(
            text=text,
            reasoning=thought,
            tool_calls=joined(calls),
            token_ids=tuple(self.token_ids[first:]),
            logprobs=tuple(scores),
        )

    def _scored(self, event: TokenEvent) -> PositionScores:
        if event.logprobs is None or self._score is None:
            raise InternalError(f"token {event.index} came without its log-probability")
        return self._score(event.logprobs)

    def _take(self, event: TokenEvent) -> tuple[str, str, tuple[ToolCallDelta, ...]]:
        self.token_ids.append(event.token_id)
        self.reasoning_tokens += self._reasoning.in_reasoning
        self.engine_finished = event.finish is not None
        stopped = event.finish is FinishReason.STOP
        piece = "" if stopped else self._detokenizer.push([event.token_id])
        if event.finish is not None:
            piece += self._detokenizer.flush()
        thought, answer = self._reasoning.push(piece)
        if event.finish is not None:
            late_thought, late_answer = self._reasoning.flush()
            thought, answer = thought + late_thought, answer + late_answer
        text = self._stop.push(answer, match=len(self.token_ids) > self._min_tokens)
        if self._stop.matched is not None:
            self.ending = Ending(reason=FinishReason.STOP, stop_reason=self._stop.matched)
        elif event.finish is not None:
            text += self._stop.flush()
            named = event.token_id if stopped and event.token_id in self._stop_token_ids else None
            self.ending = Ending(reason=event.finish, stop_reason=named)
        if self._tools is None:
            return text, thought, ()
        text, calls = self._split(text, self._tools)
        return text, thought, calls

    def _split(self, text: str, tools: ToolCallParser) -> tuple[str, tuple[ToolCallDelta, ...]]:
        """Takes calls out of the text; they may end the reply, and say why it ended."""
        text, calls = tools.push(text)
        if tools.full:
            # The last call it may make ends a reply, whatever came with the same tokens.
            self.ending = Ending(reason=FinishReason.STOP)
        if self.ending is not None:
            late_text, late_calls = tools.flush()
            text, calls = text + late_text, calls + late_calls
            if self.ending.reason is FinishReason.STOP and tools.count and not tools.unfinished:
                self.ending = replace(self.ending, reason=FinishReason.TOOL_CALLS)
        return text, calls
