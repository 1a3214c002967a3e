"""One scheduler, several ranks: where sequences go, what each rank is told, and who waits for whom."""

from __future__ import annotations

import random

import pytest

from actors.engine import events as ev
from actors.engine.plan import RankPlan, StepPlan, StepResult
from actors.engine.scheduling.sequence import SequenceState
from actors.types import SequenceKey
from tests.unit.engine.engine_requests import IMAGE, key
from tests.unit.engine.scheduling.scheduler_bench import COLOCATED, DECODE, PREFILL, Bench, check_progress, drawn

TEXT = list(range(3, 60))


def told(plan: StepPlan | None) -> list[list[tuple[int, int, int]]]:
    """Of each rank: number, first token and count of its slices."""
    assert plan is not None
    return [[(part.id, part.first, part.count) for part in rank.slices] for rank in plan.parts]


def test_prompts_spread_and_each_rank_has_its_own_budget_and_seats() -> None:
    bench = Bench(ranks=2, max_num_seqs=2, max_batched_tokens=8)
    for name in "abcde":
        bench.submit(name, 12)
    plan = bench.plan()
    assert told(plan) == [[(0, 0, 4), (2, 0, 4)], [(1, 0, 4), (3, 0, 4)]]
    assert bench.scheduler.roster.waiting_count == 1
    assert plan is not None
    assert (plan.shape.max_tokens, plan.token_count, plan.shape.decodes) == (8, 16, False)


def test_a_rank_without_slices_has_its_part_all_the_same() -> None:
    bench = Bench(ranks=3)
    bench.submit("a", 5)
    plan = bench.plan()
    assert told(plan) == [[(0, 0, 5)], [], []]
    assert plan is not None
    assert plan.parts[2] == RankPlan(shape=plan.shape, ended=(), new=(), slices=())
    bench.finish(plan, drawn(plan))
    plan = bench.plan()
    assert plan is not None and plan.shape.decodes and plan.shape.max_tokens == 1


@pytest.mark.parametrize(("prompt", "vision"), [([5] * 4, False), ([5, 5, 5, IMAGE], True)])
def test_all_ranks_know_whether_any_has_tokens_for_the_vision_experts(prompt: list[int], vision: bool) -> None:
    bench = Bench(ranks=2, max_batched_tokens=4)
    bench.submit("text", 9)
    bench.submit("shown", 0, prompt=prompt)
    plan = bench.plan()
    assert plan is not None
    assert [part.shape.vision for part in plan.parts] == [vision, vision]
    bench.finish(plan, drawn(plan))
    assert not bench.scheduler.plan(0.0).shape.vision  # type: ignore[union-attr]


def test_the_dead_are_told_to_the_rank_they_lived_on() -> None:
    bench = Bench(ranks=2)
    bench.submit("a", 5)
    bench.submit("b", 5)
    bench.step()
    bench.scheduler.cancel(key("b"))
    plan = bench.plan()
    assert plan is not None and [part.ended for part in plan.parts] == [(), (1,)]
    bench.finish(plan, drawn(plan))
    bench.scheduler.cancel(key("a"))
    plan = bench.plan()
    assert plan is not None and [part.ended for part in plan.parts] == [(0,), ()]
    assert (plan.shape.max_tokens, plan.slices) == (0, ())
    assert bench.plan() is None


def test_a_constraint_of_one_that_never_had_a_rank_is_the_leaders_to_forget() -> None:
    bench = Bench(ranks=2, max_num_seqs=1)
    for name in "abc":
        bench.submit(name, 5, constrained=name == "c")
    assert bench.scheduler.constraint_ready(key("c")) == 2
    bench.scheduler.cancel(key("c"))
    plan = bench.plan()
    assert plan is not None and [part.ended for part in plan.parts] == [(2,), ()]


def test_the_head_is_not_overtaken_where_only_the_others_fit() -> None:
    """Two ranks of 10 blocks: 30 tokens fit on neither, 10 on both."""
    bench = Bench(blocks=10, ranks=2)
    for name in "ab":
        bench.submit(name, 15, max_tokens=100)
    bench.step()
    bench.submit("large", 30)
    bench.submit("small", 10)
    bench.step()
    assert bench.states("large", "small") == [SequenceState.WAITING] * 2
    bench.scheduler.cancel(key("b"))
    plan = bench.plan()
    assert [(part.id, part.first) for part in plan.parts[1].slices] == [(2, 0)]  # type: ignore[union-attr]
    assert bench.states("large", "small") == [SequenceState.RUNNING, SequenceState.RUNNING]


def test_the_head_goes_wherever_there_is_room() -> None:
    bench = Bench(blocks=10, ranks=3)
    for name in "abc":
        bench.submit(name, 20, max_tokens=100)
    bench.step()
    for number, gone in enumerate("bca"):
        bench.scheduler.cancel(key(gone))
        bench.submit(f"next {number}", 30)
        bench.plan()
        assert bench.rank(f"next {number}") == "abc".index(gone)


def test_a_known_prefix_draws_until_the_others_have_much_less_to_do() -> None:
    bench = Bench(ranks=2, blocks=40, max_model_len=160, max_num_seqs=9, max_batched_tokens=200, prefix_caching=True)
    prompt = [3 + n % 90 for n in range(100)]
    bench.submit("first", 0, prompt=prompt, max_tokens=1)
    bench.step()
    ranks = []
    for n in range(4):
        bench.submit(str(n), 0, prompt=[*prompt, 7 + n], max_tokens=100)
        bench.step()
        ranks.append(bench.rank(str(n)))
    assert bench.pools[0].cached + bench.pools[0].used >= 25
    assert ranks == [0, 0, 1, 1]


def test_choices_stay_where_their_prompt_is_while_there_is_room() -> None:
    bench = Bench(ranks=2, max_num_seqs=3, prefix_caching=True, max_batched_tokens=100)
    bench.submit("other", 0, prompt=TEXT[:3])
    ranks = []
    for choice in range(5):
        name = SequenceKey("n", 0, choice)
        bench.submit(name, 0, prompt=TEXT[:18])
        bench.step()
        ranks.append(bench.rank(name))
    assert ranks == [1, 1, 1, 0, 0]
    cached = [event.token_count for event in bench.of(ev.Milestone) if event.key.request_id == "n"]
    assert cached == [0, 16, 16, 0, 16]


def test_a_rank_that_runs_out_of_blocks_preempts_its_own_last_and_the_other_takes_it() -> None:
    bench = Bench(blocks=6, ranks=2, max_model_len=24)
    for name, length in (("a", 9), ("b", 1), ("c", 9), ("d", 1)):
        bench.submit(name, length, max_tokens=100)
    bench.step()
    where = {name: bench.rank(name) for name in "abcd"}
    assert sorted(where.values()) == [0, 0, 1, 1]
    while not bench.of(ev.Preempted):
        bench.step()
    lost = bench.of(ev.Preempted)[0].key.request_id
    home = where[lost]
    assert lost == max(name for name in "abcd" if where[name] == home), "not the last of its rank"
    assert bench.rank(lost) is None
    for name in "abcd":
        if where[name] != home:
            bench.scheduler.cancel(key(name))
    bench.plan()
    assert bench.rank(lost) == 1 - home


def test_a_reservation_names_its_rank() -> None:
    bench = Bench(ranks=2)
    for name in "ab":
        bench.submit(name, 8, DECODE)
        bench.scheduler.reserve(key(name), 8, 0.0)
    bench.plan()
    granted = bench.of(ev.ReservationGranted)
    assert [event.rank for event in granted] == [0, 1]
    assert [event.block_table for event in granted] == [(0, 1, 2)] * 2, "blocks of a rank are its own"
    bench.scheduler.kv_arrived(key("b"), 17, False)
    plan = bench.plan()
    assert told(plan) == [[], [(1, 8, 1)]]
    assert plan is not None and plan.shape.decodes


def test_a_prefill_attempt_keeps_its_rank_until_its_transfer_ends() -> None:
    bench = Bench(ranks=2)
    bench.submit("a", 8, PREFILL)
    bench.submit("b", 8, PREFILL)
    bench.plan()
    for name in "ab":
        bench.scheduler.reserved(key(name), 0)
    bench.step()
    assert [pool.used for pool in bench.pools] == [2, 2]
    bench.scheduler.transferred(key("b"))
    assert [pool.used for pool in bench.pools] == [2, 0]


def test_two_ranks_cannot_sample_for_one_sequence() -> None:
    with pytest.raises(ValueError, match=r"two ranks sampled for \[3\]"):
        StepResult.gathered([StepResult(tokens={1: 5, 3: 5}), StepResult(tokens={3: 5})])


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("seed", range(4))
def test_random_loads_end_once_and_leave_nothing(ranks: int, seed: int) -> None:
    """More than fits at once: each ends exactly once, nobody starves, and no rank idles beside a queue."""
    draw = random.Random(seed)
    bench = Bench(
        blocks=14,
        ranks=ranks,
        max_model_len=40,
        max_num_seqs=3,
        max_waiting=1000,
        max_batched_tokens=9,
        prefix_caching=seed % 2 == 0,
    )
    names = [f"{number}" for number in range(40 * ranks)]
    for number, name in enumerate(names):
        prompt = [*TEXT[: draw.choice([0, 8, 17])], *(draw.randrange(3, 90) for _ in range(draw.randrange(1, 14)))]
        bench.submit(name, 0, COLOCATED, prompt=prompt, max_tokens=draw.randrange(1, 12), arrival_s=float(number))
    finished: list[SequenceKey] = []
    shares = [0] * ranks
    for _ in range(4000):
        if not bench.scheduler.roster.by_key:
            break
        plan = bench.plan()
        check_progress(bench.scheduler, plan)
        assert plan is not None, "nothing to do, and attempts wait"
        for rank, part in zip(bench.scheduler.ranks, plan.parts, strict=True):
            assert part.token_count <= 9
            assert part.slices or not bench.scheduler.roster.queue, f"rank {rank.number} idles beside a queue"
            shares[rank.number] += part.token_count
        finished += [event.key for event in bench.finish(plan, drawn(plan)) if event.finish is not None]
    assert sorted(finished) == sorted(key(name) for name in names)
    assert not bench.ended()
    assert all(pool.free == pool.total for pool in bench.pools)
    assert max(shares) < 1.5 * min(shares)
