"""A decode engine goes on with what it has: prompts with pictures in its cache take no transfer, and answers stay."""

from __future__ import annotations

from typing import Any

import pytest

from actors.types import ContentPart, EngineRole, Message, MessageRole, TextPart
from cluster.generation import Delta, GenerateCall
from cluster.policy import choose
from tests.in_process import InProcessCluster, in_process_cluster
from tests.media import image_part, video_part
from tests.tiny_model import tiny_checkpoint

SPLIT = (EngineRole.PREFILL, EngineRole.DECODE)
PROMPTS: tuple[tuple[ContentPart, ...], ...] = (
    (image_part(150, 100, 1), TextPart(text="What is this? " * 8)),
    (video_part(96, 64, 24, 12, 4), TextPart(text="What moves? " * 8)),
)
TEXT = (TextPart(text="Count to ten."),)


async def ask(cluster: InProcessCluster, parts: tuple[ContentPart, ...]) -> tuple[list[int], list[dict[str, Any]]]:
    """Token ids, and what the router noted of routes and attempts."""
    call = GenerateCall(
        messages=(Message(role=MessageRole.USER, parts=parts),),
        request_id="mine",
        temperature=0.0,
        max_tokens=24,
        ignore_eos=True,
        return_token_ids=True,
    )
    ids = [
        token
        async for event in cluster.parts.router.generate(call)
        if isinstance(event, Delta)
        for token in event.token_ids
    ]
    await cluster.wait_clean()
    notes = cluster.parts.router.explain("mine")["notes"]
    return ids, [note for note in notes if note["what"] in ("route", "attempt_ended")]


def ways(notes: list[dict[str, Any]]) -> list[str]:
    return [note["candidates"][0]["name"].partition(" ")[2] or "" for note in notes if note["what"] == "route"]


async def test_what_a_decode_engine_has_is_not_sent_again() -> None:
    async with in_process_cluster(tiny_checkpoint(), *SPLIT) as cluster:
        (_, decode) = (engine._info.engine_id for engine in cluster.engines)
        for parts in (*PROMPTS, TEXT):
            first, before = await ask(cluster, parts)
            again, after = await ask(cluster, parts)
            assert ways(before) == (["alone"] if parts is TEXT else [f"-> {decode}"])
            assert ways(after) == ["alone"] and again == first
            assert after[0]["prefill"] == after[0]["decode"] == decode


async def test_a_wrong_belief_costs_an_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    async with in_process_cluster(tiny_checkpoint(), *SPLIT) as cluster:
        known = choose.cached_tokens
        monkeypatch.setattr(choose, "cached_tokens", lambda view, count, hashes: count - 1)
        found, notes = await ask(cluster, PROMPTS[0])
        assert [note.get("reason") for note in notes] == [None, "NOT_CACHED", None]
        assert ways(notes)[0] == "alone" and ways(notes)[1].startswith("->")
        monkeypatch.setattr(choose, "cached_tokens", known)
        assert (await ask(cluster, PROMPTS[0]))[0] == found
