"""What became of a request and why, for ``ernie explain``: a bounded list of notes, kept for a while after its end."""

from __future__ import annotations

import enum
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from actors.types import Stage
from cluster.policy.candidates import Candidate
from cluster.router.timeline import Timeline

FIRST_NOTES = 24
LAST_NOTES = 72
"""A request has a dozen notes; one with hundreds of attempts keeps the first and the last."""
REMEMBER_S = 600.0
MOST_ENDED = 1000
"""About 10 kB each."""

Fact = str | int | float | bool | None


class What(enum.StrEnum):
    """Kinds of notes."""

    ADMITTED = "admitted"
    PREPROCESSED = "preprocessed"
    ENCODER = "encoder"
    """Was picked."""
    ENCODED = "encoded"
    MEDIA_HELD = "media_held"
    """By the engine that is to compute the prompt: nothing is encoded."""
    STAGE_LOST = "stage_lost"
    """A preprocessor or an encoder, or patches: done again."""
    MEDIA_AGAIN = "media_again"
    """Embeddings were gone when an engine pulled them."""
    WAITED = "waited"
    ROUTE = "route"
    """Was picked for an attempt, which begins."""
    PREFILL_STARTED = "prefill_started"
    FIRST_TOKEN = "first_token"
    """Of the attempt."""
    TRANSFERRED = "transferred"
    ATTEMPT_ENDED = "attempt_ended"
    """Without a last token."""
    CHOICE_FINISHED = "choice_finished"
    CANCELLED = "cancelled"
    FAILED = "failed"
    FINISHED = "finished"


@dataclass(frozen=True, kw_only=True, slots=True)
class Note:
    """``at_s``: since the request was admitted. ``candidates``: what a choice was made from, the taken one first."""

    at_s: float
    what: What
    choice: int | None
    attempt: int | None
    facts: dict[str, Fact]
    candidates: tuple[Candidate, ...]

    def told(self) -> dict[str, Any]:
        """As JSON values; ``choice`` and ``attempt`` are null where a note is about neither."""
        told: dict[str, Any] = {"at_s": round(self.at_s, 6), "what": str(self.what)}
        facts = {"choice": self.choice, "attempt": self.attempt, **self.facts}
        told |= {name: round(fact, 6) if isinstance(fact, float) else fact for name, fact in facts.items()}
        if self.candidates:
            told["candidates"] = [candidate.told() for candidate in self.candidates]
        return told


class Story:
    """Of one request. Every part of the router that decides something for it adds a note."""

    def __init__(self, request_id: str, alias: str | None, timeline: Timeline, arrival_s: float) -> None:
        self.request_id = request_id
        self.alias = alias
        self._timeline = timeline
        self._arrival_s = arrival_s
        self._first: list[Note] = []
        self._last: deque[Note] = deque(maxlen=LAST_NOTES)
        self._dropped = 0

    @property
    def now_s(self) -> float:
        return self._timeline.elapsed_s

    def note(
        self,
        what: What,
        *,
        choice: int | None = None,
        attempt: int | None = None,
        candidates: Iterable[Candidate] = (),
        **facts: Fact,
    ) -> None:
        note = Note(
            at_s=self.now_s, what=what, choice=choice, attempt=attempt, facts=facts, candidates=tuple(candidates)
        )
        if len(self._first) < FIRST_NOTES:
            self._first.append(note)
            return
        self._dropped += len(self._last) == LAST_NOTES
        self._last.append(note)

    def told(self) -> dict[str, Any]:
        """As JSON values; changes no more once the request has ended."""
        stage, timings = self._timeline.stage, self._timeline.so_far()
        notes = [*self._first, *self._last]
        ended = stage is Stage.FINISHED
        return {
            "request_id": self.request_id,
            "alias": self.alias,
            "running": not ended,
            "stage": str(stage),
            "arrival_s": self._arrival_s,
            "elapsed_s": sum(timings.exposed.values()),
            "notes": [note.told() for note in notes],
            "notes_dropped": self._dropped,
            "exposed_s": {str(stage): seconds for stage, seconds in timings.exposed.items()},
            "busy_s": {str(stage): seconds for stage, seconds in timings.busy.items()},
        }


class Stories:
    """Those of requests that ended lately: for ``REMEMBER_S``, and at most ``MOST_ENDED``."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._ended: OrderedDict[str, tuple[float, Story]] = OrderedDict()

    def add(self, story: Story) -> None:
        self._ended[story.request_id] = (self._clock(), story)
        self._forget()

    def find(self, name: str) -> Story | None:
        """By id, or the latest of an alias."""
        self._forget()
        if name in self._ended:
            return self._ended[name][1]
        return next((story for _, story in reversed(self._ended.values()) if story.alias == name), None)

    def _forget(self) -> None:
        oldest = self._clock() - REMEMBER_S
        while self._ended and (len(self._ended) > MOST_ENDED or next(iter(self._ended.values()))[0] < oldest):
            self._ended.popitem(last=False)
