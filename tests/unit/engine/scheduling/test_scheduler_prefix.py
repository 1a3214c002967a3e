"""What the prefix cache saves, and what must be computed, sent and told nevertheless."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from actors.engine import events as ev
from actors.engine.plan import StepResult
from actors.engine.scheduling.block_hash import hash_blocks
from actors.engine.scheduling.prefix import READ_BLOCKS
from actors.engine.scheduling.sequence import SequenceState
from actors.types import AttemptMode, Grid, MediaKind, MediaSpan, MilestoneKind
from tests.unit.engine.engine_requests import IMAGE, key, span
from tests.unit.engine.scheduling.scheduler_bench import (
    COLOCATED,
    DECODE,
    PREFILL,
    Bench,
    drawn,
    identity,
    score,
    slices,
)

TEXT = list(range(10, 40))


def warm(bench: Bench, prompt: list[int]) -> None:
    """A sequence that computes a prompt, and a token, and is gone."""
    bench.submit("warm", 0, prompt=prompt, max_tokens=1)
    while bench.scheduler.roster.by_key:
        plan = bench.plan()
        assert plan is not None
        bench.finish(plan, drawn(plan))
    bench.events.clear()


def cold_bench(**options: Any) -> Bench:
    return Bench(**({"prefix_caching": True} | options))


def test_computing_starts_after_the_longest_known_prefix() -> None:
    bench = cold_bench()
    warm(bench, TEXT[:13])
    assert bench.pool.cached == 3
    sequence = bench.submit("a", 0, prompt=[*TEXT[:9], 77, 78])
    plan = bench.plan()
    assert slices(plan) == [(sequence.id, 8, 3, True)]
    assert plan is not None
    assert plan.parts[0].new[0].token_ids == (*TEXT[:9], 77, 78)
    assert plan.slices[0].new_blocks == tuple(sequence.blocks)
    assert len(sequence.blocks) == 3
    started = ev.Milestone(key("a"), MilestoneKind.PREFILL_STARTED, 0.0, 8)
    assert bench.of(ev.Milestone) == [started]
    prefix = bench.scheduler.ranks[0].prefix
    assert (prefix.queried_tokens, prefix.hit_tokens) == (13 + 11, 8)


@pytest.mark.parametrize(("length", "hit"), [(4, 0), (5, 4), (8, 4), (9, 8), (12, 8), (13, 12)])
def test_the_last_token_is_always_computed(length: int, hit: int) -> None:
    bench = cold_bench()
    warm(bench, TEXT[:20])
    sequence = bench.submit("a", 0, prompt=TEXT[:length])
    assert slices(bench.plan()) == [(sequence.id, hit, length - hit, True)]


def test_sequences_that_run_share_blocks() -> None:
    bench = cold_bench()
    first = bench.submit("a", 0, prompt=TEXT[:14])
    bench.step()
    second = bench.submit("b", 0, prompt=TEXT[:14])
    bench.step()
    assert second.blocks[:3] == first.blocks[:3]
    assert not set(second.blocks[3:]) & set(first.blocks)
    bench.scheduler.cancel(key("a"))
    bench.step()
    bench.scheduler.cancel(key("b"))
    bench.collect()
    assert bench.pool.used == 0


def test_blocks_are_found_only_once_they_are_computed() -> None:
    bench = cold_bench(max_batched_tokens=8)
    bench.submit("a", 0, prompt=TEXT[:20])
    bench.submit("b", 0, prompt=TEXT[:20], arrival_s=1.0)
    plan = bench.plan()
    assert slices(plan) == [(0, 0, 4, False), (1, 0, 4, False)]
    assert not bench.pool.peek(bench.scheduler.roster.by_key[key("a")].hasher.hashes).blocks  # type: ignore[union-attr]


def test_replies_can_be_found_too() -> None:
    bench = cold_bench()
    bench.submit("warm", 0, prompt=TEXT[:6], max_tokens=9)
    while bench.scheduler.roster.by_key:
        bench.step()
    sequence = bench.submit("next turn", 0, prompt=[*TEXT[:6], *[9] * 9, 50, 51])
    plan = bench.plan()
    # 6 + 8 tokens were computed: the ninth was drawn, but never went in.
    assert slices(plan) == [(sequence.id, 12, 5, True)]


def test_off_means_off() -> None:
    bench = cold_bench(prefix_caching=False)
    warm(bench, TEXT[:13])
    sequence = bench.submit("a", 0, prompt=TEXT[:13])
    assert slices(bench.plan()) == [(sequence.id, 0, 13, True)]
    assert bench.pool.cached == 0
    assert bench.scheduler.ranks[0].prefix.queried_tokens == 0


def test_prompt_logprobs_need_every_token() -> None:
    bench = cold_bench()
    warm(bench, TEXT[:13])
    sequence = bench.submit("a", 0, prompt=TEXT[:13], prompt_logprobs=2)
    assert slices(bench.plan()) == [(sequence.id, 0, 13, True)]
    assert bench.scheduler.ranks[0].prefix.queried_tokens == 13, "the warm one's"


def test_after_they_were_told_a_preempted_sequence_may_find_its_blocks() -> None:
    bench = cold_bench()
    sequence = bench.submit("a", 0, prompt=TEXT[:13], prompt_logprobs=2, max_tokens=5)
    bench.submit("first", 1, arrival_s=-1.0)
    plan = bench.plan()
    assert plan is not None
    entries = (None, *(score(token) for token in TEXT[1:13]))
    bench.finish(plan, StepResult(tokens=drawn(plan).tokens, prompt_logprobs={sequence.id: entries}))
    bench.scheduler._preempt(sequence)
    assert (sequence.id, 12, 2, True) in slices(bench.plan())


def test_a_preempted_sequence_finds_what_was_not_evicted() -> None:
    bench = cold_bench(blocks=7, max_model_len=28)
    old = bench.submit("old", 0, prompt=TEXT[:7], arrival_s=1.0, max_tokens=12)
    victim = bench.submit("victim", 0, prompt=[50, *TEXT[:7]], arrival_s=2.0, max_tokens=17)
    while not bench.of(ev.Preempted):
        bench.step()
    while bench.scheduler.roster.by_key.get(key("old")) is old:
        bench.step()
    while victim.state is SequenceState.WAITING:
        bench.plan()
    assert victim.cached_tokens >= 8
    while bench.scheduler.roster.by_key:
        bench.step()
    assert bench.scheduler.ranks[0].prefix.queried_tokens == 15, "coming back is no new question"


# Media


def album(changed: tuple[int, int] | None = None) -> tuple[list[int], list[MediaSpan]]:
    """2 + 4 + 4 + 4 + 1 + 4 + 3 tokens: a video of three pairs at 2, an image at 15. Blocks are of 4.

    The unit named by ``changed`` is another picture of the same size.
    """
    grids = (Grid(6, 4, 4), Grid(1, 4, 4))
    prompt = [5, 6, *[IMAGE] * grids[0].tokens, 7, *[IMAGE] * grids[1].tokens, 8, 9, 10]
    media = [span(MediaKind.VIDEO, 2, grids[0]), span(MediaKind.IMAGE, 15, grids[1])]
    if changed is not None:
        keys = list(media[changed[0]].embedding_keys)
        keys[changed[1]] = b"another".ljust(32)
        media[changed[0]] = replace(media[changed[0]], embedding_keys=tuple(keys))
    return prompt, media


def give_all(bench: Bench, name: str) -> None:
    for unit in bench.scheduler.roster.by_key[key(name)].units:
        bench.scheduler.add_embedding(key(name), unit.media_index, unit.unit_index)


VIDEO_UNITS = [(0, 0), (0, 1), (0, 2)]


@pytest.mark.parametrize(
    ("changed", "tail", "hit", "needed"),
    [
        (None, [], 20, []),
        (None, [70], 20, []),
        (None, [70, 70, 70], 16, [(1, 0)]),
        ((1, 0), [], 12, [(0, 2), (1, 0)]),
        ((0, 2), [], 8, [(0, 1), (0, 2), (1, 0)]),
        ((0, 1), [], 4, [*VIDEO_UNITS, (1, 0)]),
        ((0, 0), [], 0, [*VIDEO_UNITS, (1, 0)]),
    ],
)
def test_units_inside_the_prefix_need_no_embedding(
    changed: tuple[int, int] | None, tail: list[int], hit: int, needed: list[tuple[int, int]]
) -> None:
    bench = cold_bench(max_batched_tokens=64)
    prompt, media = album(changed)
    bench.submit("warm", 0, prompt=[*prompt[: 22 - len(tail)], *tail], media=media, max_tokens=1)
    bench.plan()
    give_all(bench, "warm")
    while bench.scheduler.roster.by_key:
        bench.step()
    bench.events.clear()

    prompt, media = album()
    sequence = bench.submit("a", 0, prompt=prompt, media=media)
    plan = bench.plan()
    assert sequence.cached_tokens == sequence.computed == hit
    assert bench.of(ev.Admitted) == ([ev.Admitted(key("a"), hit)] if needed else [])
    # Tokens before the first unit that is missing can be computed at once.
    missing = next((unit.start for unit in sequence.units if unit[2:] in needed), 22)
    assert [part[1:3] for part in slices(plan)] == ([(hit, missing - hit)] if missing > hit else [])
    if plan is not None:
        bench.finish(plan, drawn(plan))
    assert bench.scheduler.add_embedding(key("a"), 0, 0) == (sequence.id if (0, 0) in needed else None)
    give_all(bench, "a")
    if needed:
        bench.step()
    assert sequence.computed == 22
    assert [(event.media_index, event.unit_index) for event in bench.of(ev.MediaConsumed)] == needed


# Between engines


@pytest.mark.parametrize(
    ("held", "chunks"),
    [
        (0, [(0, 16), (16, 4), (20, 4), (24, 1)]),
        (4, [(4, 12), (16, 4), (20, 4), (24, 1)]),
        (12, [(12, 4), (16, 4), (20, 4), (24, 1)]),
        (16, [(16, 4), (20, 4), (24, 1)]),
        (20, [(20, 4), (24, 1)]),
        (24, [(24, 1)]),
    ],
)
def test_a_prefill_engine_sends_what_it_found_and_the_peer_lacks(held: int, chunks: list[tuple[int, int]]) -> None:
    bench = cold_bench(max_batched_tokens=4)
    warm(bench, TEXT[:13])
    bench.submit("a", 0, PREFILL, prompt=TEXT[:25])
    bench.plan()
    bench.scheduler.reserved(key("a"), held)
    while bench.scheduler.roster.by_key[key("a")].state is SequenceState.RUNNING:
        bench.step()
    told = bench.of(ev.ComputedChunk)
    assert [(chunk.first_token, chunk.token_count) for chunk in told] == chunks
    assert [chunk.index for chunk in told] == list(range(len(told)))
    assert [chunk.last for chunk in told] == [False] * (len(told) - 1) + [True]
    bench.scheduler.transferred(key("a"))
    bench.collect()


def test_a_reservation_says_what_is_held_and_keeps_it() -> None:
    bench = cold_bench()
    warm(bench, TEXT[:13])
    sequence = bench.submit("a", 0, DECODE, prompt=TEXT[:20], max_tokens=4)
    bench.receive("a")
    granted = bench.of(ev.ReservationGranted)
    assert granted == [ev.ReservationGranted(key("a"), 0, tuple(sequence.blocks), 12)]
    assert bench.pool.peek(sequence.hasher.hashes).blocks == sequence.blocks[:5]  # type: ignore[union-attr]
    plan = bench.plan()
    assert slices(plan) == [(sequence.id, 20, 1, True)]
    assert plan is not None
    bench.finish(plan, drawn(plan))
    while bench.scheduler.roster.by_key:
        bench.step()
    assert bench.pool.used == 0
    later = bench.submit("b", 0, DECODE, prompt=TEXT[:20])
    bench.receive("b")
    assert bench.of(ev.ReservationGranted)[-1].held_tokens == 16
    assert later.published == 5


def test_a_reply_that_is_over_before_decoding_leaves_its_prompt() -> None:
    bench = cold_bench()
    bench.submit("a", 0, DECODE, prompt=TEXT[:9])
    bench.scheduler.reserve(key("a"), 9, 0.0)
    bench.plan()
    bench.scheduler.kv_arrived(key("a"), 17, True)
    bench.collect()
    assert bench.pool.cached == 2


def test_the_peer_cannot_hold_the_last_token() -> None:
    bench = cold_bench()
    bench.submit("a", 0, PREFILL, prompt=TEXT[:8])
    bench.plan()
    bench.scheduler.reserved(key("a"), 8)
    assert bench.ended()[key("a")].reason == "INTERNAL"


# Hashing


def test_a_prompt_is_hashed_as_far_as_is_needed_and_no_further() -> None:
    bench = cold_bench(blocks=400, max_model_len=1600, max_batched_tokens=400)
    sequence = bench.submit("a", 0, prompt=[*TEXT, *range(1200)], max_tokens=8)
    hasher = sequence.hasher
    assert hasher is not None
    assert hasher.token_count == 0
    plan = bench.plan()
    assert hasher.token_count == READ_BLOCKS * 4, "nothing of it is known"
    assert plan is not None
    bench.finish(plan, drawn(plan))
    assert hasher.token_count == 400
    while bench.scheduler.roster.by_key:
        bench.step()
    assert hasher.hashes == list(hash_blocks(identity(4), [*TEXT, *range(1200), *[9] * 7])), "and as if at once"
    again = bench.submit("b", 0, prompt=[*TEXT, *range(1200)])
    bench.plan()
    assert again.cached_tokens == 1228


# Room


def test_blocks_found_count_as_room_only_if_they_are_free() -> None:
    bench = cold_bench(blocks=8, max_model_len=32)
    bench.submit("a", 0, prompt=TEXT[:12], max_tokens=18)
    bench.step()
    assert bench.pool.free == 4
    # 7 blocks, of which 3 are shared: 4 are needed, but one is the other reply's.
    bench.submit("b", 0, prompt=[*TEXT[:12], *range(60, 72)])
    bench.step()
    assert bench.scheduler.roster.by_key[key("b")].state is SequenceState.WAITING
    bench.submit("c", 0, prompt=[*TEXT[:12], *range(60, 70)], arrival_s=-1.0)
    assert len(bench.step()) == 2


def test_a_waiting_head_is_looked_at_again_when_blocks_are_freed() -> None:
    bench = cold_bench(blocks=8, max_model_len=32)
    bench.submit("a", 0, prompt=TEXT[:16], max_tokens=3)
    bench.step()
    bench.submit("b", 0, prompt=list(range(50, 70)), max_tokens=3)
    order = []
    while bench.scheduler.roster.by_key:
        order += [token.key for token in bench.step() if token.finish]
    assert order == [key("a"), key("b")]


@pytest.mark.parametrize("mode", [COLOCATED, DECODE])
def test_cancel_gives_shared_blocks_back(mode: AttemptMode) -> None:
    bench = cold_bench()
    warm(bench, TEXT[:13])
    bench.submit("a", 0, mode, prompt=TEXT[:20])
    if mode is DECODE:
        bench.scheduler.reserve(key("a"), 20, 0.0)
    bench.plan()
    assert bench.pool.used >= 5
    bench.scheduler.cancel(key("a"))
    bench.collect()
    assert (bench.pool.used, bench.pool.cached) == (0, 3)


@pytest.mark.parametrize(("least_cached", "ended"), [(8, False), (9, True)])
def test_what_cannot_be_computed_here_must_be_cached(least_cached: int, ended: bool) -> None:
    bench = cold_bench()
    warm(bench, TEXT[:9])
    sequence = bench.submit("a", 0, prompt=TEXT[:12])
    sequence.least_cached = least_cached
    bench.plan()
    found = [(event.key, event.error.reason) for event in bench.of(ev.Ended)]
    assert found == ([(key("a"), "NOT_CACHED")] if ended else [])
    assert bool(sequence.blocks) is not ended and bench.pool.used == (0 if ended else 4)


def test_one_that_was_preempted_must_find_it_again() -> None:
    bench = cold_bench(blocks=9)
    warm(bench, TEXT[:9])
    bench.submit("a", 0, prompt=[77] * 8, max_tokens=36)
    bench.submit("b", 0, prompt=TEXT[:12], arrival_s=1.0, max_tokens=20).least_cached = 8
    while not bench.of(ev.Ended):
        bench.step()
    (ended,) = bench.of(ev.Ended)
    assert (ended.key, ended.error.reason) == (key("b"), "NOT_CACHED") and bench.of(ev.Preempted)
