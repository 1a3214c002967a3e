"""Attempts that two engines share: reservations, chunks and their ends."""

from __future__ import annotations

import pytest

from actors.engine import events as ev
from actors.engine.plan import ALL_LAYERS, LayerPart
from actors.engine.scheduling.sequence import SequenceState
from actors.errors import RequestCancelled, Unavailable
from actors.types import FinishReason, MilestoneKind, SequenceKey, TokenEvent
from tests.unit.engine.engine_requests import key
from tests.unit.engine.scheduling.scheduler_bench import DECODE, PREFILL, Bench, drawn, slices


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
        ev.ComputedChunk(key=key("a"), rank=0, index=0, first_token=0, token_count=16, block_table=table, last=False),
        ev.ComputedChunk(
            key=key("a"),
            rank=0,
            index=1,
            first_token=16,
            token_count=4,
            block_table=table,
            last=True,
            first_output_id=9,
        ),
    ]
    assert sequence.state is SequenceState.HANDED_OVER
    assert bench.scheduler.roster.running == 0
    bench.scheduler.transferred(key("a"))
    assert bench.of(ev.Ended) == []
    assert bench.pool.used == 0


def test_what_is_in_the_cache_is_handed_over_before_the_step_ends() -> None:
    bench = Bench()
    bench.submit("a", 20, PREFILL)
    bench.plan()
    bench.scheduler.reserved(key("a"), 0)
    bench.submit("b", 2)
    told = []
    for _ in range(2):
        plan = bench.plan()
        assert plan is not None
        for _ in range(2):  # what was told is not told again
            bench.scheduler.hand_over(plan, 0, ALL_LAYERS)
        bench.collect()
        told.append(len(bench.of(ev.ComputedChunk)))
        bench.finish(plan, drawn(plan))
    chunks = [(c.index, c.first_token, c.token_count, c.first_output_id) for c in bench.of(ev.ComputedChunk)]
    assert told == [1, 2]
    assert [chunk[:3] for chunk in chunks] == [(0, 0, 14), (1, 14, 6), (2, 20, 0)]
    assert [chunk[3] for chunk in chunks] == [None, None, 9]
    bench.scheduler.transferred(key("a"))
    assert bench.of(ev.Ended) == []


def test_long_chunks_are_handed_over_in_parts_of_the_layers() -> None:
    bench = Bench(parted_tokens=8)
    for name, tokens in (("a", 20), ("b", 4)):
        bench.submit(name, tokens, PREFILL)
    bench.plan()
    for name in ("a", "b"):
        bench.scheduler.reserved(key(name), 0)
    while (plan := bench.plan()) is not None:
        for index in range(3):
            for _ in range(2):
                bench.scheduler.hand_over(plan, 0, LayerPart(index, 3))
        bench.finish(plan, drawn(plan))
    chunks = bench.of(ev.ComputedChunk)
    told = [
        [(c.index, c.first_token, c.token_count, c.part) for c in chunks if c.key == key(name)] for name in ("a", "b")
    ]
    thirds = [LayerPart(index, 3) for index in range(3)]
    assert told[0] == [
        *((index, 0, 12, part) for index, part in enumerate(thirds)),
        *((3 + index, 12, 8, part) for index, part in enumerate(thirds)),
        (6, 20, 0, ALL_LAYERS),
    ]
    assert told[1] == [(0, 0, 4, ALL_LAYERS), (1, 4, 0, ALL_LAYERS)]


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
    assert bool(bench.pool.used) == bool(chunks) != bool(released)
    bench.scheduler.transferred(key("a"))
    bench.scheduler.transferred(key("a"))
    bench.collect()
    assert bench.pool.used == 0
    assert len([m for m in bench.of(ev.Milestone) if m.kind is MilestoneKind.RELEASED]) == 1


def test_decode_reserves_prompt_and_margin_then_generates_from_index_1() -> None:
    bench = Bench()
    sequence = bench.submit("a", 8, DECODE, max_tokens=3)
    assert bench.plan() is None
    bench.scheduler.reserve(key("a"), 8, 0.0)
    bench.plan()
    assert bench.of(ev.ReservationGranted) == [ev.ReservationGranted(key("a"), 0, tuple(sequence.blocks), 0)]
    assert len(sequence.blocks) == 3
    assert bench.plan() is None
    bench.scheduler.kv_arrived(key("a"), 17, False)
    plan = bench.plan()
    assert plan is not None
    assert plan.parts[0].new[0].token_ids == (*[5] * 8, 17)
    assert slices(plan) == [(0, 8, 1, True)]
    tokens = bench.finish(plan, drawn(plan)) + bench.step()
    assert [(token.index, token.finish) for token in tokens] == [(1, None), (2, FinishReason.LENGTH)]
    assert [m.kind for m in bench.of(ev.Milestone)] == [MilestoneKind.RELEASED]


def test_decode_frees_a_reservation_whose_reply_is_over() -> None:
    bench = Bench()
    bench.submit("a", 8, DECODE)
    bench.scheduler.reserve(key("a"), 8, 0.0)
    bench.plan()
    bench.scheduler.kv_arrived(key("a"), 17, True)
    assert bench.of(ev.Ended) == bench.of(ev.ReservationDropped) == []
    assert bench.pool.used == 0


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
