"""What a router tells of its requests."""

from __future__ import annotations

from dataclasses import replace

import pytest

from actors.errors import Overloaded, RequestCancelled, Unavailable
from actors.types import EngineRole, FinishReason, Stage
from cluster.router.records import Outcome, Recorder, Recorders
from tests.unit.cluster.router.world import CALL, IMAGE, Recorded, world
from tests.waiting import eventually


async def test_a_request_that_finishes_is_recorded_once() -> None:
    async with world(EngineRole.COLOCATED) as w:
        w.stages.media = (IMAGE,)
        asked = w.ask(replace(CALL, request_id="mine"))
        key, _, _ = await w.engines[0].taken()
        w.engines[0].say(key, 0, 1)
        await eventually(lambda: w.router.whereabouts()[0].output_tokens == 1)
        w.engines[0].say(key, 1, 2, 2, finish=FinishReason.LENGTH)
        await asked
        await eventually(lambda: bool(w.recorder.records))
        (record,) = w.recorder.records
        assert w.recorder.admitted_ids == [record.request_id] == ["r-1"]
        assert (record.alias, record.outcome, record.reason) == ("mine", Outcome.FINISHED, None)
        assert record.finish_reasons == (FinishReason.LENGTH,)
        usage = record.usage
        assert (usage.prompt_tokens, usage.media_tokens, usage.output_tokens) == (3, 1, 3)
        (gap,) = w.recorder.gaps
        assert record.tpot_s == pytest.approx(gap / 2)
        assert record.ttft_s is not None and record.ttft_s + gap <= record.e2e_s
        assert record.attempts == 1 and not w.recorder.retries
        assert sum(record.timings.exposed.values()) == pytest.approx(record.e2e_s)
        stages = [span.stage for span in record.spans]
        assert stages[:4] == [Stage.QUEUED, Stage.PREPROCESS, Stage.ENCODE, Stage.QUEUED]
        assert [span.ended_s for span in record.spans[:-1]] == [span.began_s for span in record.spans[1:]]


async def test_errors_refusals_and_retries_are_told_by_reason() -> None:
    async with world(EngineRole.COLOCATED, max_active=1) as w:
        asked = w.ask()
        key, _, _ = await w.engines[0].taken()
        with pytest.raises(Overloaded):
            await w.ask()
        w.engines[0].end(key, Unavailable("no room", reason="PREEMPTED"))
        again, _, _ = await w.engines[0].taken()
        w.engines[0].end(again, RequestCancelled("late", reason="ANY"))
        with pytest.raises(RequestCancelled):
            await asked
        await eventually(lambda: bool(w.recorder.records))
        (record,) = w.recorder.records
        assert w.recorder.refusals == ["QUEUE_FULL"]
        assert w.recorder.retries == [(Stage.PREFILL, "PREEMPTED")]
        assert (record.outcome, record.reason, record.attempts) == (Outcome.ERROR, "ANY", 2)
        assert (record.ttft_s, record.tpot_s, record.usage.output_tokens) == (None, None, 0)


@pytest.mark.parametrize("by_name", [False, True])
async def test_whoever_cancels_it_is_cancelled(by_name: bool) -> None:
    async with world(EngineRole.COLOCATED) as w:
        asked = w.ask()
        key, _, _ = await w.engines[0].taken()
        w.engines[0].say(key, 0, 1)
        await eventually(lambda: w.router.whereabouts()[0].output_tokens == 1)
        if by_name:
            await w.router.cancel("r-1")
            await asked
        else:
            asked.cancel()
        await eventually(lambda: bool(w.recorder.records))
        (record,) = w.recorder.records
        assert (record.outcome, record.reason) == (Outcome.CANCELLED, None)
        assert record.finish_reasons == ((FinishReason.CANCELLED,) if by_name else ())
        assert record.ttft_s is not None and record.tpot_s is None


async def test_several_recorders_hear_the_same() -> None:
    first, second = Recorded(), Recorded()
    both = Recorders(first, Recorder(), second)
    both.admitted("r-1")
    both.refused("QUEUE_FULL")
    both.token_gap(0.5)
    both.retried(Stage.ENCODE, "STAGE_LOST")
    for heard in (first, second):
        assert (heard.admitted_ids, heard.refusals, heard.gaps) == (["r-1"], ["QUEUE_FULL"], [0.5])
        assert heard.retries == [(Stage.ENCODE, "STAGE_LOST")]
