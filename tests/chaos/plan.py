"""What a run of trials does, from a seed alone: who is hit, how, at which stage of a request. Pure."""

from __future__ import annotations

import enum
import random
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from actors.types import Stage


class Victim(enum.StrEnum):
    """A kind of process. Each has two replicas, but for the planner."""

    PREPROCESSOR = "preprocessor"
    ENCODER = "encoder"
    PREFILL = "prefill"
    DECODE = "decode"
    RANK = "rank"
    """Of an engine that is a group: the one beside its leader."""
    PLANNER = "planner"


class Fault(enum.StrEnum):
    """What happens to it."""

    KILL = "kill"
    """SIGKILL."""
    FREEZE = "freeze"
    """SIGSTOP. After a while it goes on, unless Serve has replaced it."""
    SWITCH = "switch"
    """It is ordered to take the other role, by hand, and back when the replies are there."""


STAGES = (Stage.PREPROCESS, Stage.ENCODE, Stage.PREFILL, Stage.TRANSFER, Stage.DECODE)

OWN_STAGE = {
    Victim.PREPROCESSOR: Stage.PREPROCESS,
    Victim.ENCODER: Stage.ENCODE,
    Victim.PREFILL: Stage.PREFILL,
    Victim.DECODE: Stage.DECODE,
    Victim.RANK: Stage.DECODE,
    Victim.PLANNER: Stage.DECODE,
}
MOVERS = (Victim.PREFILL, Victim.DECODE)
"""Whose role may be changed."""
FIRST = len(Victim) + 1
"""So many trials hit every victim once, and change one role."""
APART = 2
"""At least so many trials lie between two that need the same parts, where the cells that are left allow it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """One fault under some requests. ``calls`` are indices; the first is the one whose stage counts."""

    seed: int
    number: int
    victim: Victim
    stage: Stage
    fault: Fault
    calls: tuple[int, ...]
    late_calls: tuple[int, ...]
    """Begin when the fault has fallen, or the role has changed."""
    tokens: int
    """In DECODE, how many the first has when the fault falls."""
    thaw_after_s: float | None
    """None: it stays frozen until Serve replaces it."""
    salt: str

    @property
    def role(self) -> Victim:
        """Whom the victim works beside: a rank belongs to the engine that has most to do in the stage."""
        return _role(self.victim, self.stage)


Cell = tuple[Victim, Stage, Fault]


def plan(trials: int, seed: int, call_count: int, at_once: int, late: int = 2, first: int = 0) -> list[Trial]:
    """Trials ``first`` to ``first + trials - 1`` of a seed: whatever is asked for of it, they are the same.

    The ``FIRST`` first ones hit every victim once in its own stage and change a role; all cells come equally often, in
    random order.
    """
    rng = random.Random(seed)
    cells = [(victim, stage, fault) for victim in Victim for stage in STAGES for fault in (Fault.KILL, Fault.FREEZE)]
    cells += [(victim, stage, Fault.SWITCH) for victim in MOVERS for stage in STAGES]
    deck = [(victim, OWN_STAGE[victim], rng.choice((Fault.KILL, Fault.FREEZE))) for victim in Victim]
    deck.append((Victim.PREFILL, Stage.DECODE, Fault.SWITCH))
    order: list[Cell] = []
    while len(order) < first + trials:
        rng.shuffle(deck)
        order += _apart(deck, order[-APART:])
        deck = cells
    return [
        _trial(seed, number, cell, call_count, at_once, late)
        for number, cell in enumerate(order[: first + trials])
        if number >= first
    ]


def _trial(seed: int, number: int, cell: Cell, call_count: int, at_once: int, late: int) -> Trial:
    rng = random.Random(f"{seed}-{number}")
    victim, stage, fault = cell
    return Trial(
        seed=seed,
        number=number,
        victim=victim,
        stage=stage,
        fault=fault,
        calls=tuple(rng.randrange(call_count) for _ in range(at_once)),
        late_calls=tuple(rng.randrange(call_count) for _ in range(late)),
        tokens=rng.randrange(1, 80),
        thaw_after_s=_thaw_after_s(victim, rng),
        salt=f"{seed}-{number}",
    )


def _apart(deck: Sequence[Cell], before: Iterable[Cell]) -> list[Cell]:
    """The deck in an order in which few trials wait until what they hit is replaced since the last time."""
    left, order = list(deck), []
    lately = deque((_role(victim, stage) for victim, stage, _ in before), maxlen=APART)
    while left:
        cell = min(left, key=lambda cell: _role(cell[0], cell[1]) in lately)
        left.remove(cell)
        order.append(cell)
        lately.append(_role(cell[0], cell[1]))
    return order


def _role(victim: Victim, stage: Stage) -> Victim:
    if victim is not Victim.RANK:
        return victim
    return Victim.DECODE if stage in (Stage.TRANSFER, Stage.DECODE) else Victim.PREFILL


def _thaw_after_s(victim: Victim, rng: random.Random) -> float | None:
    """Requests would meet a preprocessor that stays frozen in trials of others: Serve alone knows where calls go. The
    group of a frozen rank ends."""
    thaw_after_s, stays = rng.uniform(3.5, 6.0), rng.random() < 0.3
    return None if victim is Victim.RANK or (stays and victim is not Victim.PREPROCESSOR) else thaw_after_s
