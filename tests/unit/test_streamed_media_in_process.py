"""Engines compute pictures while others of the same prompt are still being encoded, on all parts without Ray."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from math import nan

import pytest

from actors.errors import InternalError
from actors.types import EngineRole, Message, MessageRole, Stage, TextPart
from actors.vision_encoder import VisionEncoder
from actors.wire.media import MediaUnit
from actors.wire.tensors import Patches
from cluster.generation import Delta, Event, Finished, GenerateCall
from cluster.router.prompt import PromptKeeper
from tests.in_process import InProcessCluster, in_process_cluster
from tests.media import image_part
from tests.tiny_model import tiny_checkpoint
from tests.waiting import eventually

COLOCATED = (EngineRole.COLOCATED,)
SPLIT = (EngineRole.PREFILL, EngineRole.DECODE)
PICTURES = tuple(image_part(150, 100, seed) for seed in range(4))
CALL = GenerateCall(
    messages=(Message(role=MessageRole.USER, parts=(*PICTURES, TextPart(text="Which of them is the last?"))),),
    temperature=0.0,
    max_tokens=12,
    ignore_eos=True,
    return_token_ids=True,
    return_timings=True,
)


class Held:
    """Holds an encoder back: the units of a prompt, in its order, are encoded when they are ``let``."""

    def __init__(self, encoder: VisionEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun = 0
        self._gates = [asyncio.Event() for _ in PICTURES]
        pull = encoder._queue._pull

        async def held(address: str, unit: MediaUnit, lease: str) -> Patches:
            gate = self._gates[self.begun]
            self.begun += 1
            await gate.wait()
            return await pull(address, unit, lease)

        monkeypatch.setattr(encoder._queue, "_pull", held)

    def let(self, unit: int) -> None:
        self._gates[unit].set()


def computed(cluster: InProcessCluster) -> int:
    """Tokens of the only prompt that the engine it begins at has computed."""
    return sum(sequence.computed for sequence in cluster.engines[0]._engine._scheduler.roster.by_key.values())


def stage(cluster: InProcessCluster) -> Stage:
    (run,) = cluster.parts.router._active.values()
    return run.timeline.stage


def ask(cluster: InProcessCluster, call: GenerateCall = CALL) -> asyncio.Task[list[Event]]:
    async def collect() -> list[Event]:
        return [event async for event in cluster.parts.router.generate(call)]

    return asyncio.create_task(collect())


def tokens(events: list[Event]) -> list[int]:
    return [token for event in events if isinstance(event, Delta) for token in event.token_ids]


_alone: list[list[int]] = []


async def alone() -> list[int]:
    """The reference: nothing is held back."""
    if not _alone:
        async with in_process_cluster(tiny_checkpoint(), *COLOCATED) as cluster:
            _alone.append(tokens(await ask(cluster)))
    return _alone[0]


@pytest.mark.parametrize("roles", [COLOCATED, SPLIT])
async def test_each_picture_is_computed_before_the_next_is_encoded(
    roles: tuple[EngineRole, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = await alone()
    async with in_process_cluster(tiny_checkpoint(), *roles) as cluster:
        encoder = Held(cluster.encoder, monkeypatch)
        task = ask(cluster)
        await eventually(lambda: encoder.begun == len(PICTURES))
        assert stage(cluster) is Stage.ENCODE and not cluster.engines[0]._attempts
        encoder.let(0)
        await eventually(lambda: bool(cluster.engines[0]._attempts))
        (run,) = cluster.parts.router._active.values()
        for number, span in enumerate(run._keeper.prompt.spans[1:], start=1):
            # All of the prompt up to the picture that is missing, and no more.
            await eventually(lambda start=span.offset: computed(cluster) == start)
            await eventually(lambda: stage(cluster) is Stage.ENCODE)
            encoder.let(number)
        events = await task
        await cluster.wait_clean()
    assert tokens(events) == expected
    (finished,) = [event for event in events if isinstance(event, Finished)]
    assert finished.timings is not None and finished.timings.exposed[Stage.ENCODE] > 0


async def test_an_encoder_dies_after_it_gave_some_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = await alone()
    async with in_process_cluster(tiny_checkpoint(), *SPLIT, encoders=2) as cluster:
        holds = {encoder.identity.address: Held(encoder, monkeypatch) for encoder in cluster.encoders}
        task = ask(cluster)
        await eventually(lambda: any(held.begun for held in holds.values()))
        (first,) = [held for held in holds.values() if held.begun]
        first.let(0)
        await eventually(lambda: computed(cluster) > 0 and stage(cluster) is Stage.ENCODE)
        (victim,) = [encoder for encoder in cluster.encoders if holds[encoder.identity.address] is first]
        (other,) = [held for held in holds.values() if held is not first]
        for number in range(len(PICTURES)):
            other.let(number)
        await cluster.kill(victim)
        assert tokens(await task) == expected
        await cluster.wait_clean()


async def test_a_picture_of_which_no_embedding_can_be_made_fails_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    async with in_process_cluster(tiny_checkpoint(), *SPLIT) as cluster:
        encoder = Held(cluster.encoder, monkeypatch)
        task = ask(cluster)
        encoder.let(0)
        await eventually(lambda: computed(cluster) > 0 and stage(cluster) is Stage.ENCODE)
        forward = cluster.encoder._queue._encode
        monkeypatch.setattr(cluster.encoder._queue, "_encode", lambda *args: [one * nan for one in forward(*args)])
        for number in range(1, len(PICTURES)):
            encoder.let(number)
        with pytest.raises(InternalError, match="not finite"):
            await task
        await cluster.wait_clean()


async def test_leaving_while_pictures_are_encoded_frees_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    async with in_process_cluster(tiny_checkpoint(), *SPLIT) as cluster:
        encoder = Held(cluster.encoder, monkeypatch)
        task = ask(cluster)
        encoder.let(0)
        await eventually(lambda: computed(cluster) > 0 and stage(cluster) is Stage.ENCODE)
        task.cancel()
        await cluster.wait_clean()


@pytest.mark.parametrize("roles", [COLOCATED, SPLIT])
async def test_pictures_in_the_prefix_cache_are_not_encoded(
    roles: tuple[EngineRole, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The encoder has forgotten them, and is not asked."""
    expected = await alone()
    async with in_process_cluster(tiny_checkpoint(), *roles, embedding_cache_bytes=0) as cluster:
        assert tokens(await ask(cluster)) == expected
        fleet = cluster.parts.fleet
        await eventually(lambda: all(view.cached_blocks for view in fleet.engines()))
        encoder = Held(cluster.encoder, monkeypatch)
        assert tokens(await ask(cluster)) == expected
        assert encoder.begun == 0
        await cluster.wait_clean()


async def test_an_engine_that_lost_the_pictures_it_was_said_to_hold_asks_for_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = await alone()
    async with in_process_cluster(tiny_checkpoint(), *SPLIT) as cluster:
        prefill = cluster.engines[0]._info
        monkeypatch.setattr(PromptKeeper, "_holder", lambda *_: prefill)
        assert tokens(await ask(cluster)) == expected
        assert cluster.engines[0]._puller.misses
        await cluster.wait_clean()


async def test_an_engine_keeps_what_it_pulled_for_other_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture that comes again elsewhere in a prompt is in no prefix cache."""
    async with in_process_cluster(tiny_checkpoint(), *SPLIT) as cluster:
        pulled: list[bytes] = []
        media = cluster.engines[0]._media
        pull = media.pull_embedding

        async def counted(address: str, key: bytes, *args: object, **kwargs: object) -> object:
            pulled.append(key)
            return await pull(address, key, *args, **kwargs)  # type: ignore[arg-type]

        monkeypatch.setattr(media, "pull_embedding", counted)
        await ask(cluster)
        assert len(pulled) == len(set(pulled)) == len(PICTURES)
        other = image_part(150, 100, 99)
        message = Message(role=MessageRole.USER, parts=(TextPart(text="And now?"), *PICTURES[::-1], other))
        again = await ask(cluster, replace(CALL, messages=(message,)))
        assert len(tokens(again)) == CALL.max_tokens and len(pulled) == len(PICTURES) + 1
        await cluster.wait_clean()
