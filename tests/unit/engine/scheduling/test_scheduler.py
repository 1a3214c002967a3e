"""The scheduler's decisions, one by one."""

from __future__ import annotations

from typing import Any

import pytest

from actors.engine import events as ev
from actors.engine.config import EngineConfig
from actors.engine.plan import StepResult
from actors.engine.scheduling.sequence import SequenceState
from actors.errors import DeadlineExceeded, Overloaded, Unavailable
from actors.types import EngineRole, FinishReason, Grid, MediaKind, MilestoneKind
from tests.unit.engine.engine_requests import EOS, IMAGE, key, span
from tests.unit.engine.scheduling.scheduler_bench import COLOCATED, DECODE, PREFILL, Bench, drawn, slices


def test_prompt_is_cut_to_the_budget_and_sampled_once() -> None:
    bench = Bench()
    bench.submit("a", 40)
    seen = []
    for _ in range(3):
        plan = bench.scheduler.plan(0.0)
        assert plan is not None
        seen += slices(plan)
        bench.finish(plan, drawn(plan))
    assert seen == [(0, 0, 16, False), (0, 16, 16, False), (0, 32, 8, True)]
    assert slices(bench.plan()) == [(0, 40, 1, True)]


def test_decoding_goes_first_and_prompts_share_the_rest() -> None:
    bench = Bench()
    bench.submit("a", 3)
    bench.step()
    bench.submit("b", 30)
    bench.submit("c", 5)
    assert slices(bench.plan()) == [(0, 3, 1, True), (1, 0, 10, False), (2, 0, 5, True)]


def test_blocks_are_told_once_and_in_order() -> None:
    bench = Bench()
    sequence = bench.submit("a", 7)
    told: list[int] = []
    for _ in range(6):
        plan = bench.plan()
        assert plan is not None
        told += plan.slices[0].new_blocks
        assert told == sequence.blocks
        bench.finish(plan, drawn(plan))
    assert len(told) == 3


def test_head_of_queue_is_not_overtaken() -> None:
    bench = Bench(blocks=10)
    bench.submit("running", 20)
    bench.step()
    bench.submit("large", 30)
    bench.submit("small", 1)
    bench.step()
    assert [s.key for s in bench.scheduler.roster.by_key.values() if s.state is SequenceState.WAITING] == [
        key("large"),
        key("small"),
    ]
    bench.scheduler.cancel(key("running"))
    assert slices(bench.plan()) == [(1, 0, 15, False), (2, 0, 1, True)]


def test_order_is_arrival_less_what_priority_is_worth_then_submission() -> None:
    bench = Bench(max_num_seqs=1)
    bench.submit("late", 1, arrival_s=5.0)
    bench.submit("early", 1, arrival_s=1.0)
    bench.submit("urgent", 1, arrival_s=9.0, priority=1)
    bench.submit("overdue", 1, arrival_s=69.0, priority=1)
    bench.submit("early too", 1, arrival_s=1.0)
    order = []
    while bench.scheduler.roster.by_key:
        order += [token.key for token in bench.step(token=9)]
        bench.scheduler.cancel(order[-1])
    assert order == [key("urgent"), key("early"), key("early too"), key("late"), key("overdue")]


def test_a_sequence_is_admitted_only_if_all_of_it_fits() -> None:
    bench = Bench(blocks=4, max_model_len=16)
    bench.submit("a", 8)
    bench.submit("b", 4)
    bench.step()
    assert bench.scheduler.roster.running == 1
    assert bench.pool.used == 3


def test_full_queue_is_overloaded() -> None:
    bench = Bench(max_waiting=2)
    for name in "abc":
        bench.submit(name, 4)
    error = bench.ended()[key("c")]
    assert isinstance(error, Overloaded)
    assert error.retry_after_s == 1.0
    assert bench.of(ev.Milestone)[-1] == ev.Milestone(key("c"), MilestoneKind.RELEASED, 0.0)


@pytest.mark.parametrize("steps", [0, 1, 4])
def test_deadline_ends_in_every_phase(steps: int) -> None:
    bench = Bench()
    bench.submit("a", 20, deadline=5.0)
    for _ in range(steps):
        bench.step()
    assert bench.scheduler.next_wakeup() == 5.0
    bench.now = 5.0
    bench.plan()
    assert isinstance(bench.ended()[key("a")], DeadlineExceeded)
    assert bench.pool.used == 0
    assert bench.scheduler.next_wakeup() is None


@pytest.mark.parametrize(
    ("sampling", "tokens", "finish"),
    [
        ({"max_tokens": 3}, [9, 9, 9], FinishReason.LENGTH),
        ({"max_tokens": 3}, [9, EOS, 9], None),
        ({"max_tokens": 3, "ignore_eos": False}, [9, EOS], FinishReason.STOP),
        ({"max_tokens": 3, "stop_token_ids": (9,)}, [9], FinishReason.STOP),
        ({"max_tokens": 1, "stop_token_ids": (9,)}, [9], FinishReason.STOP),
        ({"max_tokens": 50}, [9] * 3, None),
    ],
)
def test_finish(sampling: dict[str, Any], tokens: list[int], finish: FinishReason | None) -> None:
    bench = Bench()
    bench.submit("a", 4, **sampling)
    events = [bench.step(token)[0] for token in tokens]
    if finish is None and len(tokens) == sampling["max_tokens"]:
        finish = FinishReason.LENGTH
    assert [event.finish for event in events] == [None] * (len(tokens) - 1) + [finish]
    assert [event.index for event in events] == list(range(len(tokens)))
    assert bool(bench.scheduler.roster.by_key) == (finish is None)


def test_context_bound_finishes_with_length() -> None:
    bench = Bench(max_model_len=10)
    bench.submit("a", 7, max_tokens=100)
    assert [bench.step()[0].finish for _ in range(3)] == [None, None, FinishReason.LENGTH]


def test_resumed_attempt_counts_on() -> None:
    bench = Bench()
    bench.submit("a", 4, outputs=[7, 8], max_tokens=4)
    assert [(event.index, event.finish) for event in bench.step() + bench.step()] == [
        (2, None),
        (3, FinishReason.LENGTH),
    ]


def test_prompt_stops_before_a_missing_embedding() -> None:
    bench = Bench()
    prompt = [5, 5, *[IMAGE] * 4, 5, *[IMAGE] * 4, 5]
    grid = Grid(1, 4, 4)
    media = [span(MediaKind.IMAGE, 2, grid), span(MediaKind.IMAGE, 7, grid)]
    bench.submit("a", 0, prompt=prompt, media=media)
    assert slices(bench.plan()) == [(0, 0, 2, False)]
    assert bench.of(ev.Admitted) == [ev.Admitted(key("a"), 0)]
    bench = Bench()
    bench.submit("a", 0, prompt=prompt, media=media)
    bench.step()
    assert bench.plan() is None
    assert bench.scheduler.add_embedding(key("a"), 1, 0) == 0
    assert bench.plan() is None
    assert bench.scheduler.add_embedding(key("a"), 0, 0) == 0
    assert bench.scheduler.add_embedding(key("a"), 0, 0) is None
    assert [event.index for event in bench.step()] == [0]
    assert bench.of(ev.MediaConsumed) == [ev.MediaConsumed(key("a"), 0, 0), ev.MediaConsumed(key("a"), 1, 0)]


def test_it_tells_of_each_unit_that_a_prompt_waits_for() -> None:
    bench = Bench()
    prompt = [5, 5, *[IMAGE] * 4, *[IMAGE] * 4, 5, *[IMAGE] * 4]
    media = [span(MediaKind.IMAGE, start, Grid(1, 4, 4)) for start in (2, 6, 11)]
    bench.submit("a", 0, prompt=prompt, media=media)
    bench.step()
    assert bench.plan() is None and bench.plan() is None
    assert bench.scheduler.add_embedding(key("a"), 0, 0) == 0
    assert bench.scheduler.add_embedding(key("a"), 1, 0) == 0
    bench.step()
    assert bench.plan() is None
    assert bench.scheduler.add_embedding(key("a"), 2, 0) == 0
    bench.step()
    awaited = [m for m in bench.of(ev.Milestone) if m.kind is MilestoneKind.MEDIA_AWAITED]
    assert awaited == [
        ev.Milestone(key("a"), MilestoneKind.MEDIA_AWAITED, 1.0, 2),
        ev.Milestone(key("a"), MilestoneKind.MEDIA_AWAITED, 1.0, 11),
    ]


def test_others_run_while_one_waits_for_embeddings() -> None:
    bench = Bench()
    media = [span(MediaKind.IMAGE, 0, Grid(1, 4, 4))]
    bench.submit("a", 0, prompt=[IMAGE] * 4, media=media)
    bench.submit("b", 3)
    assert slices(bench.plan()) == [(1, 0, 3, True)]


def test_busy_time_is_shared_by_tokens() -> None:
    bench = Bench()
    bench.submit("a", 1, max_tokens=2)
    bench.submit("b", 3, max_tokens=1)
    tokens = bench.step() + bench.step()
    assert [(token.key, token.busy_s) for token in tokens] == [(key("a"), 0.25), (key("b"), 0.75), (key("a"), 1.0)]
    bench.submit("c", 20)
    bench.step()
    bench.scheduler.cancel(key("c"))
    assert bench.of(ev.Milestone)[-1] == ev.Milestone(key("c"), MilestoneKind.RELEASED, 1.0)


def test_result_must_match_the_plan() -> None:
    bench = Bench()
    bench.submit("a", 3)
    plan = bench.plan()
    assert plan is not None
    with pytest.raises(ValueError, match="not what was planned"):
        bench.scheduler.apply(plan, StepResult(tokens={}), 0.0)


def test_config_names_the_field() -> None:
    with pytest.raises(ValueError, match="max_batched_tokens = 2 is less than max_num_seqs = 4"):
        EngineConfig(role=EngineRole.DECODE, max_model_len=10, max_batched_tokens=2, max_num_seqs=4)
    with pytest.raises(ValueError, match="block_size = 0"):
        EngineConfig(role=EngineRole.DECODE, max_model_len=10, block_size=0)
    with pytest.raises(ValueError, match="priority_step_s = -1"):
        EngineConfig(role=EngineRole.DECODE, max_model_len=10, priority_step_s=-1.0)


def test_prompts_up_to_the_longest_context() -> None:
    bench = Bench(blocks=8192, block_size=16, max_model_len=131072, max_batched_tokens=2048, prefix_caching=True)
    bench.submit("long", 0, prompt=list(range(5, 95)) * 1456, max_tokens=100)
    long = bench.scheduler.roster.by_key[key("long")]
    assert len(long.tokens) == 131040
    steps = 0
    while long.state is not SequenceState.ENDED:
        plan = bench.scheduler.plan(0.0)
        assert plan is not None
        bench.scheduler.apply(plan, drawn(plan), 0.0)
        steps += 1
    assert steps == 64 + 31, "the context ends the reply"
    bench.collect()
    assert bench.pool.cached == (131072 - 1) // 16


def reach(bench: Bench, state: SequenceState) -> None:
    """Brings attempt "a" into a state."""
    mode = {
        SequenceState.EXPECTED: DECODE,
        SequenceState.RECEIVING: DECODE,
        SequenceState.RESERVING: PREFILL,
        SequenceState.HANDED_OVER: PREFILL,
        SequenceState.PINNED: PREFILL,
    }.get(state, COLOCATED)
    bench.submit("a", 5, mode)
    if state is SequenceState.RECEIVING:
        bench.scheduler.reserve(key("a"), 5, 0.0)
    if state not in (SequenceState.WAITING, SequenceState.EXPECTED):
        bench.plan()
    if state in (SequenceState.HANDED_OVER, SequenceState.PINNED):
        bench.scheduler.reserved(key("a"), 0)
        bench.step()
    if state is SequenceState.PINNED:
        bench.scheduler.end(key("a"), Unavailable("lost"))


@pytest.mark.parametrize("state", [state for state in SequenceState if state is not SequenceState.ENDED])
def test_cancel_in_every_state(state: SequenceState) -> None:
    bench = Bench()
    reach(bench, state)
    assert bench.scheduler.roster.by_key[key("a")].state is state
    bench.scheduler.cancel(key("a"))
    bench.scheduler.cancel(key("a"))
    assert len(bench.of(ev.Ended)) == 1
    bench.scheduler.transferred(key("a"))
    assert not bench.scheduler.roster.by_key
    assert bench.pool.used == 0
    assert [m.kind for m in bench.of(ev.Milestone)][-1] is MilestoneKind.RELEASED
    assert bench.of(ev.Milestone).count(bench.events[-1]) == 1
