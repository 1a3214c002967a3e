"""Where the time of one request went."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from actors.types import Stage, Timings


class StageSpan(NamedTuple):
    """A time in one stage, in seconds since the request began."""

    stage: Stage
    began_s: float
    ended_s: float


class Timeline:
    """Partitions the time since its creation into exposed stages by the milestone that gated progress.

    ``exposed`` sums to wall time exactly; ``busy`` is work reported by other places and may overlap.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._began = self._since = clock()
        self._stage = Stage.QUEUED
        self._timings = Timings()
        self._spans: list[StageSpan] = []

    @property
    def stage(self) -> Stage:
        return self._stage

    @property
    def elapsed_s(self) -> float:
        return self._clock() - self._began

    def enter(self, stage: Stage) -> None:
        """Books the time since the last call on the stage that ends now."""
        now = self._clock()
        exposed = self._timings.exposed
        exposed[self._stage] = exposed.get(self._stage, 0.0) + now - self._since
        self._spans.append(StageSpan(self._stage, self._since - self._began, now - self._began))
        self._stage, self._since = stage, now

    def add_busy(self, stage: Stage, seconds: float) -> None:
        self._timings.busy[stage] = self._timings.busy.get(stage, 0.0) + seconds

    def finish(self) -> Timings:
        """Ends the last stage. Idempotent."""
        if self._stage is not Stage.FINISHED:
            self.enter(Stage.FINISHED)
        return self._timings

    def so_far(self) -> Timings:
        """With the present stage, unless it is over."""
        exposed = dict(self._timings.exposed)
        if self._stage is not Stage.FINISHED:
            exposed[self._stage] = exposed.get(self._stage, 0.0) + self._clock() - self._since
        return Timings(exposed=exposed, busy=dict(self._timings.busy))

    @property
    def spans(self) -> tuple[StageSpan, ...]:
        """Stages that ended, one after the other without a gap."""
        return tuple(self._spans)


class Progress:
    """The stage of a request of several choices: that of the live choice which is furthest, since that one's client
    sees progress.
    """

    def __init__(self, timeline: Timeline) -> None:
        self._timeline = timeline
        self._stages: dict[int, Stage] = {}

    def stage(self, choice: int) -> Stage:
        return self._stages.get(choice, Stage.QUEUED)

    def enter(self, choice: int, stage: Stage) -> None:
        """A choice passed a milestone, or fell back."""
        self._stages[choice] = stage
        self._update()

    def leave(self, choice: int) -> None:
        """A choice ended."""
        self._stages.pop(choice, None)
        self._update()

    def _update(self) -> None:
        furthest = max(self._stages.values(), key=_ORDER.__getitem__, default=self._timeline.stage)
        if furthest is not self._timeline.stage:
            self._timeline.enter(furthest)


_ORDER = {stage: index for index, stage in enumerate(Stage)}
