"""Streaming parsers of generated text: reasoning apart from the answer, and stop strings.

    output := reasoning "</think>" newline* ( answer | "<response>" newline* answer newline* "</response>" newline* )

Both give the same result however the text is cut into pushes, and hold back only what may still become a marker.
Markers are read as text: ``TextTokenizer.decode`` keeps them even where the checkpoint calls them special.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence

_THINK = "<think>"
_END_THINK = "</think>"
_RESPONSE = "<response>"
_END_RESPONSE = "</response>"


class _State(enum.Enum):
    OPENING = enum.auto()
    """Start of the output: a marker may follow newlines."""
    REASONING_START = enum.auto()
    REASONING = enum.auto()
    ANSWER_START = enum.auto()
    """Behind </think>: newlines are dropped, a <response> may open."""
    ANSWER = enum.auto()
    RESPONSE_START = enum.auto()
    RESPONSE = enum.auto()
    AFTER_RESPONSE = enum.auto()


class ReasoningParser:
    """Splits output into (reasoning, answer). Not shared between threads.

    ``starts_thinking``: the prompt ended inside an open think block, so the output begins with reasoning. Otherwise it
    does only if it begins with ``<think>``. An output that never closes the block is all reasoning.

    ``structured``: the answer is structured output and stays as it is, even if it looks like a marker.
    """

    def __init__(self, starts_thinking: bool, *, structured: bool = False) -> None:
        self._structured = structured
        if starts_thinking:
            self._state = _State.REASONING_START
        else:
            self._state = _State.ANSWER if structured else _State.OPENING
        self._held = ""

    @property
    def in_reasoning(self) -> bool:
        return self._state in (_State.REASONING_START, _State.REASONING)

    def push(self, text: str) -> tuple[str, str]:
        """Certain deltas of reasoning and answer."""
        self._held += text
        return self._drain(final=False)

    def flush(self) -> tuple[str, str]:
        """What was held back, at the end of the output."""
        return self._drain(final=True)

    def _drain(self, *, final: bool) -> tuple[str, str]:
        reasoning, answer = "", ""
        while True:
            before = self._state
            in_reasoning = self.in_reasoning
            delta = self._step(final=final)
            if in_reasoning:
                reasoning += delta
            else:
                answer += delta
            if self._state is before:
                return reasoning, answer

    def _step(self, *, final: bool) -> str:
        """Consumes held text in one state. Staying in the state means that more text is needed."""
        match self._state:
            case _State.OPENING:
                return self._open(
                    {_THINK: _State.REASONING_START, _RESPONSE: _State.RESPONSE_START}, _State.ANSWER, final, keep=True
                )
            case _State.REASONING_START:
                # Some models repeat the marker that the prompt already gave.
                return self._open({_THINK: _State.REASONING_START}, _State.REASONING, final)
            case _State.REASONING:
                return self._until(_END_THINK, _State.ANSWER_START, final)
            case _State.ANSWER_START:
                markers = {} if self._structured else {_RESPONSE: _State.RESPONSE_START}
                return self._open(markers, _State.ANSWER, final)
            case _State.RESPONSE_START:
                return self._open({}, _State.RESPONSE, final)
            case _State.RESPONSE:
                return self._until(_END_RESPONSE, _State.AFTER_RESPONSE, final)
            case _State.AFTER_RESPONSE:
                return self._open({}, _State.ANSWER, final)
            case _State.ANSWER:
                text, self._held = self._held, ""
                return text

    def _open(self, markers: dict[str, _State], otherwise: _State, final: bool, *, keep: bool = False) -> str:
        """Drops newlines (kept in front of ordinary text if ``keep``) and the markers that may stand here."""
        rest = self._held.lstrip("\n")
        while marker := next((marker for marker in markers if rest.startswith(marker)), None):
            self._held = rest[len(marker) :]
            if markers[marker] is not self._state:
                self._state = markers[marker]
                return ""
            rest = self._held.lstrip("\n")
        if not final and (not rest or any(marker.startswith(rest) for marker in markers)):
            return ""
        if not keep:
            self._held = rest
        self._state = otherwise
        return ""

    def _until(self, marker: str, following: _State, final: bool) -> str:
        """Text up to the marker, without the newlines before it."""
        text, found, rest = self._held.partition(marker)
        if found:
            self._held = rest
            self._state = following
            return text.rstrip("\n")
        keep = 0 if final else prefix_at_end(text, marker)
        certain = text[: len(text) - keep].rstrip("\n")
        self._held = "" if final else text[len(certain) :]
        return certain


class StopStrings:
    """Ends the answer before the first stop string to be completed. Not shared between threads."""

    def __init__(self, stops: Sequence[str]) -> None:
        """Raises ValueError for an empty stop string."""
        if any(not stop for stop in stops):
            raise ValueError("a stop string must not be empty")
        self._stops = tuple(dict.fromkeys(stops))
        self._held = ""
        self._exempt = 0
        self.matched: str | None = None
        """The stop string that ended the answer."""

    def push(self, text: str, *, match: bool = True) -> str:
        """Text that is certainly before any stop string; empty once one has matched.

        Without ``match`` no stop string ends with this text, but one that begins in it may still end later.
        """
        if self.matched is not None:
            return ""
        self._held += text
        if not match:
            self._exempt = len(self._held)
        found = [(start + len(stop), start, stop) for stop in self._stops if (start := self._find(stop)) >= 0]
        if found:
            # Completed first; of those completed together, the one that began first.
            _, start, self.matched = min(found)
            certain, self._held = self._held[:start], ""
            return certain
        keep = max((prefix_at_end(self._held, stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        certain, self._held = self._held[:cut], self._held[cut:]
        self._exempt = max(0, self._exempt - cut)
        return certain

    def _find(self, stop: str) -> int:
        """Where a stop string begins that does not end in the exempt beginning of what is held."""
        return self._held.find(stop, max(0, self._exempt + 1 - len(stop)))

    def flush(self) -> str:
        """What was held back, at the end of the output."""
        text, self._held = self._held, ""
        return text


def prefix_at_end(text: str, marker: str) -> int:
    """Length of the longest proper beginning of ``marker`` that ``text`` ends with."""
    for length in range(min(len(marker) - 1, len(text)), 0, -1):
        if marker.startswith(text[-length:]):
            return length
    return 0
