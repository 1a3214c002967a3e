"""Who may change its role, and when engines do by themselves: tables, and a clock that only counts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from actors.errors import InvalidRequest, NotFound, Unavailable
from actors.reports import LoadReport
from actors.types import EngineRole
from cluster.config_scaling import RoleMoves, Slo
from cluster.pressure import Lateness, Pressure, lateness, measure
from cluster.registry import EngineEntry, Latency, Percentiles, RouterEntry, Snapshot
from cluster.roles import RoleMover, check_move, find_engine, serving, substitutes
from tests.unit.cluster.test_registry import engine

P, D, C = EngineRole.PREFILL, EngineRole.DECODE, EngineRole.COLOCATED
CONFIG = RoleMoves(queued_tokens=1000, kv_use=0.5, idle=0.4, hold_s=5, cooldown_s=20)
IDLE = LoadReport(step=0, running=0, waiting=0, free_blocks=100, total_blocks=100, block_size=16, queued_tokens=0)


def fleet(*roles: EngineRole, **loads: LoadReport) -> list[EngineEntry]:
    """Engines a, b, c ... with loads by name."""
    names = "abcdefgh"[: len(roles)]
    return [
        replace(engine(name, role), pool="pool", load=loads.get(name, IDLE))
        for name, role in zip(names, roles, strict=True)
    ]


def seen(engines: list[EngineEntry]) -> Snapshot:
    return Snapshot(term=1, version=1, engines=tuple(engines))


def queue(tokens: int) -> LoadReport:
    return replace(IDLE, queued_tokens=tokens)


def used(blocks: int, **changes: int) -> LoadReport:
    return replace(IDLE, free_blocks=100 - blocks, **changes)


@pytest.mark.parametrize(
    ("roles", "without", "alone"),
    [
        ((P, D), "a", ""),
        ((P, D, D), "b", "ac"),
        ((P, D, D), "a", ""),
        ((P, P, D), "a", "bc"),
        ((C, C), "a", "b"),
        ((C, P), "b", "a"),
        ((C, P), "a", ""),
        ((C, D), "a", ""),
        ((P,), "a", ""),
    ],
)
def test_an_engine_goes_only_where_the_others_do_without_it(
    roles: tuple[EngineRole, ...], without: str, alone: str
) -> None:
    assert substitutes(fleet(*roles), without) == tuple(alone)


def test_engines_that_are_away_are_nobodys_substitutes() -> None:
    engines = fleet(P, P, D, D)
    assert check_move(engines, engines[0], D, ()) == ("b", "c", "d")
    for away in ([engines[0], replace(engines[1], ready=False), *engines[2:]],):
        with pytest.raises(Unavailable) as refused:
            check_move(away, away[0], D, ())
        assert refused.value.reason == "LAST_OF_ROLE"
    leaving = [engines[0], replace(engines[1], load=replace(IDLE, draining=True)), *engines[2:]]
    with pytest.raises(Unavailable, match="cannot prefill and decode without it"):
        check_move(leaving, leaving[0], D, ())
    with pytest.raises(Unavailable, match="cannot prefill and decode without it"):
        check_move(engines, engines[0], D, ("b",))
    for mover, moving in ((leaving[1], ()), (engines[1], ("b",))):
        with pytest.raises(Unavailable) as refused:
            check_move(leaving if not moving else engines, mover, D, moving)
        assert refused.value.reason == "ROLE_BUSY"
    assert [entry.info.incarnation for entry in serving(leaving, ("c",))] == ["a", "d"]


def test_engines_that_cannot_exchange_kv_are_no_pair() -> None:
    engines = fleet(P, D, P, D)
    other = [replace(entry, info=replace(entry.info, block_size=256)) for entry in engines[2:]]
    assert substitutes([*engines[:2], other[1]], "c") == ("a", "b", "d")
    assert substitutes([engines[0], other[1]], "x") == ()
    assert substitutes([*engines[:1], *other], "a") == ("c", "d")


def test_an_engine_goes_where_nothing_can_be_answered_without_its_going() -> None:
    engines = fleet(P, P)
    assert check_move(engines, engines[0], D, ()) == ("a", "b")
    alone = fleet(P)
    assert check_move(alone, alone[0], C, ()) == ("a",)
    with pytest.raises(Unavailable):
        check_move(alone, alone[0], D, ())


def test_an_engine_is_found_by_a_part_of_its_id() -> None:
    engines = fleet(P, D)
    first = engines[0].info.engine_id
    assert find_engine(engines, first) is engines[0]
    with pytest.raises(NotFound, match="'x' is not known; there are"):
        find_engine(engines, "x")
    with pytest.raises(NotFound):
        find_engine(engines, "")
    twins = [replace(entry, info=replace(entry.info, engine_id=f"engine-{n}")) for n, entry in enumerate(engines)]
    with pytest.raises(InvalidRequest, match="'engine' could be engine-0, engine-1"):
        find_engine(twins, "engine")
    assert find_engine(twins, "1") is twins[1]


def test_pressure_is_a_mean_over_those_who_do_the_work() -> None:
    assert measure([], CONFIG) == Pressure(prefill=0, decode=0)
    assert measure(fleet(P, P, a=queue(3000)), CONFIG) == Pressure(prefill=1.5, decode=0)
    assert measure(fleet(D, D, a=used(50)), CONFIG) == Pressure(prefill=0, decode=0.5)
    assert measure(fleet(D, a=used(1, waiting=1)), CONFIG).decode == 1
    assert measure(fleet(C, a=used(50, queued_tokens=500)), CONFIG) == Pressure(prefill=0.5, decode=1)


def moves(mover: RoleMover, engines: list[EngineEntry], seconds: range, moving: tuple[str, ...] = ()) -> list[str]:
    decided = [(now, mover.decide(seen(engines), "pool", float(now), moving)) for now in seconds]
    return [f"{now} {move.mover.info.incarnation} {move.role}" for now, move in decided if move is not None]


def test_a_short_kind_of_work_gets_an_engine_once_it_has_lasted() -> None:
    busy = fleet(P, D, D, a=queue(5000), b=used(10, running=1))
    assert moves(RoleMover(CONFIG), busy, range(12)) == ["5 c prefill"]
    full = fleet(P, P, D, a=queue(100), c=used(80))
    assert moves(RoleMover(CONFIG), full, range(12)) == ["5 b decode"]


def test_nothing_moves_while_both_are_busy_or_neither_or_one_alone_is_left() -> None:
    for engines in (
        fleet(P, P, D, D, a=queue(5000), b=queue(5000), c=used(60), d=used(60)),
        fleet(P, P, D, D, a=queue(500)),
        fleet(P, D, a=queue(5000)),
        fleet(P, C, a=queue(9000)),
        [],
    ):
        assert moves(RoleMover(CONFIG), engines, range(60)) == []


def test_a_shortage_that_comes_and_goes_moves_nobody() -> None:
    mover = RoleMover(CONFIG)
    busy, calm = fleet(P, D, D, a=queue(5000)), fleet(P, D, D)
    for now in range(60):
        assert mover.decide(seen(busy if now % 5 < 4 else calm), "pool", float(now), ()) is None


def test_moves_are_apart_and_none_begins_beside_another() -> None:
    mover = RoleMover(CONFIG)
    busy = fleet(P, D, D, D, a=queue(5000))
    assert moves(mover, busy, range(10)) == ["5 b prefill"]
    assert moves(mover, busy, range(10, 40), moving=("b",)) == []
    busy = fleet(P, P, D, D, a=queue(5000))
    assert moves(mover, busy, range(40, 50)) == ["40 c prefill"]
    assert moves(mover, busy, range(50, 60)) == []


def test_only_engines_of_the_pool_move_but_all_count() -> None:
    engines = fleet(P, D, D, a=queue(5000))
    others = [replace(entry, pool="other") if entry.info.incarnation == "c" else entry for entry in engines]
    assert moves(RoleMover(CONFIG), others, range(12)) == ["5 b prefill"]


def test_a_day_of_load_settles_on_each_side() -> None:
    """Prompts in the morning, long replies in the evening: each shift moves whoever can go, and then nobody."""
    mover, roles, told = RoleMover(CONFIG), [P, P, D, D], []
    for now in range(600):
        morning = now < 300
        busy = queue(4000) if morning else queue(0)
        full = used(5) if morning else used(90)
        names = "abcd"
        loads = {name: busy if role is P else full for name, role in zip(names, roles, strict=True)}
        move = mover.decide(seen(fleet(*roles, **loads)), "pool", float(now), ())
        if move is not None:
            roles[names.index(move.mover.info.incarnation)] = move.role
            told.append((now, move.role))
    assert [role for _, role in told] == [P, D, D]
    assert roles.count(P) == 1


SLO = Slo(ttft_s=2.0, tpot_s=0.1)


def late(ttft_s: float | None = None, tpot_s: float | None = None) -> RouterEntry:
    """A router whose slowest requests of the last minute waited so long."""
    ttft, tpot = (
        None if seconds is None else Percentiles(p50=seconds / 10, p95=seconds, p99=9 * seconds)
        for seconds in (ttft_s, tpot_s)
    )
    return RouterEntry(incarnation="r", latency=Latency(window_s=60.0, count=9, ttft_s=ttft, tpot_s=tpot))


def test_lateness_is_of_95_in_100_and_of_the_router_that_has_most() -> None:
    assert lateness([late(3.0, 0.05), late(1.0, 0.2), RouterEntry(incarnation="new")], SLO) == Lateness(
        ttft=1.5, tpot=2.0
    )
    assert lateness([late(3.0)], Slo()) == Lateness()
    assert lateness([late(3.0)], SLO, changed_s_ago=59.0) == Lateness(), "it was partly measured before the change"
    assert lateness([], SLO) == Lateness()


@pytest.mark.parametrize(
    ("engines", "router", "pressure"),
    [
        (fleet(P, D, a=replace(IDLE, prefill_busy=1.0)), late(ttft_s=3.0), (1.5, 0.0)),
        (fleet(P, D, a=replace(IDLE, prefill_busy=0.25)), late(ttft_s=3.0), (0.5, 0.0)),
        (fleet(P, D), late(ttft_s=3.0), (0.0, 0.0)),
        (fleet(P, D, b=used(0, running=2)), late(tpot_s=0.15), (0.0, 1.5)),
        (fleet(P, D, b=used(0, running=1)), late(tpot_s=0.15), (0.0, 0.0)),
        (fleet(P, D, a=queue(3000)), late(ttft_s=1.0, tpot_s=0.01), (3.0, 0.0)),
    ],
)
def test_late_answers_are_pressure_where_engines_are_why(
    engines: list[EngineEntry], router: RouterEntry, pressure: tuple[float, float]
) -> None:
    found = measure(engines, CONFIG, lateness([router], SLO))
    assert (found.prefill, found.decode) == pytest.approx(pressure)


@pytest.mark.parametrize(
    ("engines", "router", "moved"),
    [
        (fleet(P, D, D, a=replace(IDLE, prefill_busy=1.0)), late(ttft_s=3.0), ["5 b prefill"]),
        (fleet(P, P, D, c=used(10, running=4)), late(tpot_s=0.15), ["5 a decode"]),
        (fleet(P, P, D, c=used(10, running=4)), late(ttft_s=3.0, tpot_s=0.09), []),
        (fleet(P, D, D, a=replace(IDLE, prefill_busy=1.0), b=used(0, running=9)), late(3.0, 0.15), []),
    ],
)
def test_engines_move_to_the_work_that_is_late(
    engines: list[EngineEntry], router: RouterEntry, moved: list[str]
) -> None:
    mover = RoleMover(CONFIG, SLO)
    found = []
    for now in range(60):
        snapshot = replace(seen(engines), routers=(router,))
        move = mover.decide(snapshot, "pool", float(now), ())
        found += [f"{now} {move.mover.info.incarnation} {move.role}"] if move is not None else []
    assert found == moved, "once: what was measured before says nothing of the time since"
