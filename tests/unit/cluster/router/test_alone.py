"""Short texts are computed where they are decoded, and only there where that is possible."""

from __future__ import annotations

import pytest

from actors.types import AttemptMode, EngineRole, FinishReason
from tests.unit.cluster.router.world import text_of, world

PREFILL, DECODE = EngineRole.PREFILL, EngineRole.DECODE


async def test_a_short_text_takes_one_engine() -> None:
    async with world(PREFILL, DECODE, alone_tokens=8) as w:
        prefill, decode = w.engines
        task = w.ask()
        key, _, mode = await decode.taken()
        assert mode is AttemptMode.COLOCATED and prefill.submits.empty()
        decode.say(key, 0, 0, 1, finish=FinishReason.LENGTH)
        assert text_of(await task) == "ab"
        assert w.router.explain(key.request_id)["notes"][2]["candidates"][0]["name"] == "e1 alone"


@pytest.mark.parametrize(
    ("prompt_ids", "alone_tokens"),
    [
        ((5, 90, 7), 8),  # an id for the vision experts, though there is no picture
        (tuple(range(9)), 8),
        ((5, 6, 7), 0),
    ],
)
async def test_others_take_two(prompt_ids: tuple[int, ...], alone_tokens: int) -> None:
    async with world(PREFILL, DECODE, alone_tokens=alone_tokens) as w:
        w.stages.prompt_ids = prompt_ids
        prefill, decode = w.engines
        task = w.ask()
        key, _, mode = await prefill.taken()
        _, _, other = await decode.taken()
        assert (mode, other) == (AttemptMode.PREFILL, AttemptMode.DECODE)
        prefill.say(key, 0, 0, finish=FinishReason.LENGTH)
        await task


async def test_without_a_prefill_engine_texts_are_still_answered() -> None:
    async with world(DECODE, alone_tokens=8) as w:
        task = w.ask()
        key, _, _ = await w.engines[0].taken()
        w.engines[0].say(key, 0, 0, finish=FinishReason.LENGTH)
        assert text_of(await task) == "a"
