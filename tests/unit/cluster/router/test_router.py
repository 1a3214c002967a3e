"""The router with real links to scripted engines; preprocessing and encoding are doubles."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import replace
from functools import partial

import pytest

from actors.errors import (
    AlreadyExists,
    ContextExceeded,
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    MediaChanged,
    NotFound,
    Overloaded,
    RequestCancelled,
    ServingError,
    Unavailable,
)
from actors.types import AttemptMode, EngineRole, FinishReason, MilestoneKind, Stage, TextPart
from cluster.generation import Delta, Finished, GenerateCall, PromptTokens, Started
from cluster.registry import Snapshot
from cluster.router.prompt import STAGE_DEATHS, preprocess_request
from tests.unit.cluster.router.world import CALL, END, IMAGE, endings, text_of, world
from tests.waiting import LIMIT_S, eventually


async def test_a_reply_through_prefill_and_decode() -> None:
    async with world(EngineRole.PREFILL, EngineRole.DECODE) as w:
        prefill, decode = w.engines
        w.stages.media = (IMAGE,)
        task = w.ask(replace(CALL, return_token_ids=True, return_timings=True, stop_token_ids=(9,)))
        key, request, mode = await prefill.taken()
        assert (await decode.taken())[:2] == (key, request)
        assert mode is AttemptMode.PREFILL
        assert request.prompt_ids == (5, 6, 7) and request.seed == 2**64 - 1
        assert request.media[0].encoder_address == "enc:1"
        await eventually(lambda: w.stages.leases == {("enc:1", "r-1#2")})
        prefill.links.deliver_milestone(key, MilestoneKind.PREFILL_STARTED, 0.0)
        decode.say(key, 1, 1)  # overtakes token 0
        prefill.say(key, 0, 0)
        await eventually(lambda: not w.stages.leases)
        decode.links.deliver_milestone(key, MilestoneKind.TRANSFERRED, 0.75)
        decode.say(key, 2, 2, 9, finish=FinishReason.STOP)
        events = await task
        started, *deltas, _, finished = events
        assert isinstance(started, Started) and isinstance(finished, Finished)
        assert started.prompt_token_ids == (5, 6, 7) and started.model == "tiny"
        assert text_of(events) == "abc"
        assert [i for delta in deltas if isinstance(delta, Delta) for i in delta.token_ids] == [0, 1, 2, 9]
        ending = endings(events)[0]
        assert (ending.reason, ending.stop_reason) == (FinishReason.STOP, 9)
        usage = finished.usage
        assert (usage.prompt_tokens, usage.media_tokens, usage.output_tokens) == (3, 1, 4)
        assert finished.timings is not None
        assert set(finished.timings.exposed) == set(Stage) - {Stage.FINISHED}
        assert finished.timings.busy == {
            Stage.PREPROCESS: 0.25,
            Stage.ENCODE: 0.125,
            Stage.PREFILL: 0.5,
            Stage.TRANSFER: 0.75,
            Stage.DECODE: 1.5,
        }
        assert prefill.cancels.empty() and decode.cancels.empty()


async def test_it_tells_where_every_request_is() -> None:
    async with world(EngineRole.PREFILL, EngineRole.DECODE) as w:
        prefill, decode = w.engines
        w.stages.media = (IMAGE,)
        w.stages.gate.clear()
        task = w.ask(replace(CALL, request_id="mine"))
        await eventually(lambda: w.router.active_count == 1)
        await asyncio.sleep(0)
        (where,) = w.router.whereabouts()
        assert (where.alias, where.stage, where.prefill) == ("mine", Stage.PREPROCESS, None)
        w.stages.gate.set()
        key, *_ = await prefill.taken()
        (where,) = w.router.whereabouts()
        assert (where.request_id, where.stage, where.encoder) == (key.request_id, Stage.QUEUED, "enc:1")
        assert (where.prefill, where.decode) == (prefill.info.address, decode.info.address)
        prefill.say(key, 0, 0, finish=FinishReason.LENGTH)
        await task
        assert w.router.whereabouts() == []


async def test_a_stop_string_ends_the_reply_and_the_attempt() -> None:
    async with world(EngineRole.COLOCATED) as w:
        (engine,) = w.engines
        task = w.ask(replace(CALL, stop=("c",)))
        key, _, mode = await engine.taken()
        assert mode is AttemptMode.COLOCATED
        engine.say(key, 0, 0, 1, 2, 3)
        *_, ending, finished = await task
        assert endings([ending, finished])[0].stop_reason == "c"
        assert isinstance(finished, Finished)
        assert finished.usage.output_tokens == 3
        assert await engine.cancelled() == key


async def test_a_client_that_leaves_frees_everything() -> None:
    async with world(EngineRole.PREFILL, EngineRole.DECODE) as w:
        w.stages.media = (IMAGE,)
        async with aclosing(w.router.generate(CALL)) as events:
            assert isinstance(await anext(events), Started)
            key, *_ = await w.engines[0].taken()
        assert [await engine.cancelled() for engine in w.engines] == [key, key]


@pytest.mark.parametrize("alias", [None, "mine"])
async def test_cancel_by_name_is_seen_by_the_client(alias: str | None) -> None:
    async with world(EngineRole.COLOCATED) as w:
        task = w.ask(replace(CALL, request_id=alias))
        key, *_ = await w.engines[0].taken()
        w.engines[0].say(key, 0, 0)
        await w.router.cancel(alias or key.request_id)
        assert endings(await task)[0].reason is FinishReason.CANCELLED
        await w.router.cancel(alias or key.request_id)
        with pytest.raises(NotFound):
            await w.router.cancel("never seen")


async def test_cancel_before_the_prompt_is_known() -> None:
    async with world(EngineRole.COLOCATED) as w:
        w.stages.gate.clear()
        task = w.ask()
        await eventually(lambda: w.router.active_count == 1)
        await w.router.cancel("r-1")
        with pytest.raises(RequestCancelled):
            await task


async def test_cancel_before_the_first_step_is_seen_by_the_client() -> None:
    async with world(EngineRole.COLOCATED) as w:
        reply = asyncio.ensure_future(anext(w.router.generate(CALL)))
        cancel = asyncio.create_task(w.router.cancel("r-1"))  # runs after admission and before the request's own task
        with pytest.raises(RequestCancelled):
            await asyncio.wait_for(reply, LIMIT_S)
        await cancel
        assert w.stages.preprocessed == 0


async def test_the_deadline_ends_a_request_everywhere() -> None:
    async with world(EngineRole.COLOCATED) as w:
        task = w.ask(replace(CALL, timeout_s=0.3))
        key, *_ = await w.engines[0].taken()
        with pytest.raises(DeadlineExceeded, match=r"0\.3 s"):
            await task
        assert await w.engines[0].cancelled() == key


async def test_the_error_of_the_engine_that_failed_first_is_the_one_told() -> None:
    async with world(EngineRole.PREFILL, EngineRole.DECODE) as w:
        prefill, decode = w.engines
        task = w.ask()
        key, *_ = await prefill.taken()
        await decode.taken()
        decode.links.deliver_end(key, Unavailable("the other engine gave up", reason="PEER_CANCELLED"))
        await asyncio.sleep(0.05)
        prefill.links.deliver_end(key, InternalError("broken", reason="BROKEN"))
        with pytest.raises(InternalError) as caught:
            await task
        assert caught.value.reason == "BROKEN"


async def test_an_engine_that_left_the_registry_gets_nothing_new() -> None:
    async with world(EngineRole.COLOCATED) as w:
        w.fleet._adopt(Snapshot(term=1, version=2))
        with pytest.raises(DeadlineExceeded):
            await w.ask(replace(CALL, timeout_s=0.1))
        assert w.engines[0].submits.empty()


async def test_the_context_is_what_every_engine_can_hold() -> None:
    async with world(EngineRole.COLOCATED) as w:
        (link,) = w.fleet._links.values()
        link.info = replace(link.info, max_model_len=20)
        assert w.router.models()[0].max_model_len == 20
        with pytest.raises(ContextExceeded, match="context"):
            await w.ask(replace(CALL, max_tokens=20))


async def test_patches_that_are_gone_are_made_again() -> None:
    async with world(EngineRole.COLOCATED) as w:
        w.stages.media, w.stages.misses = (IMAGE,), 1
        task = w.ask()
        key, *_ = await w.engines[0].taken()
        w.engines[0].say(key, 0, END, finish=FinishReason.STOP)
        await task
        assert (w.stages.preprocessed, w.stages.encoded) == (2, 2)


@pytest.mark.parametrize("changed", [False, True])
async def test_embeddings_that_are_gone_are_made_again_unless_the_media_changed(changed: bool) -> None:
    async with world(EngineRole.COLOCATED) as w:
        w.stages.media = (IMAGE,)
        task = w.ask()
        key, request, _ = await w.engines[0].taken()
        if changed:
            w.stages.media = (replace(IMAGE, content_keys=(b"d" * 32,)),)
        w.engines[0].links.deliver_need(key, request.media[0].embedding_keys)
        if changed:
            with pytest.raises(MediaChanged):
                await task
            return
        assert await asyncio.wait_for(w.engines[0].supplies.get(), LIMIT_S) == request.media
        w.engines[0].say(key, 0, END, finish=FinishReason.STOP)
        await task


@pytest.mark.parametrize(
    ("call", "error", "field"),
    [
        (replace(CALL, model="other"), NotFound, "model"),
        (replace(CALL, model=""), InvalidRequest, "model"),
        (replace(CALL, max_tokens=62), ContextExceeded, "max_tokens"),
    ],
)
async def test_requests_that_cannot_be_served(call: GenerateCall, error: type[ServingError], field: str) -> None:
    async with world(EngineRole.COLOCATED) as w:
        with pytest.raises(error) as caught:
            await w.ask(call)
        assert caught.value.field == field


@pytest.mark.parametrize(
    ("call", "field", "limit"),
    [
        (replace(CALL, stop_token_ids=(99, 100)), "stop_token_ids[1]", "99"),
        (replace(CALL, max_tokens=64), "max_tokens", "64"),
    ],
)
async def test_what_can_never_fit_is_refused_before_any_work(call: GenerateCall, field: str, limit: str) -> None:
    async with world(EngineRole.COLOCATED) as w:
        with pytest.raises(InvalidRequest, match=limit) as caught:
            await w.ask(call)
        assert caught.value.field == field
        assert w.stages.preprocessed == 0


async def test_a_name_is_unique_while_active() -> None:
    async with world(EngineRole.COLOCATED) as w:
        first = w.ask(replace(CALL, request_id="mine"))
        key, *_ = await w.engines[0].taken()
        with pytest.raises(AlreadyExists):
            await w.ask(replace(CALL, request_id="mine"))
        w.engines[0].say(key, 0, END, finish=FinishReason.STOP)
        await first
        second = w.ask(replace(CALL, request_id="mine"))
        key, *_ = await w.engines[0].taken()
        w.engines[0].say(key, 0, END, finish=FinishReason.STOP)
        await second


async def test_a_full_router_and_a_draining_one_refuse() -> None:
    async with world(EngineRole.COLOCATED, max_active=1) as w:
        first = w.ask()
        key, *_ = await w.engines[0].taken()
        with pytest.raises(Overloaded) as caught:
            await w.ask()
        assert caught.value.retry_after_s is not None
        drain = asyncio.create_task(w.router.drain(5.0))
        await eventually(lambda: w.router._draining)
        with pytest.raises(Unavailable, match="draining"):
            await w.ask()
        assert await w.router.not_ready() == "draining"
        w.engines[0].say(key, 0, END, finish=FinishReason.STOP)
        await first
        assert await drain == 0


async def test_readiness_names_what_is_missing() -> None:
    async with world(EngineRole.PREFILL) as w:
        assert await w.router.not_ready() == "no prefill and decode path"
        with pytest.raises(Unavailable) as caught:
            await w.ask()
        assert caught.value.reason == "NO_ENGINE"
    async with world(EngineRole.COLOCATED, encoders=False) as w:
        assert await w.router.not_ready() == "no vision encoder"
    async with world(EngineRole.COLOCATED, preprocessors=False) as w:
        assert await w.router.not_ready() == "no preprocessor"
    async with world(EngineRole.COLOCATED) as w:
        assert await w.router.not_ready() is None


async def test_a_defect_of_ours_shows_no_details(monkeypatch: pytest.MonkeyPatch) -> None:
    async with world(EngineRole.COLOCATED) as w:
        w.stages.error = KeyError("secret")
        with pytest.raises(InternalError, match="internal error; request r-1"):
            await w.ask()


async def test_tokens_are_counted_without_keeping_anything() -> None:
    async with world(EngineRole.COLOCATED) as w:
        assert len((await w.router.tokenize(CALL)).ids) == 3


async def test_preprocessors_and_encoders_that_are_lost_are_asked_elsewhere() -> None:
    """What preprocessing gave is kept while encoders are lost; only losses draw on the retry budget."""
    async with world(EngineRole.COLOCATED) as w:
        w.stages.media, w.stages.losses, w.stages.encoder_losses, w.stages.misses = (IMAGE,), 2, 2, 1
        budget = w.router._services.budget
        budget._clock = lambda since=budget._since: since  # type: ignore[misc]
        task = w.ask()
        key, *_ = await w.engines[0].taken()
        w.engines[0].say(key, 0, END, finish=FinishReason.STOP)
        await task
        assert (w.stages.preprocessed, w.stages.encoded) == (2, 4)
        assert budget.saved == 64 - 4
        w.stages.losses = 3
        assert await w.router.tokenize(CALL) == PromptTokens(ids=(5, 6, 7), media_tokens=1)


async def test_a_request_that_parts_die_of_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.router.prompt.DEATH_DELAY_S", 0.01)
    async with world(EngineRole.COLOCATED) as w:
        w.stages.media, w.stages.losses, w.stages.losses_are_deaths = (IMAGE,), 5, True
        w.stages.encoder_losses = 100
        with pytest.raises(InternalError) as caught:
            await w.ask()
        assert caught.value.reason == "POISON" and w.stages.encoded == STAGE_DEATHS - 5
        w.stages.losses, w.stages.encoder_losses = STAGE_DEATHS - 1, 0
        task = w.ask()
        key, *_ = await w.engines[0].taken()
        w.engines[0].say(key, 0, END, finish=FinishReason.STOP)
        await task


async def test_counting_has_a_deadline_too() -> None:
    async with world(EngineRole.COLOCATED, default_timeout_s=0.05) as w:
        w.stages.gate.clear()
        with pytest.raises(DeadlineExceeded, match=r"0\.05 s"):
            await asyncio.wait_for(w.router.tokenize(CALL), LIMIT_S)


async def test_token_ids_are_told_only_on_request() -> None:
    async with world(EngineRole.COLOCATED) as w:
        for wanted in (False, True):
            task = w.ask(replace(CALL, return_token_ids=wanted))
            key, *_ = await w.engines[0].taken()
            w.engines[0].say(key, 0, 0, 1, finish=FinishReason.LENGTH)
            deltas = [event for event in await task if isinstance(event, Delta)]
            assert "".join(delta.text for delta in deltas) == "ab"
            assert [token for delta in deltas for token in delta.token_ids] == ([0, 1] if wanted else [])


def test_patches_are_kept_for_calls_with_media_only() -> None:
    text = replace(CALL, messages=(replace(CALL.messages[0], parts=(TextPart(text="hi"),)),))
    asked = partial(preprocess_request, lease="r-1#1", context_limit=9)
    assert asked(CALL).keep_patches
    assert not asked(CALL, keep_patches=False).keep_patches
    assert not asked(text).keep_patches
