"""From token ids to what the client sees: order, text, reasoning, stop strings, finish reason. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from actors.types import FinishReason, TokenEvent
from cluster.generation import Delta

if TYPE_CHECKING:
    from actors.processing.detokenize import IncrementalDetokenizer
    from actors.processing.parsers import ReasoningParser, StopStrings


@dataclass(frozen=True, kw_only=True, slots=True)
class Ending:
    """Why the reply is over. ``stop_reason`` is the stop string or token id, None for an end token."""

    reason: FinishReason
    stop_reason: str | int | None = None


class OutputAssembler:
    """Takes token events in any order, whichever engine sent them, and releases text in index order."""

    def __init__(
        self,
        detokenizer: IncrementalDetokenizer,
        reasoning: ReasoningParser,
        stop: StopStrings,
        *,
        stop_token_ids: tuple[int, ...],
    ) -> None:
        self._detokenizer = detokenizer
        self._reasoning = reasoning
        self._stop = stop
        self._stop_token_ids = frozenset(stop_token_ids)
        self._early: dict[int, TokenEvent] = {}
        self.token_ids: list[int] = []
        self.reasoning_tokens = 0
        self.ending: Ending | None = None
        self.engine_finished = False

    def push(self, events: list[TokenEvent]) -> Delta:
        """Returns the text that became certain. Duplicates are dropped; after ``ending`` is set nothing changes."""
        for event in events:
            if event.index >= len(self.token_ids):
                self._early[event.index] = event
        first = len(self.token_ids)
        text = thought = ""
        while self.ending is None and len(self.token_ids) in self._early:
            more_text, more_thought = self._take(self._early.pop(len(self.token_ids)))
            text += more_text
            thought += more_thought
        return Delta(text=text, reasoning=thought, token_ids=tuple(self.token_ids[first:]))

    def _take(self, event: TokenEvent) -> tuple[str, str]:
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
        text = self._stop.push(answer)
        if self._stop.matched is not None:
            self.ending = Ending(reason=FinishReason.STOP, stop_reason=self._stop.matched)
        elif event.finish is not None:
            text += self._stop.flush()
            named = event.token_id if stopped and event.token_id in self._stop_token_ids else None
            self.ending = Ending(reason=event.finish, stop_reason=named)
        return text, thought
