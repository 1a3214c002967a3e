"""When pools grow and shrink: tables, and loads over hours on a clock that only counts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise

import pytest

from actors.reports import EncoderInfo, LoadReport
from actors.types import EngineRole
from cluster.autoscaling import Memory, Scaling, Seen, Work, decide, see_encoders, see_engines, see_preprocessors
from cluster.config import EnginePool, Roles
from cluster.config_scaling import (
    Autoscaling,
    EngineAutoscaling,
    PreprocessorAutoscaling,
    RoleMoves,
    VisionEncoderAutoscaling,
)
from cluster.pressure import ON_TIME, Lateness
from cluster.registry import EncoderEntry, EngineEntry, PreprocessorEntry
from tests.unit.cluster.test_registry import engine

P, D, C = EngineRole.PREFILL, EngineRole.DECODE, EngineRole.COLOCATED
BOUNDS = Autoscaling(max_replicas=8, upscale_delay_s=5, downscale_delay_s=60, idle=0.6)
IDLE = LoadReport(step=0, running=0, waiting=0, free_blocks=100, total_blocks=100, block_size=16, queued_tokens=0)


def pool(count: int, pressure: float = 0.0, load: float = 0.0, late: float = 0.0, roles: str = "") -> Seen:
    """Of one kind of work."""
    has = tuple(EngineRole(role) for role in roles.split())
    work = Work(name="work", count=count, pressure=pressure, load=load, late=late, roles=has)
    return Seen(pool="pool", present=count, works=(work,), spares=has or (None,))


def told(scaling: Scaling | None) -> str:
    return "" if scaling is None else f"{scaling.former} -> {scaling.target}"


def decided(seen: Seen, *, target: int, seconds: int, bounds: Autoscaling = BOUNDS) -> list[str]:
    """What is decided within so many seconds in which nothing changes, not even the count, each with its second."""
    memory, found = Memory(target=target), []
    for now in range(seconds):
        memory, scaling = decide(seen, bounds, memory, float(now))
        if scaling is not None:
            found.append(f"{now}: {told(scaling)}")
    return found


@pytest.mark.parametrize(
    ("seen", "target", "changes"),
    [
        (pool(2, pressure=0.9, load=1.8), 2, []),
        (pool(2, pressure=1.0, load=2), 2, ["5: 2 -> 3"]),
        (pool(2, pressure=1.5, load=3), 2, ["5: 2 -> 3"]),
        (pool(4, pressure=1.6, load=6), 4, ["5: 4 -> 7"]),
        (pool(4, pressure=90, load=99), 4, ["5: 4 -> 8"]),
        (pool(6, pressure=1.9, load=9), 6, ["5: 6 -> 8"]),
        (pool(8, pressure=9, load=80), 8, []),
        (pool(2, pressure=1.5, load=3), 3, []),
        (pool(3, load=1.2), 3, ["60: 3 -> 2"]),
        (pool(3, load=1.21), 3, []),
        (pool(3, load=0.1, late=0.7), 3, []),
        (pool(1), 1, []),
        (pool(2, load=1.2), 3, ["60: 3 -> 2"]),
        (pool(2, load=1.3), 3, []),
        (pool(0), 3, []),
    ],
)
def test_a_pool_grows_when_it_is_short_and_shrinks_when_the_rest_has_room(
    seen: Seen, target: int, changes: list[str]
) -> None:
    assert decided(seen, target=target, seconds=70) == changes


def test_a_pool_that_got_what_it_was_given_may_grow_again_and_shrinks_step_by_step() -> None:
    memory, found = Memory(target=2), []
    for now in range(400):
        short = now < 100
        seen = pool(memory.target, pressure=1.0 if short else 0.0, load=memory.target if short else 0.0)
        memory, scaling = decide(seen, replace_bounds(max_replicas=5), memory, float(now))
        found += [f"{now}: {told(scaling)}"] if scaling else []
    assert found == [
        "5: 2 -> 3",
        "11: 3 -> 4",
        "17: 4 -> 5",
        "160: 5 -> 4",
        "221: 4 -> 3",
        "282: 3 -> 2",
        "343: 2 -> 1",
    ]


def replace_bounds(**changes: float) -> Autoscaling:
    return BOUNDS.model_copy(update=changes)


def test_only_a_pool_that_may_shrinks_to_none_and_only_without_any_work() -> None:
    to_none = PreprocessorAutoscaling(min_replicas=0, max_replicas=2, downscale_delay_s=60)
    assert decided(pool(1), target=1, seconds=70, bounds=to_none) == ["60: 1 -> 0"]
    assert decided(pool(1, load=0.01), target=1, seconds=70, bounds=to_none) == []


def test_a_shortage_or_room_that_comes_and_goes_changes_nothing() -> None:
    memory = Memory(target=3)
    for now in range(600):
        seen = pool(3, pressure=1.2, load=3) if now % 6 < 5 else pool(3, load=0.2 if now % 60 else 2.5)
        memory, scaling = decide(seen, BOUNDS, memory, float(now))
        assert scaling is None, now


# What is seen of workers.


def preprocessors(*waits: float, busy: float = 0.0) -> Seen:
    entries = [PreprocessorEntry(incarnation="i", address="a", queue_age_s=wait, busy=busy) for wait in waits]
    return see_preprocessors(entries, PreprocessorAutoscaling(max_replicas=4, queue_age_s=0.5))


def encoders(*queues: int, busy: float = 0.0) -> Seen:
    info = EncoderInfo(encoder_id="e", incarnation="i", address="a", fingerprint="f", dtype="float32")
    entries = [EncoderEntry(info=info, queued_patches=queue, busy=busy) for queue in queues]
    return see_encoders(entries, VisionEncoderAutoscaling(max_replicas=4, queued_patches=1000))


def test_preprocessors_are_short_when_a_request_waits_and_have_room_when_they_are_idle() -> None:
    assert preprocessors(0.0, 1.0).works[0].pressure == 2
    assert preprocessors(0.0, 0.0, busy=0.5).works[0].rest(1) == 1
    assert preprocessors(0.0, 0.0, busy=0.0).works[0].rest(0) == 0
    assert preprocessors(0.1).works[0].rest(0) == math.inf
    assert preprocessors().works[0].pressure == 0


def test_encoders_are_short_when_patches_wait_for_them() -> None:
    assert encoders(3000, 1000, busy=1.0).works[0].pressure == 2
    waits_for_patches = encoders(3000, 1000, busy=0.1).works[0]
    assert waits_for_patches.pressure == pytest.approx(0.2), "what they wait for is not computing"
    assert encoders(0, 0, busy=0.4).works[0].rest(1) == pytest.approx(0.8)


def fleet(*roles: EngineRole, **loads: LoadReport) -> list[EngineEntry]:
    """Engines a, b, c ... with loads by name."""
    names = "abcdefgh"[: len(roles)]
    return [
        replace(engine(name, role), pool="pool", load=loads.get(name, IDLE))
        for name, role in zip(names, roles, strict=True)
    ]


def engines(
    entries: list[EngineEntry],
    late: Lateness = ON_TIME,
    wanted: Mapping[EngineRole, int] | None = None,
    moves: RoleMoves | None = None,
) -> Seen:
    counts = Counter(entry.info.role for entry in entries)
    bounds = EngineAutoscaling(min_replicas=2, max_replicas=8, queued_tokens=1000, kv_use=0.5)
    config = EnginePool(
        name="pool", roles=Roles(prefill=1, decode=1), autoscaling=bounds, max_num_seqs=10, move_roles=moves
    )
    return see_engines(entries, config, bounds, counts if wanted is None else wanted, late)


def prompts(tokens: int, busy: float = 1.0) -> LoadReport:
    return replace(IDLE, queued_tokens=tokens, prefill_busy=busy)


def replies(blocks: int, **changes: int) -> LoadReport:
    return replace(IDLE, free_blocks=100 - blocks, **changes)


def change(seen: Seen, target: int, bounds: Autoscaling = BOUNDS) -> tuple[str, EngineRole | None] | None:
    """What comes first if this goes on."""
    memory = Memory(target=target)
    for now in range(200):
        memory, scaling = decide(seen, bounds, memory, float(now))
        if scaling is not None:
            return told(scaling), scaling.role
    return None


@pytest.mark.parametrize(
    ("entries", "late", "changes"),
    [
        (fleet(P, D, a=prompts(1500)), ON_TIME, ("2 -> 3", P)),
        (fleet(P, D, a=prompts(1500, busy=0.1)), ON_TIME, None),
        (fleet(P, D, b=replies(60)), ON_TIME, ("2 -> 3", D)),
        (fleet(P, D, b=replies(5, waiting=1)), ON_TIME, ("2 -> 3", D)),
        (fleet(P, D, a=prompts(10)), Lateness(ttft=1.2), ("2 -> 3", P)),
        (fleet(P, D, a=prompts(10, busy=0.1)), Lateness(ttft=1.2), None),
        (fleet(P, D, b=replies(10, running=4)), Lateness(tpot=1.2), ("2 -> 3", D)),
        (fleet(P, D, b=replies(10, running=1)), Lateness(tpot=1.2), None),
        (fleet(C, C, a=replies(60), b=replies(60)), ON_TIME, ("2 -> 3", C)),
        (fleet(P, P, P, D, a=prompts(500, busy=0.3)), ON_TIME, ("4 -> 3", P)),
        (fleet(P, P, D, a=prompts(500, busy=0.7)), ON_TIME, None),
        (fleet(P, D, D, D, b=replies(40)), ON_TIME, ("4 -> 3", D)),
        (fleet(P, D, D, D, b=replies(40, running=13)), ON_TIME, None),
        (fleet(P, D, D, b=replies(4)), Lateness(tpot=0.7), None),
        (fleet(P, D, D, b=replies(35)), ON_TIME, None),
        (fleet(C, C, C, a=replies(35)), ON_TIME, ("3 -> 2", C)),
        (fleet(C, C, C, a=replies(35, queued_tokens=1500)), ON_TIME, None),
        (fleet(P, D), ON_TIME, None),
    ],
)
def test_engines_of_a_role_come_where_it_is_short_and_go_where_it_has_room(
    entries: list[EngineEntry], late: Lateness, changes: tuple[str, EngineRole] | None
) -> None:
    assert change(engines(entries, late), len(entries)) == changes


def test_the_smallest_engine_is_the_measure_of_the_room_without_another() -> None:
    """Whichever goes: with the large one gone the small one would have to hold everything."""
    small = replace(IDLE, total_blocks=20, free_blocks=20)
    assert change(engines(fleet(P, D, D, b=replies(5), c=small)), 3) == ("3 -> 2", D)
    assert change(engines(fleet(P, D, D, b=replies(10), c=small)), 3) is None


def test_engines_that_leave_or_move_do_no_work_but_are_no_reason_to_start_others() -> None:
    leaving = replace(replies(90), draining=True)
    seen = engines(fleet(P, D, D, b=leaving, c=replies(60)))
    assert (seen.present, seen.works[1].count) == (3, 1)
    assert change(seen, 3) == ("3 -> 4", D)


def test_a_role_is_changed_before_an_engine_is_added() -> None:
    entries = fleet(P, D, D, a=prompts(1500))
    assert change(engines(entries), 3) == ("3 -> 4", P)
    assert change(engines(entries, moves=RoleMoves()), 3) is None
    assert change(engines(fleet(P, D, a=prompts(1500)), moves=RoleMoves()), 2) == ("2 -> 3", P)


# Whole days.


@dataclass
class Simulated:
    """A pool under a load in replicas' worth, whose replicas come ``start_s`` after they are wanted. What it cannot do
    queues; a queue of one replica's work for ``bound_s`` is too much."""

    bounds: Autoscaling
    load: Callable[[int], float]
    start_s: int = 20
    bound_s: float = 2.0
    target: int = 1
    queue: float = 0.0
    worst: float = 0.0
    changes: list[tuple[int, int]] = field(default_factory=list)

    def run(self, seconds: int) -> Simulated:
        memory, ready_at = Memory(target=self.target), [0] * self.target
        for now in range(seconds):
            serving = sum(at <= now for at in ready_at)
            offered = self.load(now)
            self.queue = max(0.0, self.queue + offered - serving)
            self.worst = max(self.worst, self.queue)
            pressure = self.queue / self.bound_s / max(1, serving)
            busy = min(float(serving), offered + self.queue)
            work = Work(name="work", count=serving, pressure=pressure, load=max(busy, pressure * serving))
            memory, scaling = decide(Seen(pool="p", present=serving, works=(work,)), self.bounds, memory, float(now))
            if scaling is not None:
                self.changes.append((now, scaling.target))
                # Serve ends those first that are not up yet.
                ready_at = sorted(ready_at)[: scaling.target]
                ready_at += [now + self.start_s] * (scaling.target - len(ready_at))
        self.target = memory.target
        return self

    def turns(self) -> int:
        """Times it grew after it had shrunk, or the other way round."""
        rises = [after > before for before, after in pairwise(self.targets)]
        return sum(before != after for before, after in pairwise(rises))

    @property
    def targets(self) -> list[int]:
        return [target for _, target in self.changes]


def bounds(**changes: float) -> Autoscaling:
    return replace_bounds(**{"downscale_delay_s": 120, "max_replicas": 10} | changes)


def test_a_burst_is_met_within_its_first_minutes_and_given_back_behind_it() -> None:
    run = Simulated(bounds(), lambda now: 3.5 if 300 <= now < 1500 else 0.4, target=1).run(4000)
    up = [(now, target) for now, target in run.changes if now < 1500]
    assert up[0][0] <= 310 and max(target for _, target in up) >= 4
    assert run.target == 1 and run.turns() == 1, run.changes
    assert max(run.targets) <= 8 and run.queue == 0


def test_a_day_of_load_is_followed_with_few_changes() -> None:
    """Sine of one day in six hours between 0.5 and 5.5 replicas' worth."""
    run = Simulated(bounds(), lambda now: 3 + 2.5 * math.sin(2 * math.pi * now / 21600), target=4).run(2 * 21600)
    assert max(run.targets) >= 6 and min(run.targets) == 1
    assert run.turns() <= 8, run.changes
    assert run.worst < 600 and run.queue < 5


@pytest.mark.parametrize("period", [10, 40, 100, 230])
def test_a_load_that_oscillates_faster_than_the_delays_does_not_make_the_pool_oscillate(period: int) -> None:
    run = Simulated(bounds(), lambda now: 3.6 if now % period < period // 2 else 0.4, target=4).run(3600)
    assert len(run.changes) <= 3, run.changes


def test_bounds_hold_whatever_comes() -> None:
    limits = bounds(min_replicas=2, max_replicas=5)
    run = Simulated(limits, lambda now: 40.0 if now < 900 else 0.0, target=3).run(8000)
    assert max(run.targets) == 5 and min(run.targets) == 2 and run.target == 2


def test_when_pictures_come_their_pools_grow_and_only_theirs() -> None:
    """Encoders have queues, decode engines do not; prompts wait only for embeddings."""
    seen = {
        "vision_encoder": encoders(5000, busy=1.0),
        "pool": engines(fleet(P, D, a=prompts(4000, busy=0.1), b=replies(10, running=2)), Lateness(ttft=3.0)),
        "preprocessor": preprocessors(0.1, busy=0.3),
    }
    grown = {name: change(one, one.present) for name, one in seen.items()}
    assert grown == {"vision_encoder": ("1 -> 2", None), "pool": None, "preprocessor": None}
