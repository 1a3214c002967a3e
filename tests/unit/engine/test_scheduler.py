"""The scheduler's decisions, one by one."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from actors.engine import events as ev
from actors.engine.block_pool import BlockPool
from actors.engine.config import EngineConfig
from actors.engine.plan import StepPlan
from actors.engine.scheduler import Scheduler
from actors.engine.sequence import Sequence, SequenceState
from actors.errors import DeadlineExceeded, Overloaded, RequestCancelled, Unavailable
from actors.types import (
    AttemptMode,
    EngineRole,
    FinishReason,
    Grid,
    MediaKind,
    MilestoneKind,
    SequenceKey,
    TokenEvent,
)
from tests.unit.engine.harness import EOS, IMAGE, key, request, span

COLOCATED, PREFILL, DECODE = AttemptMode.COLOCATED, AttemptMode.PREFILL, AttemptMode.DECODE


class Bench:
    """A scheduler with a clock set by hand and a runner that always samples token 9."""

    def __init__(self, blocks: int = 20, **changes: Any) -> None:
        fields: dict[str, Any] = {
            "role": EngineRole.COLOCATED,
            "block_size": 4,
            "max_model_len": 60,
            "max_num_seqs": 4,
            "max_batched_tokens": 16,
            "max_waiting": 6,
            "reserve_margin_tokens": 4,
        }
        self.config = EngineConfig(**(fields | changes))
        self.scheduler = Scheduler(self.config, BlockPool(blocks), frozenset({EOS}))
        self.now = 0.0
        self.ids = itertools.count()
        self.events: list[ev.Event] = []

    def submit(self, name: str, length: int, mode: AttemptMode = COLOCATED, **options: Any) -> Sequence:
        options.setdefault("arrival_s", 0.0)
        prompt = options.pop("prompt", None) or [5] * length
        deadline = options.pop("deadline", 1000.0)
        sequence = Sequence(
            id=next(self.ids), key=key(name), request=request(prompt, **options), mode=mode, deadline=deadline
        )
        self.scheduler.submit(sequence, self.now)
        return sequence

    def plan(self) -> StepPlan | None:
        plan = self.scheduler.plan(self.now)
        self.collect()
        return plan

    def step(self, token: int = 9) -> list[TokenEvent]:
        plan = self.plan()
        assert plan is not None, "nothing to do"
        tokens = self.scheduler.apply(plan, {part.id: token for part in plan.slices if part.sample}, 1.0)
        self.collect()
        return tokens

    def collect(self) -> None:
        self.events += self.scheduler.take_events()
        self.scheduler.check_integrity()

    def of(self, kind: type[Any]) -> list[Any]:
        self.collect()
        return [event for event in self.events if isinstance(event, kind)]

    def ended(self) -> dict[SequenceKey, Any]:
        return {event.key: event.error for event in self.of(ev.Ended)}


def slices(plan: StepPlan | None) -> list[tuple[int, int, int, bool]]:
    return [(part.id, part.first, part.count, part.sample) for part in plan.slices] if plan else []


def test_prompt_is_cut_to_the_budget_and_sampled_once() -> None:
    bench = Bench()
    bench.submit("a", 40)
    seen = []
    for _ in range(3):
        plan = bench.scheduler.plan(0.0)
        assert plan is not None
        seen += slices(plan)
        bench.scheduler.apply(plan, {0: 9} if plan.slices[0].sample else {}, 0.0)
    assert seen == [(0, 0, 16, False), (0, 16, 16, False), (0, 32, 8, True)]
    assert slices(bench.plan()) == [(0, 40, 1, True)]


def test_decoding_goes_first_and_prompts_share_the_rest() -> None:
    bench = Bench()
    bench.submit("a", 3)
    bench.step()
    bench.submit("b", 30)
    bench.submit("c", 5)
    assert slices(bench.plan()) == [(0, 3, 1, True), (1, 0, 15, False)]


def test_blocks_are_told_once_and_in_order() -> None:
    bench = Bench()
    sequence = bench.submit("a", 7)
    told: list[int] = []
    for _ in range(6):
        plan = bench.plan()
        assert plan is not None
        told += plan.slices[0].new_blocks
        assert told == sequence.blocks
        bench.scheduler.apply(plan, {0: 9}, 0.0)
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
    assert slices(bench.plan()) == [(1, 0, 16, False)]


def test_order_is_priority_then_arrival_then_submission() -> None:
    bench = Bench(max_num_seqs=1)
    bench.submit("late", 1, arrival_s=5.0)
    bench.submit("early", 1, arrival_s=1.0)
    bench.submit("urgent", 1, arrival_s=9.0, priority=1)
    bench.submit("early too", 1, arrival_s=1.0)
    order = []
    while bench.scheduler.roster.by_key:
        order += [token.key for token in bench.step(token=9)]
        bench.scheduler.cancel(order[-1])
    assert order == [key("urgent"), key("early"), key("early too"), key("late")]


def test_a_sequence_is_admitted_only_if_all_of_it_fits() -> None:
    bench = Bench(blocks=4, max_model_len=16)
    bench.submit("a", 8)
    bench.submit("b", 4)
    bench.step()
    assert bench.scheduler.roster.running_count == 1
    assert bench.scheduler.pool.used == 3


def test_newest_is_preempted_never_the_oldest() -> None:
    bench = Bench(blocks=6, max_model_len=24)
    bench.submit("old", 3, arrival_s=1.0, max_tokens=50)
    bench.submit("middle", 3, arrival_s=2.0, max_tokens=50)
    bench.submit("new", 3, arrival_s=3.0, max_tokens=50)
    preempted = []
    tokens: list[TokenEvent] = []
    while bench.scheduler.roster.by_key:
        tokens += bench.step()
        preempted = [event.key for event in bench.events if isinstance(event, ev.Ended)]
    assert preempted == [key("new"), key("middle")]
    error = bench.ended()[key("new")]
    assert isinstance(error, Unavailable)
    assert (error.reason, error.retry_after_s) == ("PREEMPTED", 1.0)
    last = tokens[-1]
    assert (last.key, last.index, last.finish) == (key("old"), 20, FinishReason.LENGTH)


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
    assert bench.scheduler.pool.used == 0
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
    assert bench.of(ev.Admitted) == [ev.Admitted(key("a"))]
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


def test_others_run_while_one_waits_for_embeddings() -> None:
    bench = Bench()
    media = [span(MediaKind.IMAGE, 0, Grid(1, 4, 4))]
    bench.submit("a", 0, prompt=[IMAGE] * 4, media=media)
    bench.submit("b", 3)
    assert slices(bench.plan()) == [(1, 0, 3, True)]


def test_prefill_reserves_first_and_hands_over_chunk_by_chunk() -> None:
    bench = Bench()
    bench.submit("a", 20, PREFILL)
    bench.submit("b", 2)
    assert slices(bench.plan()) == [(1, 0, 2, True)]
    assert bench.of(ev.ReserveNeeded) == [ev.ReserveNeeded(key("a"), 20)]
    bench = Bench()
    sequence = bench.submit("a", 20, PREFILL)
    assert bench.plan() is None
    bench.scheduler.reserved(key("a"), 0)
    assert bench.step() == []
    assert bench.step() == [TokenEvent(key=key("a"), index=0, token_id=9, busy_s=2.0)]
    table = tuple(sequence.blocks)
    assert len(table) == 5
    assert bench.of(ev.ComputedChunk) == [
        ev.ComputedChunk(key=key("a"), index=0, first_token=0, token_count=16, block_table=table, last=False),
        ev.ComputedChunk(
            key=key("a"), index=1, first_token=16, token_count=4, block_table=table, last=True, first_output_id=9
        ),
    ]
    assert sequence.state is SequenceState.HANDED_OVER
    assert bench.scheduler.roster.running_count == 0
    bench.scheduler.transferred(key("a"))
    assert bench.of(ev.Ended) == []
    assert bench.scheduler.pool.used == 0


def test_tokens_the_peer_holds_are_not_sent() -> None:
    bench = Bench()
    bench.submit("a", 40, PREFILL)
    bench.plan()
    bench.scheduler.reserved(key("a"), 20)
    for _ in range(3):
        bench.step()
    chunks = bench.of(ev.ComputedChunk)
    assert [(c.index, c.first_token, c.token_count, c.last) for c in chunks] == [(0, 20, 12, False), (1, 32, 8, True)]


def test_finished_token_0_is_told_with_the_last_chunk_and_ends_only_once() -> None:
    bench = Bench()
    bench.submit("a", 3, PREFILL, max_tokens=1)
    bench.plan()
    bench.scheduler.reserved(key("a"), 0)
    assert bench.step()[0].finish is FinishReason.LENGTH
    assert bench.of(ev.ComputedChunk)[0].finished
    bench.scheduler.end(key("a"), Unavailable("lost"))
    bench.scheduler.transferred(key("a"))
    assert bench.of(ev.Ended) == []
    assert [m.kind for m in bench.of(ev.Milestone)] == [MilestoneKind.PREFILL_STARTED, MilestoneKind.RELEASED]


def test_refusal_ends_with_its_reason() -> None:
    bench = Bench()
    bench.submit("a", 3, PREFILL)
    bench.plan()
    bench.scheduler.refused(key("a"), "NO_BLOCKS")
    error = bench.ended()[key("a")]
    assert isinstance(error, Unavailable)
    assert error.reason == "NO_BLOCKS"
    assert bench.of(ev.TransferCancelled) == []


@pytest.mark.parametrize("chunks", [0, 1, 2])
def test_cancelled_transfer_pins_blocks_only_after_a_chunk(chunks: int) -> None:
    bench = Bench()
    bench.submit("a", 20, PREFILL)
    bench.plan()
    bench.scheduler.reserved(key("a"), 0)
    for _ in range(chunks):
        bench.step()
    bench.scheduler.cancel(key("a"))
    bench.scheduler.cancel(key("a"))
    assert bench.of(ev.TransferCancelled) == [ev.TransferCancelled(key("a"))]
    assert isinstance(bench.ended()[key("a")], RequestCancelled)
    released = [m for m in bench.of(ev.Milestone) if m.kind is MilestoneKind.RELEASED]
    assert bool(bench.scheduler.pool.used) == bool(chunks) != bool(released)
    bench.scheduler.transferred(key("a"))
    bench.scheduler.transferred(key("a"))
    bench.collect()
    assert bench.scheduler.pool.used == 0
    assert len([m for m in bench.of(ev.Milestone) if m.kind is MilestoneKind.RELEASED]) == 1


def test_decode_reserves_prompt_and_margin_then_generates_from_index_1() -> None:
    bench = Bench()
    sequence = bench.submit("a", 8, DECODE, max_tokens=3)
    assert bench.plan() is None
    bench.scheduler.reserve(key("a"), 8, 0.0)
    bench.plan()
    assert bench.of(ev.ReservationGranted) == [ev.ReservationGranted(key("a"), tuple(sequence.blocks))]
    assert len(sequence.blocks) == 3
    assert bench.plan() is None
    bench.scheduler.kv_arrived(key("a"), 17, False)
    plan = bench.plan()
    assert plan is not None
    assert plan.new[0].token_ids == (*[5] * 8, 17)
    assert slices(plan) == [(0, 8, 1, True)]
    tokens = bench.scheduler.apply(plan, {0: 9}, 0.0) + bench.step()
    assert [(token.index, token.finish) for token in tokens] == [(1, None), (2, FinishReason.LENGTH)]
    assert [m.kind for m in bench.of(ev.Milestone)] == [MilestoneKind.RELEASED]


def test_decode_frees_a_reservation_whose_reply_is_over() -> None:
    bench = Bench()
    bench.submit("a", 8, DECODE)
    bench.scheduler.reserve(key("a"), 8, 0.0)
    bench.plan()
    bench.scheduler.kv_arrived(key("a"), 17, True)
    assert bench.of(ev.Ended) == bench.of(ev.ReservationDropped) == []
    assert bench.scheduler.pool.used == 0


def failures(bench: Bench) -> list[tuple[SequenceKey, str]]:
    return [(event.key, event.reason) for event in bench.of(ev.ReservationFailed)]


def test_reservation_waits_for_blocks_then_fails_with_the_attempt() -> None:
    bench = Bench(blocks=5, max_model_len=20)
    bench.submit("a", 12, DECODE)
    bench.submit("b", 12, DECODE)
    bench.scheduler.reserve(key("a"), 12, 0.0)
    bench.scheduler.reserve(key("b"), 12, 0.0)
    bench.plan()
    assert len(bench.of(ev.ReservationGranted)) == 1
    bench.now = bench.config.reserve_wait_s
    bench.plan()
    assert failures(bench) == [(key("b"), "NO_BLOCKS")]
    assert bench.ended()[key("b")].reason == "NO_BLOCKS"


def test_reservation_may_overtake_its_submit_by_a_second() -> None:
    bench = Bench()
    bench.scheduler.reserve(key("a"), 4, 0.0)
    bench.scheduler.reserve(key("b"), 4, 0.0)
    assert bench.scheduler.next_wakeup() == 1.0
    bench.now = 0.5
    bench.submit("a", 4, DECODE)
    bench.now = 1.0
    bench.plan()
    assert [event.key for event in bench.of(ev.ReservationGranted)] == [key("a")]
    assert failures(bench) == [(key("b"), "UNKNOWN")]


def test_reservation_failures() -> None:
    bench = Bench()
    bench.submit("a", 4, DECODE)
    bench.scheduler.reserve(key("a"), 5, 0.0)
    assert failures(bench) == [(key("a"), "MISMATCH")]
    bench.scheduler.reserve(key("a"), 4, 0.0)
    bench.plan()
    bench.scheduler.reserve(key("a"), 4, 0.0)
    assert failures(bench)[1:] == [(key("a"), "DUPLICATE")]
    bench.scheduler.reserve(key("later"), 4, 0.0)
    bench.scheduler.cancel(key("later"))
    assert failures(bench)[2:] == [(key("later"), "ENDED")]


def test_newest_reservation_makes_way_for_an_older_reply() -> None:
    bench = Bench(blocks=6, max_model_len=24)
    bench.submit("old", 8, max_tokens=20)
    bench.step()
    bench.submit("new", 4, DECODE)
    bench.scheduler.reserve(key("new"), 4, 0.0)
    while not bench.ended():
        bench.step()
    assert bench.ended()[key("new")].reason == "PREEMPTED"
    assert bench.of(ev.ReservationDropped) == [ev.ReservationDropped(key("new"))]
    bench.scheduler.kv_arrived(key("new"), 9, False)
    bench.step()


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
        bench.scheduler.apply(plan, {}, 0.0)


def test_config_names_the_field() -> None:
    with pytest.raises(ValueError, match="max_batched_tokens = 2 is less than max_num_seqs = 4"):
        EngineConfig(role=EngineRole.DECODE, max_model_len=10, max_batched_tokens=2, max_num_seqs=4)
    with pytest.raises(ValueError, match="block_size = 0"):
        EngineConfig(role=EngineRole.DECODE, max_model_len=10, block_size=0)
