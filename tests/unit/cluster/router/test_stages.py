"""What the router makes of preprocessors and encoders that answer late, fail or are lost."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import ray.exceptions
import ray.serve.exceptions

from actors.errors import InvalidRequest, ServingError, Unavailable
from actors.types import EncoderInfo, Grid, MediaKind, PreprocessReply, PreprocessRequest, PromptMedia
from actors.wire.media_client import MediaClient
from cluster.router.leases import LeaseKeeper
from cluster.router.stages import EncodeStage, PreprocessStage
from tests.in_process import Handle

IMAGE = PromptMedia(kind=MediaKind.IMAGE, offset=0, grid=Grid(1, 2, 2), content_keys=(b"c" * 32,))
REPLY = PreprocessReply(
    prompt_ids=(1,), media=(IMAGE,), starts_thinking=False, media_address="pre:1", incarnation="p", busy_s=0.0
)


class Places:
    """Notes what was released."""

    def __init__(self) -> None:
        self.released: list[tuple[str, str]] = []

    async def renew(self, address: str, leases: list[str]) -> list[str]:
        return []

    async def release(self, address: str, leases: list[str]) -> None:
        self.released += [(address, lease) for lease in leases]


class Preprocessor:
    """Answers, or raises, once it may."""

    def __init__(self, outcome: PreprocessReply | Exception = REPLY) -> None:
        self.outcome = outcome
        self.called = asyncio.Event()
        self.go = asyncio.Event()
        self.go.set()

    async def preprocess(self, request: PreprocessRequest) -> PreprocessReply:
        self.called.set()
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            await self.go.wait()  # as when Serve's cancellation does not arrive
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome


def request(**fields: Any) -> PreprocessRequest:
    return PreprocessRequest(lease="r-1#1", messages=(), max_prompt_tokens=10, **fields)


@pytest.mark.parametrize(("kept", "count"), [(True, 1), (False, 0)])
async def test_only_patches_that_are_kept_are_held(kept: bool, count: int) -> None:
    leases = LeaseKeeper(Places())
    assert await PreprocessStage(Handle(Preprocessor()), leases).run(request(keep_patches=kept)) == REPLY
    assert leases.count == count


async def test_patches_of_a_late_answer_are_released() -> None:
    places, preprocessor = Places(), Preprocessor()
    preprocessor.go.clear()
    leases = LeaseKeeper(places)
    run = asyncio.create_task(PreprocessStage(Handle(preprocessor), leases).run(request()))
    await preprocessor.called.wait()
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
    preprocessor.go.set()
    async with asyncio.timeout(5):
        while not places.released:
            await asyncio.sleep(0.005)
    assert places.released == [("pre:1", "r-1#1")] and leases.count == 0


@pytest.mark.parametrize(
    ("outcome", "expected", "reason"),
    [
        (InvalidRequest("bad", field="messages"), InvalidRequest, "INVALID_FIELD"),
        (ray.exceptions.ActorDiedError(), Unavailable, "STAGE_LOST"),
        (ray.serve.exceptions.DeploymentUnavailableError(None), Unavailable, "STAGE_LOST"),
    ],
)
async def test_errors_of_a_preprocessor(outcome: Exception, expected: type[ServingError], reason: str) -> None:
    stage = PreprocessStage(Handle(Preprocessor(outcome)), LeaseKeeper(Places()))
    with pytest.raises(expected) as caught:
        await stage.run(request())
    assert caught.value.reason == reason
    assert (caught.value.retry_after_s is not None) == (expected is Unavailable)


async def test_a_lost_encoder_is_told_without_its_address() -> None:
    client = MediaClient()
    encoder = EncoderInfo(encoder_id="v", incarnation="v", address="127.0.0.1:1", fingerprint="f", dtype="float64")
    stage = EncodeStage(client, LeaseKeeper(Places()))
    with pytest.raises(Unavailable, match="a vision encoder was lost; send the request again") as caught:
        await stage.run(encoder, (IMAGE,), lease="r-1#2", patch_address="pre:1", timeout_s=5)
    assert "127.0.0.1" not in caught.value.message and caught.value.retry_after_s is not None
    await client.close()
