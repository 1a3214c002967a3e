"""All parts together without Ray: the same tokens whatever the route, and nothing left behind whatever happens."""

from __future__ import annotations

import asyncio
import random
from contextlib import aclosing
from dataclasses import replace

import pytest

from actors.errors import ContextExceeded, InvalidRequest, MediaUnreadable, ServingError
from actors.types import (
    ContentPart,
    EngineRole,
    FinishReason,
    ImagePart,
    MediaSource,
    Message,
    MessageRole,
    TextPart,
    ThinkingMode,
)
from cluster.generation import ChoiceFinished, Delta, Event, Finished, GenerateCall, Started
from tests.in_process import InProcessCluster, in_process_cluster
from tests.media import image_part, video_part
from tests.tiny_model import tiny_checkpoint

COLOCATED = (EngineRole.COLOCATED,)
SPLIT = (EngineRole.PREFILL, EngineRole.DECODE)

PROMPTS: tuple[tuple[ContentPart, ...], ...] = (
    (TextPart(text="Count to ten and then back again."),),
    (image_part(150, 100, 1), TextPart(text="What is this?")),
    (image_part(90, 160, 2), TextPart(text="against"), image_part(112, 84, 3)),
    (video_part(96, 64, 48, 12, 4), TextPart(text="What moves?")),
    (image_part(150, 100, 1), TextPart(text="The same picture once more.")),
)


def calls() -> list[GenerateCall]:
    """Each prompt once greedy and once drawn."""
    greedy = GenerateCall(messages=(), temperature=0.0, max_tokens=12, ignore_eos=True, return_token_ids=True)
    drawn = replace(greedy, temperature=0.9, top_p=0.95, top_k=200, seed=1234)
    return [
        replace(kind, messages=(Message(role=MessageRole.USER, parts=parts),))
        for parts in PROMPTS
        for kind in (greedy, drawn)
    ]


async def tokens(cluster: InProcessCluster, call: GenerateCall) -> list[int]:
    found: list[int] = []
    async for event in cluster.parts.router.generate(call):
        if isinstance(event, Delta):
            found.extend(event.token_ids)
    return found


_alone: list[list[int]] = []


async def alone() -> list[list[int]]:
    """The reference: one request at a time, whole prompts, one engine."""
    if not _alone:
        async with in_process_cluster(tiny_checkpoint(), *COLOCATED) as cluster:
            for call in calls():
                _alone.append(await tokens(cluster, call))
    return _alone


@pytest.mark.parametrize("budget", [8, 19, 2048])
@pytest.mark.parametrize("roles", [COLOCATED, SPLIT, (*SPLIT, EngineRole.DECODE)])
async def test_float64_tokens_do_not_depend_on_route_batch_or_chunks(
    roles: tuple[EngineRole, ...], budget: int
) -> None:
    expected = await alone()
    assert len({tuple(output) for output in expected}) > len(PROMPTS)
    async with in_process_cluster(tiny_checkpoint(), *roles, max_num_seqs=8, max_batched_tokens=budget) as cluster:
        found = await asyncio.gather(*(tokens(cluster, call) for call in calls()))
        await cluster.wait_clean()
    assert found == expected


@pytest.mark.parametrize("ranks", [(1, 2), (2, 1)])
async def test_float64_tokens_do_not_depend_on_how_many_ranks_an_engine_has(
    ranks: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prefill and decode engine. Also who leaves in the midst of it leaves nothing on any rank."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # Of the other rank's process.
    expected = await alone()
    rng = random.Random(0)
    async with in_process_cluster(
        tiny_checkpoint(), *SPLIT, ranks=ranks, max_num_seqs=8, max_batched_tokens=19
    ) as cluster:
        leaving = [asyncio.create_task(tokens(cluster, call)) for call in calls()]
        staying = [asyncio.create_task(tokens(cluster, call)) for call in calls()]
        for task in leaving:
            await asyncio.sleep(rng.random() * 0.05)
            task.cancel()
        await asyncio.wait(leaving)
        assert await asyncio.gather(*staying) == expected
        await cluster.wait_clean()
        held = [(await engine.audit()).held for engine in cluster.engines]
        assert ["rank_sequences" in one for one in held] == [size > 1 for size in ranks]


async def test_more_requests_than_blocks_all_finish() -> None:
    """Decode has room for a few at a time; the others wait and none is lost."""
    call = GenerateCall(
        messages=(Message(role=MessageRole.USER, parts=(image_part(150, 100), TextPart(text="word " * 40))),),
        temperature=0.0,
        max_tokens=4,
        ignore_eos=True,
        return_token_ids=True,
    )
    async with in_process_cluster(tiny_checkpoint(), *SPLIT, kv_cache_gib=0.0015) as cluster:
        found = await asyncio.gather(*(tokens(cluster, call) for _ in range(24)))
        await cluster.wait_clean()
    assert len({tuple(output) for output in found}) == 1 and len(found[0]) == 4


@pytest.mark.parametrize("roles", [COLOCATED, SPLIT])
async def test_when_blocks_run_out_every_reply_is_still_whole(roles: tuple[EngineRole, ...]) -> None:
    texts = [replace(calls()[i % 2], max_tokens=150, seed=i) for i in range(6)]
    async with in_process_cluster(tiny_checkpoint(), *COLOCATED) as cluster:
        expected = [await tokens(cluster, call) for call in texts]
    async with in_process_cluster(tiny_checkpoint(), *roles, kv_cache_gib=0.001) as cluster:
        found = await asyncio.gather(*(tokens(cluster, call) for call in texts))
        await cluster.wait_clean()
        assert sum(engine.load().preemptions for engine in cluster.engines) > 0
    assert found == expected and {len(output) for output in found} == {150}


async def _last(cluster: InProcessCluster, call: GenerateCall) -> Event:
    return [event async for event in cluster.parts.router.generate(call)][-1]


@pytest.mark.parametrize("roles", [COLOCATED, SPLIT])
async def test_leaving_at_any_moment_frees_everything(roles: tuple[EngineRole, ...]) -> None:
    """Moments are spread over the whole life of a request; afterwards a request is answered as before."""
    rng = random.Random(0)
    call = GenerateCall(
        messages=(Message(role=MessageRole.USER, parts=PROMPTS[2]),), temperature=0.0, max_tokens=30, ignore_eos=True
    )
    async with in_process_cluster(tiny_checkpoint(), *roles, max_num_seqs=8, max_batched_tokens=16) as cluster:
        stages = set()
        for trial in range(40):
            fresh = replace(call, cache_salt=f"{trial}")  # no stage is left out
            async with aclosing(cluster.parts.router.generate(fresh)) as events:
                step = asyncio.ensure_future(anext(events))
                await asyncio.sleep(rng.random() * 0.1)
                stages |= {run.timeline.stage for run in cluster.parts.router._active.values()}
                if trial % 2 and step.done() and not step.exception():
                    async for _ in events:
                        if rng.random() < 0.2:
                            break
                step.cancel()
                await asyncio.wait([step])
            await cluster.wait_clean()
        assert len(stages) >= 3
        assert isinstance(await _last(cluster, call), Finished)
        await cluster.wait_clean()


async def test_a_request_without_an_engine_that_decodes_waits_and_holds_nothing_elsewhere() -> None:
    call = GenerateCall(
        messages=(Message(role=MessageRole.USER, parts=PROMPTS[1]),), temperature=0.0, max_tokens=400, ignore_eos=True
    )
    async with in_process_cluster(tiny_checkpoint(), *SPLIT) as cluster:
        prefill, decode = cluster.engines
        stream = cluster.parts.router.generate(call)
        while not isinstance(await anext(stream), Delta):
            pass
        await decode._server.stop(None)
        async with asyncio.timeout(10):
            while not (await prefill.audit()).clean:
                await asyncio.sleep(0.01)
        assert cluster.parts.router.active_count == 1
        await stream.aclose()  # type: ignore[attr-defined]
        async with asyncio.timeout(10):
            while cluster.parts.router.active_count:
                await asyncio.sleep(0.01)


async def test_every_reply_ends_with_its_reason() -> None:
    async with in_process_cluster(tiny_checkpoint(), *COLOCATED) as cluster:
        base = calls()[0]
        whole = [event async for event in cluster.parts.router.generate(base)]
        finished = whole[-1]
        assert isinstance(whole[0], Started) and isinstance(finished, Finished)
        assert whole[-2] == ChoiceFinished(reason=FinishReason.LENGTH)
        ids = [i for event in whole if isinstance(event, Delta) for i in event.token_ids]
        text = "".join(event.text for event in whole if isinstance(event, Delta))

        *_, ending, stopped = [
            event async for event in cluster.parts.router.generate(replace(base, stop_token_ids=(ids[5],)))
        ]
        assert ending == ChoiceFinished(reason=FinishReason.STOP, stop_reason=ids[5])
        assert isinstance(stopped, Finished)
        assert stopped.usage.output_tokens == ids.index(ids[5]) + 1

        needle = text[len(text) // 2 :][:2]
        cut = [event async for event in cluster.parts.router.generate(replace(base, stop=(needle,)))]
        assert cut[-2] == ChoiceFinished(reason=FinishReason.STOP, stop_reason=needle)
        assert "".join(event.text for event in cut if isinstance(event, Delta)) == text[: text.index(needle)]

        thought = await _last(cluster, replace(base, thinking=ThinkingMode.ON))
        assert isinstance(thought, Finished) and thought.usage.reasoning_tokens > 0
        await cluster.wait_clean()


BAD: dict[str, tuple[tuple[ContentPart, ...], type[ServingError], str]] = {
    "not an image": (
        (ImagePart(source=MediaSource(content=b"GIF89a but not really")),),
        MediaUnreadable,
        "messages[0].content[0]",
    ),
    "file url": ((ImagePart(source=MediaSource(uri="file:///etc/passwd")),), InvalidRequest, "messages[0].content[0]"),
    "host not allowed": (
        (ImagePart(source=MediaSource(uri="https://example.com/cat.png")),),
        InvalidRequest,
        "messages[0].content[0]",
    ),
    "placeholder in text": ((TextPart(text="see <|IMAGE_PLACEHOLDER|>"),), InvalidRequest, "messages[0].content"),
    "text over the context": ((TextPart(text="many words " * 9000),), ContextExceeded, "messages"),
}


async def test_bad_input_names_its_field_and_disturbs_nobody() -> None:
    async with in_process_cluster(tiny_checkpoint(), *COLOCATED) as cluster:
        healthy = asyncio.create_task(tokens(cluster, calls()[2]))
        for name, (parts, kind, field) in BAD.items():
            call = GenerateCall(messages=(Message(role=MessageRole.USER, parts=parts),))
            with pytest.raises(kind) as caught:
                await _last(cluster, call)
            assert (caught.value.field or "").startswith(field), name
        with pytest.raises(InvalidRequest):
            await _last(cluster, GenerateCall(messages=()))
        assert await healthy == (await alone())[2]
        await cluster.wait_clean()
