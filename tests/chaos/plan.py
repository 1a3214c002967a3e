"""What a run of trials does, from a seed alone: who is hit, how, at which stage of a request. Pure."""

from __future__ import annotations

import enum
import random
from dataclasses import dataclass

from actors.types import Stage


class Victim(enum.StrEnum):
    """A kind of process. Each has two replicas, but for the planner."""

    PREPROCESSOR = "preprocessor"
    ENCODER = "encoder"
    PREFILL = "prefill"
    DECODE = "decode"
    PLANNER = "planner"


class Fault(enum.StrEnum):
    """What happens to it."""

    KILL = "kill"
    """SIGKILL."""
    FREEZE = "freeze"
    """SIGSTOP. After a while it goes on, unless Serve has replaced it."""


STAGES = (Stage.PREPROCESS, Stage.ENCODE, Stage.PREFILL, Stage.TRANSFER, Stage.DECODE)

OWN_STAGE = {
    Victim.PREPROCESSOR: Stage.PREPROCESS,
    Victim.ENCODER: Stage.ENCODE,
    Victim.PREFILL: Stage.PREFILL,
    Victim.DECODE: Stage.DECODE,
    Victim.PLANNER: Stage.DECODE,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """One fault under some requests. ``calls`` are indices; the first is the one whose stage counts."""

    number: int
    victim: Victim
    stage: Stage
    fault: Fault
    calls: tuple[int, ...]
    tokens: int
    """In DECODE, how many the first has when the fault falls."""
    thaw_after_s: float
    salt: str


def plan(trials: int, seed: int, call_count: int, at_once: int) -> list[Trial]:
    """The first trials hit every victim once in its own stage; all cells come equally often, in random order."""
    rng = random.Random(seed)
    cells = [(victim, stage, fault) for victim in Victim for stage in STAGES for fault in Fault]
    order = [(victim, OWN_STAGE[victim], rng.choice(list(Fault))) for victim in Victim]
    rng.shuffle(order)
    while len(order) < trials:
        rng.shuffle(cells)
        order += cells
    return [
        Trial(
            number=number,
            victim=victim,
            stage=stage,
            fault=fault,
            calls=tuple(rng.randrange(call_count) for _ in range(at_once)),
            tokens=rng.randrange(1, 80),
            thaw_after_s=rng.uniform(3.5, 8.0),
            salt=f"{seed}-{number}",
        )
        for number, (victim, stage, fault) in enumerate(order[:trials])
    ]
