"""Who loses its blocks, and how it comes back."""

from __future__ import annotations

from typing import Any

import pytest

from actors.engine import events as ev
from actors.engine.plan import StepResult
from actors.engine.scheduling.sequence import SequenceState
from actors.errors import DeadlineExceeded, Unavailable
from actors.types import AttemptMode, FinishReason, Grid, MediaKind, MilestoneKind, TokenEvent
from tests.unit.engine.engine_requests import IMAGE, key, span
from tests.unit.engine.scheduling.scheduler_bench import COLOCATED, DECODE, PREFILL, Bench, drawn, score, slices

IMAGE_PROMPT = [5, *[IMAGE] * 4, 5, 5]


def picture() -> dict[str, Any]:
    """A prompt of 7 tokens with an image."""
    return {"prompt": IMAGE_PROMPT, "media": [span(MediaKind.IMAGE, 1, Grid(1, 4, 4))]}


def until_preempted(bench: Bench, name: str, limit: int = 60) -> None:
    for _ in range(limit):
        if ev.Preempted(key(name)) in bench.events or key(name) in bench.ended():
            return
        bench.step()
    raise AssertionError("nobody was preempted")


def test_the_last_in_rank_goes_first_and_all_finish() -> None:
    bench = Bench(blocks=6, max_model_len=24)
    for name, arrival_s in (("old", 1.0), ("middle", 2.0), ("new", 3.0)):
        bench.submit(name, 3, arrival_s=arrival_s, max_tokens=15)
    tokens: list[TokenEvent] = []
    while bench.scheduler.roster.by_key:
        tokens += bench.step()
    preempted = [event.key for event in bench.of(ev.Preempted)]
    assert preempted[:2] == [key("new"), key("middle")]
    assert key("old") not in preempted
    assert bench.scheduler.preemptions == len(preempted)
    assert not bench.ended()
    for name in ("old", "middle", "new"):
        mine = [token for token in tokens if token.key == key(name)]
        assert [token.index for token in mine] == list(range(15))
        assert [token.finish for token in mine] == [None] * 14 + [FinishReason.LENGTH]
    ends = [token.key for token in tokens if token.finish]
    assert ends == [key("old"), key("middle"), key("new")]


def test_a_preempted_sequence_comes_back_whole_under_a_new_number_at_its_old_rank() -> None:
    bench = Bench(blocks=6, max_model_len=24, max_num_seqs=2)
    bench.submit("old", 3, arrival_s=1.0, max_tokens=20)
    victim = bench.submit("victim", 3, arrival_s=2.0, max_tokens=20)
    order, number = victim.order, victim.id
    until_preempted(bench, "victim")
    bench.submit("later", 1, arrival_s=3.0)
    assert victim.state is SequenceState.WAITING
    assert (victim.order, victim.rank, victim.blocks, victim.computed) == (order, None, [], 0)
    assert victim.id != number
    known = list(victim.tokens)
    assert bench.scheduler.roster.queued_tokens == len(known) + 1
    assert bench.scheduler.roster.queue[0] is victim
    bench.scheduler.cancel(key("old"))
    plan = bench.plan()
    assert plan is not None
    assert any(number in plan.parts[0].ended for plan in bench.plans)
    assert next((new.id, list(new.token_ids), new.prompt_length) for new in plan.parts[0].new) == (victim.id, known, 3)
    assert slices(plan)[0] == (victim.id, 0, len(known), True)
    told = [event.index for outcome in bench.outcomes for event in outcome.tokens if event.key == key("victim")]
    assert [event.index for event in bench.finish(plan, drawn(plan)) if event.key == key("victim")] == [len(told)]
    started = [m for m in bench.of(ev.Milestone) if m.key == key("victim")]
    assert [m.kind for m in started] == [MilestoneKind.PREFILL_STARTED]


def test_embeddings_are_asked_for_again() -> None:
    bench = Bench(blocks=6, max_model_len=24)
    bench.submit("old", 3, arrival_s=1.0, max_tokens=20)
    bench.submit("seen", 0, arrival_s=2.0, max_tokens=10, **picture())
    bench.step()
    bench.scheduler.add_embedding(key("seen"), 0, 0)
    until_preempted(bench, "seen")
    assert bench.scheduler.add_embedding(key("seen"), 0, 0) is None, "it waits and takes nothing"
    while len(bench.of(ev.Admitted)) < 2:
        bench.step()
    number = bench.scheduler.add_embedding(key("seen"), 0, 0)
    assert number == bench.scheduler.roster.by_key[key("seen")].id
    while bench.scheduler.roster.by_key:
        bench.step()
    assert not bench.ended()
    story = [event for event in bench.events if isinstance(event, ev.Admitted | ev.MediaConsumed | ev.Preempted)]
    assert story == [
        ev.Admitted(key("seen"), 0),
        ev.MediaConsumed(key("seen"), 0, 0),
        ev.Preempted(key("seen")),
        ev.Admitted(key("seen"), 0),
        ev.MediaConsumed(key("seen"), 0, 0),
    ]


def test_embeddings_on_hand_are_dropped_by_the_runner() -> None:
    bench = Bench(blocks=6, max_model_len=24)
    bench.submit("old", 3, arrival_s=1.0, max_tokens=20)
    media = [span(MediaKind.IMAGE, offset, Grid(1, 4, 4)) for offset in (0, 4)]
    half = bench.submit("half", 0, arrival_s=2.0, prompt=[IMAGE] * 8 + [5] * 3, media=media)
    bench.step()
    number = bench.scheduler.add_embedding(key("half"), 1, 0)
    assert number == half.id
    while not bench.of(ev.Preempted):
        plan = bench.plan()
        assert plan is not None
        bench.finish(plan, drawn(plan))
    assert plan.parts[0].ended == (number,)
    assert half.ready_tokens == 0


def test_a_constraint_is_asked_for_again_and_waited_for() -> None:
    bench = Bench(blocks=6, max_model_len=24)
    bench.submit("old", 3, arrival_s=1.0, max_tokens=20)
    bench.submit("bound", 3, arrival_s=2.0, max_tokens=20, constrained=True)
    bench.scheduler.constraint_ready(key("bound"))
    until_preempted(bench, "bound")
    assert bench.of(ev.ConstraintNeeded) == [ev.ConstraintNeeded(key("bound"))]
    bench.scheduler.cancel(key("old"))
    known = len(bench.scheduler.roster.by_key[key("bound")].tokens)
    plan = bench.plan()
    number = bench.scheduler.roster.by_key[key("bound")].id
    assert slices(plan) == [(number, 0, known - 1, False)]
    assert plan is not None
    bench.finish(plan, drawn(plan))
    assert bench.plan() is None
    assert bench.scheduler.constraint_ready(key("bound")) == number
    assert slices(bench.plan()) == [(number, known - 1, 1, True)]


def test_prompt_logprobs_are_told_once() -> None:
    bench = Bench(blocks=6, max_model_len=24, max_batched_tokens=8, max_num_seqs=2)
    bench.submit("old", 3, arrival_s=1.0, max_tokens=21)
    scored = bench.submit("scored", 13, arrival_s=2.0, max_tokens=2, prompt_logprobs=0)
    told: list[int] = []
    while bench.scheduler.roster.by_key:
        plan = bench.plan()
        assert plan is not None
        pieces = {}
        for part in plan.slices:
            if part.id == scored.id and scored.prompt_logprobs_due:
                asked = {new.id: new.sampling.prompt_logprobs for new in plan.parts[0].new}
                assert asked.get(part.id, 0) == 0
                first, end = part.first + 1 if part.first else 0, min(13, part.first + part.count + 1)
                pieces[part.id] = tuple(score(at) if at else None for at in range(first, end))
        bench.finish(plan, StepResult(tokens=drawn(plan).tokens, prompt_logprobs=pieces))
        if not bench.of(ev.Preempted) and 0 < scored.computed < 13:
            bench.scheduler._preempt(scored)
        for piece in bench.outcomes[-1].prompt_logprobs:
            assert piece.key == key("scored")
            assert [entry and entry.token_id for entry in piece.entries] == [
                at or None for at in range(piece.first, piece.first + len(piece.entries))
            ]
            told += range(piece.first, piece.first + len(piece.entries))
    assert bench.of(ev.Preempted)
    assert told == list(range(13))


def test_a_runner_that_gives_the_wrong_number_of_prompt_logprobs_is_refused() -> None:
    bench = Bench()
    bench.submit("a", 5, prompt_logprobs=1)
    plan = bench.plan()
    assert plan is not None
    with pytest.raises(ValueError, match="0 prompt log-probabilities for tokens 0"):
        bench.scheduler.apply(plan, drawn(plan), 0.0)


@pytest.mark.parametrize(
    ("mode", "options"), [(DECODE, {}), (COLOCATED, {"outputs": [7]})], ids=["after a transfer", "resumed"]
)
def test_prompt_logprobs_told_elsewhere_are_not_wanted(mode: AttemptMode, options: dict[str, Any]) -> None:
    bench = Bench()
    bench.submit("a", 5, mode, prompt_logprobs=1, **options)
    if mode is DECODE:
        bench.receive("a")
    plan = bench.plan()
    assert plan is not None
    assert plan.parts[0].new[0].sampling.prompt_logprobs is None
    bench.finish(plan, drawn(plan))
    assert bench.outcomes[-1].prompt_logprobs == []


def test_logprobs_ride_on_their_token() -> None:
    bench = Bench()
    bench.submit("a", 5)
    plan = bench.plan()
    assert plan is not None
    events = bench.finish(plan, StepResult(tokens={0: 9}, logprobs={0: score(9)}))
    assert events[0].logprobs == score(9)


def test_text_on_a_decode_engine_is_recomputed_there() -> None:
    bench = Bench(blocks=6, max_model_len=24)
    bench.submit("old", 4, arrival_s=1.0, max_tokens=20)
    bench.step()
    sequence = bench.submit("moved", 4, DECODE, arrival_s=2.0, max_tokens=12)
    bench.receive("moved")
    until_preempted(bench, "moved")
    known = list(sequence.tokens)
    assert known[4] == 17 and len(known) > 5
    assert bench.scheduler.roster.queued_tokens == len(known)
    # Whatever comes late now finds an attempt that waits for nobody.
    bench.scheduler.kv_arrived(key("moved"), 3, False)
    bench.scheduler.transferred(key("moved"))
    bench.scheduler.reserved(key("moved"), 0)
    bench.scheduler.refused(key("moved"), "NO_BLOCKS")
    bench.scheduler.reserve(key("moved"), 4, bench.now)
    assert [(event.key, event.reason) for event in bench.of(ev.ReservationFailed)] == [(key("moved"), "DUPLICATE")]
    bench.now = bench.config.reserve_wait_s + 1.0
    while bench.scheduler.roster.by_key:
        bench.step()
    assert not bench.ended() and not bench.of(ev.ReservationDropped)
    indices = [e.index for outcome in bench.outcomes for e in outcome.tokens if e.key == key("moved")]
    assert indices == list(range(1, 12))
    assert [m.kind for m in bench.of(ev.Milestone) if m.key == key("moved")] == [MilestoneKind.RELEASED]


@pytest.mark.parametrize("end", ["cancel", "deadline", "fail"])
def test_ends_of_a_sequence_that_waits_to_be_recomputed(end: str) -> None:
    bench = Bench(blocks=6, max_model_len=24)
    bench.submit("old", 4, arrival_s=1.0, max_tokens=20)
    bench.step()
    bench.submit("moved", 4, DECODE, arrival_s=2.0, deadline=500.0, max_tokens=12)
    bench.receive("moved")
    until_preempted(bench, "moved")
    if end == "cancel":
        bench.scheduler.cancel(key("moved"))
    elif end == "fail":
        bench.scheduler.end(key("moved"), Unavailable("lost"))
    else:
        bench.now = 500.0
        bench.plan()
        assert isinstance(bench.ended()[key("moved")], DeadlineExceeded)
    assert key("moved") in bench.ended()
    assert not bench.of(ev.ReservationFailed) and not bench.of(ev.ReservationDropped)
    assert bench.of(ev.Milestone)[-1].kind is MilestoneKind.RELEASED
    assert bench.scheduler.roster.queued_tokens == 0


@pytest.mark.parametrize("special", [False, True])
def test_a_decode_engine_sends_media_sequences_back(special: bool) -> None:
    bench = Bench(blocks=6, max_model_len=24)
    bench.submit("old", 4, arrival_s=1.0, max_tokens=20)
    bench.step()
    seen: dict[str, Any] = {"prompt": [5, IMAGE + 5, 5]} if special else picture()
    bench.submit("seen", 0, DECODE, arrival_s=2.0, max_tokens=12, **seen)
    bench.receive("seen")
    until_preempted(bench, "seen")
    error = bench.ended()[key("seen")]
    assert isinstance(error, Unavailable)
    assert (error.reason, error.retry_after_s) == ("PREEMPTED", 1.0)
    assert not bench.of(ev.ReservationDropped) and not bench.of(ev.Preempted)
    assert bench.scheduler.preemptions == 1


def test_a_reservation_that_waits_for_its_kv_is_dropped() -> None:
    bench = Bench(blocks=6, max_model_len=24)
    bench.submit("old", 8, arrival_s=1.0, max_tokens=20)
    bench.step()
    bench.submit("new", 4, DECODE, arrival_s=2.0)
    bench.scheduler.reserve(key("new"), 4, 0.0)
    while not bench.ended():
        bench.step()
    assert bench.ended()[key("new")].reason == "PREEMPTED"
    assert bench.of(ev.ReservationDropped) == [ev.ReservationDropped(key("new"))]
    bench.scheduler.kv_arrived(key("new"), 9, False)
    bench.step()


@pytest.mark.parametrize("whole", [True, False])
def test_nothing_is_taken_from_under_a_transfer(whole: bool) -> None:
    """Neither once all of the prompt was handed over, nor while the rest of it waits for a picture."""
    bench = Bench(blocks=8, max_model_len=32, max_batched_tokens=8)
    bench.submit("old", 8, arrival_s=1.0, max_tokens=24)
    bench.step()
    media = [] if whole else [span(MediaKind.IMAGE, 11, Grid(1, 4, 4))]
    prompt = [5] * 16 if whole else [*[5] * 11, *[IMAGE] * 4, 5]
    sent = bench.submit("sent", 0, PREFILL, prompt=prompt, media=media, arrival_s=2.0)
    bench.plan()
    bench.scheduler.reserved(key("sent"), 0)
    bench.step()
    assert sent.chunk_count == 1
    for _ in range(12):
        if (plan := bench.plan()) is not None:
            bench.finish(plan, drawn(plan))
    assert sent.state is (SequenceState.HANDED_OVER if whole else SequenceState.RUNNING)
    assert not bench.of(ev.Preempted) and not bench.ended()
    assert bench.plan() is None, "the old one waits for the transfer"
    bench.scheduler.transferred(key("sent"))
    bench.step()


@pytest.mark.parametrize("answer", ["before", "while waiting", "after", "refused"])
def test_a_prefill_attempt_keeps_its_reservation(answer: str) -> None:
    bench = Bench(blocks=7, max_model_len=28)
    bench.submit("old", 7, arrival_s=1.0, max_tokens=10)
    bench.step()
    sent = bench.submit("sent", 15, PREFILL, arrival_s=2.0)
    bench.plan()
    if answer == "before":
        bench.scheduler.reserved(key("sent"), 0)
    assert sent.state is (SequenceState.RUNNING if answer == "before" else SequenceState.RESERVING)
    bench.scheduler._preempt(sent)
    assert sent.state is SequenceState.WAITING
    if answer == "while waiting":
        bench.scheduler.reserved(key("sent"), 8)
    if answer == "refused":
        bench.scheduler.refused(key("sent"), "NO_BLOCKS")
        assert bench.ended()[key("sent")].reason == "NO_BLOCKS"
        assert not bench.of(ev.TransferCancelled)
        return
    bench.plan()
    if answer == "after":
        assert sent.state is SequenceState.RESERVING
        bench.scheduler.reserved(key("sent"), 8)
    while sent.state is not SequenceState.HANDED_OVER:
        bench.step()
    assert len(bench.of(ev.ReserveNeeded)) == 1
    chunks = bench.of(ev.ComputedChunk)
    assert chunks[0].first_token == (0 if answer == "before" else 8)
    assert sum(chunk.token_count for chunk in chunks) == 15 - chunks[0].first_token
    bench.scheduler.transferred(key("sent"))


def test_a_preempted_prefill_attempt_that_ends_gives_its_reservation_up() -> None:
    bench = Bench()
    sent = bench.submit("sent", 15, PREFILL, arrival_s=2.0)
    bench.plan()
    bench.scheduler._preempt(sent)
    bench.scheduler.cancel(key("sent"))
    assert bench.of(ev.TransferCancelled) == [ev.TransferCancelled(key("sent"))]
