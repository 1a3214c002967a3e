"""The prefix cache through all parts: it finds exactly what a plain comparison finds, and no token ever changes."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from actors.engine.scheduling.block_pool import BlockPool
from actors.engine_replica import EngineReplica
from actors.types import (
    AttemptMode,
    ContentPart,
    EngineRequest,
    EngineRole,
    MediaSpan,
    Message,
    MessageRole,
    SequenceKey,
    TextPart,
)
from cluster.generation import Delta, Finished, GenerateCall, Usage
from tests.in_process import ALWAYS_PAIRS, InProcessCluster, in_process_cluster
from tests.media import image_part, video_part
from tests.tiny_model import tiny_checkpoint
from tests.waiting import eventually

COLOCATED = (EngineRole.COLOCATED,)
SPLIT = (EngineRole.PREFILL, EngineRole.DECODE)
BLOCK = 4

PICTURE = image_part(150, 100, 1)
OTHER_PICTURE = image_part(150, 100, 2)
VIDEO = video_part(96, 64, 48, 12, 4)

Label = tuple[object, ...]


def user(*parts: ContentPart | str) -> Message:
    return _message(MessageRole.USER, parts)


def assistant(text: str) -> Message:
    return _message(MessageRole.ASSISTANT, (text,))


def _message(role: MessageRole, parts: Sequence[ContentPart | str]) -> Message:
    return Message(role=role, parts=tuple(TextPart(text=part) if isinstance(part, str) else part for part in parts))


def call(*messages: Message, **changes: Any) -> GenerateCall:
    base = GenerateCall(messages=messages, temperature=0.0, max_tokens=24, ignore_eos=True, return_token_ids=True)
    return replace(base, **changes)


TALK = user(PICTURE, "What is this?")
CALLS: dict[str, GenerateCall] = {
    "a picture": call(TALK),
    "its second turn": call(TALK, assistant("A dog on a hill."), user("And what is behind it?")),
    "its third turn": call(
        TALK, assistant("A dog on a hill."), user("And what is behind it?"), assistant("Trees."), user("How many?")
    ),
    "another answer": call(TALK, assistant("A cat."), user("And what is behind it?")),
    "the same again": call(TALK),
    "drawn": call(TALK, temperature=0.9, seed=5),
    "the same picture elsewhere": call(user("Look at this:", PICTURE, "What is this?")),
    "another picture of the same size": call(user(OTHER_PICTURE, "What is this?")),
    "other pixel bounds": call(user(replace(PICTURE, max_pixels=56 * 56 * 2), "What is this?")),
    "turned on its side": call(user(image_part(100, 150, 1), "What is this?")),
    "another tenant": call(TALK, cache_salt="tenant"),
    "that tenant again": call(TALK, cache_salt="tenant"),
    "a video": call(user(VIDEO, "What moves?")),
    "its second turn after a picture": call(user(VIDEO, "What moves?"), assistant("A square."), user(PICTURE, "This?")),
    "a picture behind the same picture": call(user(PICTURE, PICTURE, "Are they equal?")),
    "another behind the same picture": call(user(PICTURE, OTHER_PICTURE, "Are they equal?")),
    "text": call(user("Count to ten and then back again, please.")),
    "text in other words": call(user("Count to ten and then stop.")),
}


def labels(request: EngineRequest, token_ids: Sequence[int]) -> list[Label]:
    """What tells tokens apart besides what stands before them."""
    found: list[Label] = [(token, request.salt) for token in token_ids]
    for span in request.media:
        per_unit = span.grid.tokens_per_unit
        for offset in range(span.grid.tokens):
            unit, place = divmod(offset, per_unit)
            found[span.offset + offset] += (span.kind, span.grid, span.embedding_keys[unit], unit, place)
    return found


class Memory:
    """The plain form of a prefix cache: all sequences ever computed, compared token by token."""

    def __init__(self) -> None:
        self.known: list[list[Label]] = []

    def cached_tokens(self, wanted: list[Label]) -> int:
        best = 0
        for known in self.known:
            count = 0
            while count < min(len(known), len(wanted)) and known[count] == wanted[count]:
                count += 1
            best = max(best, count)
        return min(best, len(wanted) - 1) // BLOCK * BLOCK

    def add(self, computed: list[Label]) -> None:
        self.known.append(computed[: len(computed) // BLOCK * BLOCK])


class Watched:
    """A cluster whose engines' submits, pulls and transfers are counted."""

    def __init__(self, cluster: InProcessCluster) -> None:
        self.cluster = cluster
        self.first, self.last = cluster.engines[0], cluster.engines[-1]
        self.requests: list[EngineRequest] = []
        self.pulled: list[bytes] = []
        self._watch_submits(self.first)
        self._watch_pulls(self.first)

    def _watch_submits(self, engine: EngineReplica) -> None:
        submit = engine.submit

        def watched(key: SequenceKey, request: EngineRequest, mode: AttemptMode, peer: tuple[str, str] | None) -> None:
            self.requests.append(request)
            submit(key, request, mode, peer)

        engine.submit = watched  # type: ignore[method-assign]

    def _watch_pulls(self, engine: EngineReplica) -> None:
        pull = engine._puller._pull

        async def watched(span: MediaSpan, key: bytes, reader: SequenceKey) -> torch.Tensor:
            self.pulled.append(key)
            return await pull(span, key, reader)

        engine._puller._pull = watched

    async def ask(self, wanted: GenerateCall) -> tuple[list[int], Usage]:
        """Tokens and usage of one request; returns when nothing of it is left anywhere."""
        tokens: list[int] = []
        usage: Usage | None = None
        async for event in self.cluster.parts.router.generate(wanted):
            if isinstance(event, Delta):
                tokens += event.token_ids
            elif isinstance(event, Finished):
                usage = event.usage
        assert usage is not None
        await self.cluster.wait_clean()
        return tokens, usage

    @property
    def sent_bytes(self) -> int:
        return self.first._sender.counters.sent_bytes

    def kv_bytes(self, tokens: int) -> int:
        return self.first._sender._parts.geometry.chunk_bytes(tokens)


@asynccontextmanager
async def watched(*roles: EngineRole, **engine: Any) -> AsyncIterator[Watched]:
    options = {"block_size": BLOCK, "max_batched_tokens": 64, "described": ALWAYS_PAIRS} | engine
    async with in_process_cluster(tiny_checkpoint(), *roles, **options) as cluster:
        yield Watched(cluster)


_uncached: dict[str, list[int]] = {}


async def uncached() -> dict[str, list[int]]:
    """The reference: one request at a time and nothing remembered."""
    if not _uncached:
        async with watched(*COLOCATED, prefix_caching=False) as watch:
            for name, wanted in CALLS.items():
                tokens, usage = await watch.ask(wanted)
                assert usage.cached_tokens == 0
                _uncached[name] = tokens
    return _uncached


@pytest.mark.parametrize("roles", [COLOCATED, SPLIT])
async def test_exactly_what_is_known_is_reused_and_tokens_stay_the_same(roles: tuple[EngineRole, ...]) -> None:
    expected = await uncached()
    assert len({tuple(tokens) for tokens in expected.values()}) > len(CALLS) // 2
    computing, decoding = Memory(), Memory()
    cached: dict[str, int] = {}
    async with watched(*roles) as watch:
        for name, wanted in CALLS.items():
            sent, pulled = watch.sent_bytes, len(watch.pulled)
            tokens, usage = await watch.ask(wanted)
            assert tokens == expected[name], name
            request = watch.requests[-1]
            prompt = labels(request, request.prompt_ids)
            whole = labels(request, [*request.prompt_ids, *tokens[:-1]])

            cached[name] = computing.cached_tokens(prompt)
            assert usage.cached_tokens == cached[name], name
            lacking = [
                key
                for span in request.media
                for unit, key in enumerate(span.embedding_keys)
                if span.offset + (unit + 1) * span.grid.tokens_per_unit > cached[name]
            ]
            assert watch.pulled[pulled:] == lacking, name
            if roles == SPLIT:
                held = decoding.cached_tokens(prompt)
                assert watch.sent_bytes - sent == watch.kv_bytes(len(prompt) - held), name
            computing.add(prompt if roles == SPLIT else whole)
            decoding.add(whole)
        assert watch.last._receiver.counters.received_bytes == watch.sent_bytes
        load = watch.first.load()
        assert load.prefix_hit_tokens == sum(cached.values())
        assert load.prefix_queried_tokens == sum(len(request.prompt_ids) for request in watch.requests)
        assert load.cached_blocks > 0 and load.free_blocks == load.total_blocks

    picture_end = 5 + len(_pictures(watch.requests[0]))
    for name in ("its second turn", "its third turn", "the same again", "drawn", "that tenant again"):
        assert cached[name] >= picture_end, name
    for name in ("the same picture elsewhere", "another picture of the same size", "other pixel bounds"):
        assert cached[name] < 16, name
    assert cached["another tenant"] == 0
    assert picture_end <= cached["another behind the same picture"]


def _pictures(request: EngineRequest) -> list[int]:
    return [span.offset + at for span in request.media for at in range(span.grid.tokens)]


@pytest.mark.parametrize("roles", [COLOCATED, SPLIT])
@pytest.mark.parametrize("options", [{}, {"kv_cache_gib": 0.0005}, {"max_batched_tokens": 9, "max_num_seqs": 4}])
async def test_any_order_and_company_gives_the_same_tokens(
    roles: tuple[EngineRole, ...], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when most of what was cached has to make room, and running replies too."""
    evicted: list[int] = []
    evict = BlockPool._evict
    monkeypatch.setattr(BlockPool, "_evict", lambda pool: evicted.append(evict(pool)) or evicted[-1])
    expected = await uncached()
    names = [*CALLS, *CALLS]
    random.Random(0).shuffle(names)
    async with watched(*roles, **options) as watch:

        async def ask(name: str) -> None:
            tokens: list[int] = []
            async for event in watch.cluster.parts.router.generate(CALLS[name]):
                if isinstance(event, Delta):
                    tokens += event.token_ids
            assert tokens == expected[name], name

        for start in range(0, len(names), 6):
            await asyncio.gather(*(ask(name) for name in names[start : start + 6]))
        await watch.cluster.wait_clean()
        for engine in watch.cluster.engines:
            assert engine.load().prefix_hit_tokens > 0
        assert bool(evicted) == ("kv_cache_gib" in options)


@pytest.mark.parametrize("roles", [COLOCATED, SPLIT])
async def test_choices_share_the_prompt(roles: tuple[EngineRole, ...]) -> None:
    """Its picture is pulled once and its KV is sent once; the others only bring their last block."""
    async with watched(*roles) as watch:
        await watch.ask(replace(CALLS["a picture"], n=3, temperature=0.9, seed=1))
        request = watch.requests[0]
        assert watch.pulled == list(request.media[0].embedding_keys)
        count = len(request.prompt_ids)
        held = (count - 1) // BLOCK * BLOCK
        if roles == SPLIT:
            assert watch.sent_bytes == watch.kv_bytes(count + 2 * (count - held))
        assert watch.first.load().prefix_hit_tokens == 2 * held


async def test_leaving_at_any_moment_keeps_the_cache_sound() -> None:
    """Half-computed and half-transferred prompts leave only whole, verified blocks behind."""
    rng = random.Random(1)
    expected = await uncached()
    async with watched(*SPLIT, max_batched_tokens=8, max_num_seqs=8) as watch:
        for trial in range(30):
            name = rng.choice([*CALLS])
            asking = asyncio.create_task(watch.ask(CALLS[name]))
            await asyncio.wait([asking], timeout=rng.random() * 0.08)
            asking.cancel()
            await asyncio.wait([asking])
            if trial % 5 == 4:
                await watch.cluster.wait_clean()
        await watch.cluster.wait_clean()
        for name, wanted in CALLS.items():
            assert (await watch.ask(wanted))[0] == expected[name], name


@pytest.mark.parametrize(
    ("roles", "described", "going_on"),
    [
        (COLOCATED * 2, {}, slice(None)),
        ((*SPLIT, *SPLIT), ALWAYS_PAIRS, slice(None)),
        ((*SPLIT, *SPLIT), {}, slice(1, None)),  # the decode engine has all but the question
    ],
)
async def test_a_talk_goes_on_where_its_beginning_is_cached(
    roles: tuple[EngineRole, ...], described: dict[str, Any], going_on: slice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Idle engines are equals but for what they hold: each talk stays with the engines of its first turn, or some."""
    first, second = call(TALK), call(user(VIDEO, "What moves?"))
    more = (assistant("Nothing."), user("Are you sure?"))
    async with in_process_cluster(tiny_checkpoint(), *roles, block_size=BLOCK, described=described) as cluster:
        fleet, router = cluster.parts.fleet, cluster.parts.router
        per_talk = len(roles) // 2
        homes = [cluster.engines[:per_talk], cluster.engines[per_talk:]]
        everyone = fleet.engines
        for home, wanted in zip(homes, (first, second), strict=True):
            known = {engine._incarnation for engine in home}
            monkeypatch.setattr(
                fleet, "engines", lambda known=known: [view for view in everyone() if view.info.incarnation in known]
            )
            assert [event async for event in router.generate(wanted)]
        monkeypatch.setattr(fleet, "engines", everyone)
        kept = {engine._incarnation: engine._links._blocks._present for engine in cluster.engines}
        await eventually(lambda: all(view.cached_blocks == kept[view.info.incarnation] for view in everyone()))
        for home, wanted in zip(homes[::-1], (second, first), strict=True):
            before = [engine.load().prefix_hit_tokens for engine in home]
            events = [event async for event in router.generate(replace(wanted, messages=(*wanted.messages, *more)))]
            assert isinstance(events[-1], Finished) and events[-1].usage.cached_tokens > 12
            gains = [engine.load().prefix_hit_tokens > hits for engine, hits in zip(home, before, strict=True)]
            assert all(gains[going_on]) and sum(gains) == len(home[going_on])
        await cluster.wait_clean()


async def test_prompts_that_are_scored_are_computed_whole() -> None:
    expected = await uncached()
    async with watched(*COLOCATED) as watch:
        for _ in range(2):
            tokens, usage = await watch.ask(replace(CALLS["a picture"], prompt_logprobs=1))
            assert (tokens, usage.cached_tokens) == (expected["a picture"], 0)
        assert (await watch.ask(CALLS["a picture"]))[1].cached_tokens > 0
