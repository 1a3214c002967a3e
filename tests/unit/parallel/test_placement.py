from __future__ import annotations

import random

import pytest

from actors.parallel.layout import ExpertLayout, ExpertPlacement, even_layout
from actors.parallel.placement import ExpertMemory, PlacementPlan, plan_layers, plan_placement, skew


def memory(*room: int) -> ExpertMemory:
    return ExpertMemory(text_expert=3, vision_expert=1, room=room)


ROOMY = memory(1000, 1000)


def work(load: list[int], layout: ExpertLayout) -> list[tuple[int, int]]:
    """(text, vision) of each rank."""
    experts = layout.num_experts
    return [
        (sum(3 * load[e] for e in text), sum(load[experts + e] for e in vision))
        for text, vision in zip(layout.text, layout.vision, strict=True)
    ]


def cost(load: list[int], layout: ExpertLayout) -> int:
    found = work(load, layout)
    return max(text for text, _ in found) + max(vision for _, vision in found)


def exchange(load: list[int], layout: ExpertLayout, least_gain: float = 0.0) -> PlacementPlan:
    room = memory(*([10**9] * layout.ranks))
    return plan_placement(load, layout.ranks, room, present=layout, least_gain=least_gain, exchange_only=True)


@pytest.mark.parametrize(
    ("load", "text"),
    [
        ([9, 9, 1, 1, 0, 0, 0, 0], {(18 + 2) // 2 * 3}),
        ([8, 4, 2, 2, 0, 0, 0, 0], {30, 18}),
        ([5, 5, 5, 5, 0, 0, 0, 0], {30}),
    ],
    ids=["two busy together", "one busier than all others", "even already"],
)
def test_text_alone(load: list[int], text: set[int]) -> None:
    plan = exchange(load, even_layout(4, 2))
    assert {rank[0] for rank in work(load, plan.layout)} == text


def test_each_bank_is_even_by_itself() -> None:
    """Rank 0 has all work of text and rank 1 all of vision: even in all, and half idle in every step of text alone."""
    load = [2, 2, 0, 0, 0, 0, 6, 6]
    plan = exchange(load, even_layout(4, 2))
    assert work(load, plan.layout) == [(6, 6), (6, 6)]
    assert len(plan.moved) == 4 and plan.cost_before == 1.0 and plan.cost == 0.5


def test_a_vision_expert_costs_a_third() -> None:
    """The same rows in both banks: a swap of two saves 30 of 80 in text and 10 of 80 in vision."""
    layout, load = even_layout(4, 2), [10, 10, 0, 0, 10, 10, 0, 0]
    both, text, none = (exchange(load, layout, least_gain) for least_gain in (0.05, 0.1, 0.2))
    assert (len(both.moved), text.moved, none.moved) == (4, (0, 2), ())


def test_skew_of_each_bank() -> None:
    assert skew([1, 0, 0, 0, 0, 0, 0, 3], even_layout(4, 2)) == (2.0, 2.0)
    assert skew([2, 1, 2, 1, 0, 0, 0, 0], even_layout(4, 2)) == (1.0, 1.0)


def test_a_small_gain_moves_nothing_and_a_large_one_only_what_it_takes() -> None:
    load = [100, 96, 50, 50, 0, 0, 0, 0]
    layout = even_layout(4, 2)
    assert exchange(load, layout).moved != ()
    nearly_even = [51, 50, 50, 50, 0, 0, 0, 0]
    assert exchange(nearly_even, layout, least_gain=0.05).layout == layout
    one_swap = exchange([90, 80, 10, 10, 31, 30, 30, 29], layout, least_gain=0.02)
    assert len(one_swap.moved) == 2, "the vision experts are nearly even and stay"
    assert all(expert < 4 for expert in one_swap.moved)


def test_those_who_stay_keep_their_place() -> None:
    layout = ExpertLayout(text=((3, 0), (1, 2)), vision=((0, 1), (2, 3)))
    plan = exchange([9, 1, 1, 9, 0, 0, 0, 0], layout)
    assert plan.layout.vision == layout.vision
    stayed = [
        (before, after)
        for before, after in zip(sum(layout.text, ()), sum(plan.layout.text, ()), strict=True)
        if before == after
    ]
    assert len(plan.moved) == len(stayed) == 2


def test_experts_move_alone_only_where_there_is_room() -> None:
    """Three busy experts on rank 0 and nothing to do on rank 1."""
    load = [4, 4, 4, 0, 0, 0]
    layout = ExpertLayout(text=((0, 1, 2), ()), vision=((0, 1, 2), ()))
    assert plan_placement(load, 2, memory(12, 2), present=layout).layout.text == layout.text
    roomy = plan_placement(load, 2, memory(12, 3), present=layout)
    assert sorted(map(len, roomy.layout.text)) == [1, 2]
    assert plan_placement(load, 2, memory(12, 3), present=layout, exchange_only=True).layout == layout


def test_without_a_present_layout_the_load_decides_alone() -> None:
    load = [8, 8, 1, 1, 0, 0, 0, 0]
    plan = plan_placement(load, 2, ROOMY, least_gain=1.0)
    assert {text for text, _ in work(load, plan.layout)} == {27}
    assert plan_placement([0] * 8, 2, ROOMY).layout == even_layout(4, 2)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        plan_placement([1] * 8, 2, memory(8, 7))
    assert plan_placement([1] * 8, 2, memory(12, 4)).layout.ranks == 2
    with pytest.raises(ValueError, match="present layout takes"):
        plan_placement([1] * 8, 2, memory(7, 100), present=even_layout(4, 2))
    with pytest.raises(ValueError, match="not that of this load"):
        plan_placement([1] * 8, 2, ROOMY, present=even_layout(6, 2))
    with pytest.raises(ValueError, match="group of 3"):
        plan_placement([1] * 8, 3, ROOMY)


def random_layout(rng: random.Random, experts: int, ranks: int) -> ExpertLayout:
    def bank() -> tuple[tuple[int, ...], ...]:
        owners = [rng.randrange(ranks) for _ in range(experts)]
        order = rng.sample(range(experts), experts)
        return tuple(tuple(e for e in order if owners[e] == rank) for rank in range(ranks))

    return ExpertLayout(text=bank(), vision=bank())


@pytest.mark.parametrize("seed", range(120))
def test_any_load(seed: int) -> None:
    rng = random.Random(seed)
    experts, ranks = rng.choice([4, 8, 13]), rng.choice([1, 2, 3, 4])
    present = random_layout(rng, experts, ranks)
    room = memory(*(used + rng.randrange(8) for used in ROOMY.used(present)))
    load = [int(rng.paretovariate(1.0)) * rng.randrange(2) for _ in range(2 * experts)]
    exchange_only, least_gain = rng.random() < 0.5, rng.choice([0.0, 0.01, 0.1])
    options = {"present": present, "least_gain": least_gain, "exchange_only": exchange_only}
    plan = plan_placement(load, ranks, room, **options)
    assert plan == plan_placement(load, ranks, room, **options), "the same question has one answer"
    assert all(used <= most for used, most in zip(room.used(plan.layout), room.room, strict=True))
    before, after = cost(load, present), cost(load, plan.layout)
    assert after < before or plan.layout == present
    assert before - after >= least_gain * before * len(plan.moved) - 1e-6
    if sum(load):
        whole = sum(map(sum, work(load, present)))
        assert plan.cost == pytest.approx(after / whole) and plan.cost_before == pytest.approx(before / whole)
    if exchange_only:
        for held, wanted in ((present.text, plan.layout.text), (present.vision, plan.layout.vision)):
            assert list(map(len, held)) == list(map(len, wanted))
    moved = {e for e in range(2 * experts) if present.places()[e][0] != plan.layout.places()[e][0]}
    assert set(plan.moved) == moved
    free = plan_placement(load, ranks, memory(*([10**9] * ranks)))
    assert cost(load, free.layout) <= cost(load, even_layout(experts, ranks))


def test_layers_are_planned_apart() -> None:
    layout = even_layout(4, 2)
    present = ExpertPlacement((None, layout, layout))
    wanted = plan_layers({1: [9, 9, 1, 1, 0, 0, 0, 0]}, present, ROOMY, least_gain=0.0)
    assert wanted.layers[0] is None and wanted.layers[2] == layout
    assert wanted.layout(1) == exchange([9, 9, 1, 1, 0, 0, 0, 0], layout).layout != layout
