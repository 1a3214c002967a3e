"""Roles that are not as they should be: tables, and a clock that only counts."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from actors.types import EngineRole
from cluster.registry import EngineEntry, LoadingEntry, Snapshot, split_roles
from cluster.repair import BROKEN_S, Repair, successor
from tests.unit.cluster.test_roles import IDLE, C, D, P, fleet


def told(move: object) -> str:
    return "" if move is None else f"{move.mover.info.incarnation} {move.role}"  # type: ignore[attr-defined]


def repaired(
    engines: list[EngineEntry],
    wanted: dict[EngineRole, int],
    *,
    seconds: int = 1,
    loading: tuple[LoadingEntry, ...] = (),
    away: tuple[str, ...] = (),
) -> str:
    """What is decided at last if nothing changes for so long."""
    repair = Repair()
    snapshot = Snapshot(term=1, version=1, engines=tuple(engines), loading=loading)
    move = None
    for now in range(seconds):
        move = repair.decide(snapshot, {"pool": wanted}, float(now), away)
    return told(move)


@pytest.mark.parametrize(
    ("roles", "wanted", "move"),
    [
        ((P, P, D), {P: 1, D: 2}, "a decode"),
        ((P, D, D), {P: 2, D: 1}, "b prefill"),
        ((C, P), {P: 1, D: 1}, ""),
        ((C, D), {P: 1, D: 1}, ""),
        ((C, P, D), {P: 2, D: 1}, "a prefill"),
        ((P, D), {P: 1, D: 1}, ""),
        ((P, P, D), {P: 1, D: 1}, ""),
        ((P, P, D), {P: 1, D: 3}, ""),
    ],
)
def test_a_complete_pool_gets_the_roles_that_are_wanted(
    roles: tuple[EngineRole, ...], wanted: dict[EngineRole, int], move: str
) -> None:
    assert repaired(fleet(*roles), wanted) == move


def test_the_least_busy_of_the_role_with_too_many_changes_and_nobody_who_is_away() -> None:
    busy = fleet(P, P, D, a=replace(IDLE, running=3))
    assert repaired(busy, {P: 1, D: 2}) == "b decode"
    assert repaired(busy, {P: 1, D: 2}, away=("b",)) == ""


LIMIT = int(BROKEN_S) + 1


def test_where_nothing_works_for_long_an_engine_takes_the_role_that_is_missing() -> None:
    assert repaired(fleet(P, P), {P: 2, D: 1}, seconds=LIMIT) == "a decode"
    assert repaired(fleet(D), {P: 1, D: 1}, seconds=LIMIT) == "a colocated"
    assert repaired(fleet(P), {P: 1, D: 1}, seconds=LIMIT) == "a colocated"
    assert repaired(fleet(P, P), {P: 2, D: 1}, seconds=LIMIT - 1) == ""
    assert repaired([], {P: 1, D: 1}, seconds=LIMIT) == ""
    on_its_way = (LoadingEntry(pool="pool", role=D),)
    assert repaired(fleet(P, P), {P: 2, D: 1}, seconds=LIMIT, loading=on_its_way) == ""


def test_an_engine_that_helped_out_goes_back_when_others_came() -> None:
    """One that does both because the others died: when all are back, each has what is wanted."""
    assert repaired(fleet(C, P, D), {P: 1, D: 2}) == "a decode"


@pytest.mark.parametrize(
    ("roles", "leaver", "move"),
    [
        ((P, D, D), 0, "b prefill"),
        ((P, P, D), 2, "a decode"),
        ((P, D), 0, ""),
        ((C, P), 0, "b colocated"),
        ((C, P, P), 0, "b decode"),
    ],
)
def test_somebody_takes_over_before_the_last_of_a_role_goes_if_anybody_can(
    roles: tuple[EngineRole, ...], leaver: int, move: str
) -> None:
    engines = fleet(*roles)
    assert told(successor(engines, engines[leaver])) == move


@pytest.mark.parametrize(
    ("configured", "present", "total", "wanted"),
    [
        ({P: 1, D: 1}, {}, 2, {P: 1, D: 1}),
        ({P: 1, D: 1}, {D: 2}, 3, {P: 1, D: 2}),
        ({P: 1, D: 3}, {P: 2, D: 2}, 4, {P: 2, D: 2}),
        ({P: 1, D: 3}, {P: 1, D: 2}, 4, {P: 1, D: 3}),
        ({P: 1, D: 1}, {P: 2, D: 1}, 2, {P: 1, D: 1}),
        ({P: 2, D: 1}, {P: 1, D: 3}, 3, {P: 1, D: 2}),
        ({P: 1}, {C: 1}, 2, {P: 1, C: 1}),
    ],
)
def test_a_planner_that_follows_another_wants_the_roles_there_are(
    configured: dict[EngineRole, int], present: dict[EngineRole, int], total: int, wanted: dict[EngineRole, int]
) -> None:
    assert split_roles(configured, present, total) == Counter(wanted)
