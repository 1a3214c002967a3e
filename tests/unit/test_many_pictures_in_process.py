"""Two hundred requests with pictures at once: each ends once, whatever its client does, and nothing is held after."""

from __future__ import annotations

import asyncio
import random
from collections import Counter

from actors.errors import DeadlineExceeded, RequestCancelled, ServingError
from actors.types import EngineRole, FinishReason, Message, MessageRole, TextPart
from cluster.generation import ChoiceFinished, Finished, GenerateCall
from tests.in_process import InProcessCluster, in_process_cluster
from tests.media import image_part
from tests.tiny_model import tiny_checkpoint

REQUESTS = 200
LEAVE, CANCEL, LATE, STAY = "leaves", "is cancelled by name", "has no time", "stays"


def call(number: int, fate: str) -> GenerateCall:
    picture = image_part(56, 56, number % 40)
    message = Message(role=MessageRole.USER, parts=(picture, TextPart(text=f"What is number {number}?")))
    return GenerateCall(
        messages=(message,),
        request_id=f"request-{number}",
        temperature=0.0,
        max_tokens=4 if fate in (STAY, LATE) else 1000,
        ignore_eos=True,
        timeout_s=0.001 if fate == LATE else None,
    )


async def outcome(cluster: InProcessCluster, number: int, fate: str) -> str:
    """The one way it ended; fails where it ended twice or not at all."""
    endings: list[str] = []
    try:
        async for event in cluster.parts.router.generate(call(number, fate)):
            assert not endings or not endings[-1].startswith("over"), "something came behind the end"
            if isinstance(event, ChoiceFinished):
                endings.append(str(event.reason))
            elif isinstance(event, Finished):
                endings.append("over")
    except ServingError as error:
        endings.append(error.reason)
    assert len(endings) in (1, 2) and (endings[-1] == "over") == (len(endings) == 2), endings
    return endings[0]


async def test_each_of_two_hundred_ends_once_and_leaves_nothing() -> None:
    draw = random.Random(3)
    fates = [draw.choice([LEAVE, CANCEL, LATE, STAY, STAY, STAY]) for _ in range(REQUESTS)]
    async with in_process_cluster(
        tiny_checkpoint(), EngineRole.PREFILL, EngineRole.DECODE, kv_cache_gib=0.02, max_num_seqs=32
    ) as cluster:
        router = cluster.parts.router
        asking = [asyncio.create_task(outcome(cluster, number, fate)) for number, fate in enumerate(fates)]
        while router.active_count < REQUESTS // 2:
            await asyncio.sleep(0)
        for number, fate in enumerate(fates):
            await asyncio.sleep(draw.random() * 0.01)
            if fate == LEAVE:
                asking[number].cancel()
            elif fate == CANCEL:
                await router.cancel(f"request-{number}")
        found = await asyncio.gather(*asking, return_exceptions=True)
        await cluster.wait_clean()
    expected = {
        LEAVE: {asyncio.CancelledError},
        CANCEL: {str(FinishReason.CANCELLED), RequestCancelled.default_reason},
        LATE: {DeadlineExceeded.default_reason},
        STAY: {str(FinishReason.LENGTH)},
    }
    for fate, ended in zip(fates, found, strict=True):
        assert (type(ended) if isinstance(ended, BaseException) else ended) in expected[fate], (fate, ended)
    assert sum(Counter(fates).values()) == REQUESTS and min(Counter(fates).values()) > 20
