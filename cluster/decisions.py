"""What the planner decided, and what became of the fleet: the last of it is kept, for people. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

KEPT = 200


class DecisionKind(StrEnum):
    ROLE = "role"
    SCALE = "scale"
    FLEET = "fleet"
    """A part came, left or was lost."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """One of them."""

    number: int
    """1 is a planner's first."""
    time_s: float
    """Wall clock."""
    kind: DecisionKind
    pool: str
    subject: str
    """Id of the engine or other worker; the pool itself where its count changes."""
    change: str
    """``decode -> prefill``, ``2 -> 3``, ``joined``, ``left`` or ``lost``."""
    reason: str


class DecisionLog:
    """The last ``KEPT`` decisions, oldest first. ``wall_clock`` in seconds."""

    def __init__(self, wall_clock: Callable[[], float]) -> None:
        self._wall_clock = wall_clock
        self._count = 0
        self._kept: deque[Decision] = deque(maxlen=KEPT)

    @property
    def count(self) -> int:
        """Of all that were ever noted."""
        return self._count

    @property
    def kept(self) -> tuple[Decision, ...]:
        return tuple(self._kept)

    def note(self, kind: DecisionKind, *, pool: str, subject: str, change: str, reason: str = "") -> None:
        self._count += 1
        self._kept.append(
            Decision(
                number=self._count,
                time_s=self._wall_clock(),
                kind=kind,
                pool=pool,
                subject=subject,
                change=change,
                reason=reason,
            )
        )
