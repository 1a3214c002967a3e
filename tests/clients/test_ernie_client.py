"""The client that comes with the package, both faces, through the real proxies."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from cluster.client import AsyncClient, Client, Delta, generate_request
from cluster.client.looking import Looking, look, look_async
from cluster.demo import Sample
from tests.cluster.launcher import LaunchedCluster

LONG = 4000


@pytest.fixture
def client(cluster: LaunchedCluster) -> Iterator[Client]:
    with Client(cluster.grpc_address) as found:
        yield found


def test_true_answers(client: Client, samples: dict[str, Sample]) -> None:
    picture, clip, thought = samples["picture"], samples["clip"], samples["thought"]
    reply = client.chat(picture.question.text, images=[picture.content], temperature=0, timeout_s=60)
    assert reply.text.strip() == picture.question.answer
    reply = client.chat(clip.question.text, videos=[clip.content], temperature=0, timeout_s=60)
    assert reply.text.strip() == clip.question.answer
    options = {"images": [thought.content], "enable_thinking": True, "return_timings": True}
    with client.stream(thought.question.text, temperature=0, timeout_s=60, **options) as events:
        text = "".join(event.text for event in events if isinstance(event, Delta))
        reply = events.rest()
    assert text == reply.text and reply.text.strip() == thought.question.answer
    assert reply.reasoning and reply.timings is not None and "prefill" in reply.timings.exposed


async def test_looking_closer(cluster: LaunchedCluster, client: Client, samples: dict[str, Sample]) -> None:
    sample = samples["number"]
    request = generate_request(sample.question.text, images=[sample.content], temperature=0, timeout_s=60)
    looking = Looking(request)
    assert look(client, looking).text.strip() == sample.question.answer
    assert len(looking.looks) == 1
    async with AsyncClient(cluster.grpc_address) as other:
        assert (await look_async(other, Looking(request))).text.strip() == sample.question.answer


async def test_what_is_cancelled_frees_everything(cluster: LaunchedCluster, client: Client) -> None:
    options = {"max_tokens": LONG, "ignore_eos": True, "timeout_s": 60}
    with client.stream("Tell me a story", **options) as events:
        assert [next(events) for _ in range(3)]
    async with AsyncClient(cluster.grpc_address) as other:
        async with other.stream("Tell me a story", **options) as stream:
            await anext(stream)
        task = asyncio.ensure_future(other.chat("Tell me a story", **options))
        await asyncio.sleep(0.3)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.to_thread(cluster.wait_clean, within_s=10)


def test_models_and_counts(client: Client, samples: dict[str, Sample]) -> None:
    assert [model.name for model in client.models()] == ["nano"]
    counted = client.count_tokens("What?", images=[samples["picture"].content])
    assert 0 < counted.media_tokens < counted.tokens
