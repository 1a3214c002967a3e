"""How each request went, for whoever counts, times or traces requests."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from actors.types import FinishReason, Stage, Timings
from cluster.generation import Usage
from cluster.router.timeline import StageSpan


class Outcome(enum.StrEnum):
    """How a request that was admitted ended."""

    FINISHED = "finished"
    ERROR = "error"
    CANCELLED = "cancelled"
    """By its client, which left or said so, or by name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestRecord:
    """One request, made once when it has ended. ``usage`` is zero where it did not get so far."""

    request_id: str
    alias: str | None
    outcome: Outcome
    reason: str | None
    """Of an ERROR, as ``ServingError`` has it."""
    finish_reasons: tuple[FinishReason, ...]
    """Of the choices that ended."""
    usage: Usage
    ttft_s: float | None
    """None when no token came."""
    tpot_s: float | None
    """Mean time between two tokens of a choice, all choices together; None when none had two tokens."""
    e2e_s: float
    attempts: int
    """Submitted to engines, of all choices: without losses as many as there are choices."""
    timings: Timings
    spans: tuple[StageSpan, ...]
    """``timings.exposed`` in the order it happened."""


class Recorder:
    """Hears how requests go, on the router's event loop, and must not wait. A recorder overrides what it needs."""

    def admitted(self, request_id: str) -> None:
        """A request runs; ``ended`` follows."""

    def refused(self, reason: str) -> None:
        """A request was not admitted."""

    def token_gap(self, seconds: float) -> None:
        """Between two arrivals of tokens of one choice."""

    def retried(self, stage: Stage, reason: str) -> None:
        """Work of a stage was lost or given back and is done again: of PREFILL all that engines do."""

    def ended(self, record: RequestRecord) -> None:
        """An admitted request is over."""


class Recorders(Recorder):
    """Several, each told everything."""

    def __init__(self, *recorders: Recorder) -> None:
        self._recorders = recorders

    def admitted(self, request_id: str) -> None:
        for recorder in self._recorders:
            recorder.admitted(request_id)

    def refused(self, reason: str) -> None:
        for recorder in self._recorders:
            recorder.refused(reason)

    def token_gap(self, seconds: float) -> None:
        for recorder in self._recorders:
            recorder.token_gap(seconds)

    def retried(self, stage: Stage, reason: str) -> None:
        for recorder in self._recorders:
            recorder.retried(stage, reason)

    def ended(self, record: RequestRecord) -> None:
        for recorder in self._recorders:
            recorder.ended(record)
