"""What the router makes of preprocessors and encoders that answer late, fail or are lost."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import ray.exceptions
import ray.serve.exceptions

from actors.errors import InvalidRequest, ServingError, Unavailable
from actors.reports import EncoderInfo
from actors.types import Grid, MediaKind, PreprocessReply, PreprocessRequest, PromptMedia
from actors.wire.media import EncodedUnit
from actors.wire.media_client import MediaClient
from cluster.router.leases import LeaseKeeper
from cluster.router.retry_budget import RetryBudget
from cluster.router.stages import EncodeStage, MissingPatches, PreprocessStage, StageLost
from tests.in_process import Handle
from tests.waiting import eventually

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


class Pool:
    """A Serve handle of several: each call goes to the next."""

    def __init__(self, *replicas: Preprocessor) -> None:
        self._next = itertools.cycle(replicas)
        self.requests: list[PreprocessRequest] = []

    async def preprocess(self, request: PreprocessRequest) -> PreprocessReply:
        self.requests.append(request)
        return await next(self._next).preprocess(request)


def stage_of(
    pool: Any,
    leases: LeaseKeeper,
    *,
    hedge_after_s: float = 5.0,
    timeout_s: float = 10.0,
    burst: float = 8,
    places: Sequence[str] = ("pre:1", "pre:2"),
) -> PreprocessStage:
    budget = RetryBudget(share=0.0, burst=burst, clock=lambda: 0.0)
    bounds = {"hedge_after_s": hedge_after_s, "timeout_s": timeout_s}
    return PreprocessStage(Handle(pool), leases, budget, places=lambda: places, **bounds)


def request(**fields: Any) -> PreprocessRequest:
    return PreprocessRequest(lease="r-1#1", messages=(), max_prompt_tokens=10, **fields)


@pytest.mark.parametrize(("kept", "count"), [(True, 1), (False, 0)])
async def test_only_patches_that_are_kept_are_held(kept: bool, count: int) -> None:
    leases = LeaseKeeper(Places())
    done = await stage_of(Preprocessor(), leases).run(request(keep_patches=kept))
    assert (done.reply, done.lease) == (REPLY, "r-1#1")
    assert leases.count == count


async def leave_during(preprocessor: Preprocessor, leases: LeaseKeeper) -> None:
    """A request that is cancelled while the preprocessor works on it."""
    preprocessor.go.clear()
    run = asyncio.create_task(stage_of(preprocessor, leases).run(request()))
    await preprocessor.called.wait()
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run


async def test_patches_of_a_late_answer_are_released() -> None:
    places, preprocessor = Places(), Preprocessor()
    leases = LeaseKeeper(places)
    await leave_during(preprocessor, leases)
    preprocessor.go.set()
    await eventually(lambda: places.released)
    assert places.released == [("pre:1", "r-1#1")] and leases.count == 0


ELSEWHERE = replace(REPLY, media_address="pre:2", incarnation="q")


async def test_patches_go_back_wherever_the_answer_was_lost() -> None:
    class Obedient(Preprocessor):
        async def preprocess(self, request: PreprocessRequest) -> PreprocessReply:
            self.called.set()
            await self.go.wait()
            return REPLY

    places, preprocessor = Places(), Obedient()
    leases = LeaseKeeper(places)
    await leave_during(preprocessor, leases)
    await eventually(lambda: len(places.released) == 2)
    assert places.released == [("pre:1", "r-1#1"), ("pre:2", "r-1#1")] and leases.count == 0


@pytest.mark.parametrize(
    ("lost", "told"),
    [
        (asyncio.CancelledError, asyncio.CancelledError),  # Serve ends all calls that were made for a client who left
        (ray.exceptions.ActorDiedError, StageLost),
    ],
)
async def test_patches_of_a_call_that_ends_by_itself_go_back(
    lost: type[BaseException], told: type[BaseException]
) -> None:
    class Lost(Preprocessor):
        async def preprocess(self, request: PreprocessRequest) -> PreprocessReply:
            raise lost

    places = Places()
    leases = LeaseKeeper(places)
    with pytest.raises(told):
        await stage_of(Lost(), leases).run(request())
    await eventually(lambda: len(places.released) == 2)
    assert places.released == [("pre:1", "r-1#1"), ("pre:2", "r-1#1")] and leases.count == 0


async def test_a_hedge_takes_over_and_the_late_answer_is_released() -> None:
    places, slow, quick = Places(), Preprocessor(), Preprocessor(ELSEWHERE)
    slow.go.clear()
    leases, pool = LeaseKeeper(places), Pool(slow, quick)
    done = await stage_of(pool, leases, hedge_after_s=0.01).run(request())
    assert (done.reply, done.lease) == (ELSEWHERE, "r-1#1+")
    assert [asked.lease for asked in pool.requests] == ["r-1#1", "r-1#1+"]
    slow.go.set()
    await eventually(lambda: places.released)
    assert places.released == [("pre:1", "r-1#1")] and leases.count == 1


async def test_a_preprocessor_alone_is_not_asked_twice() -> None:
    places, only = Places(), Preprocessor()
    only.go.clear()
    pool = Pool(only)
    stage = stage_of(pool, LeaseKeeper(places), hedge_after_s=0.01, places=["pre:1"])
    run = asyncio.create_task(stage.run(request()))
    await asyncio.sleep(0.1)
    only.go.set()
    assert (await run).lease == "r-1#1" and len(pool.requests) == 1


async def test_the_first_answer_may_still_win_and_a_lost_one_does_not() -> None:
    slow, hedge = Preprocessor(), Preprocessor(ray.exceptions.ActorDiedError())
    slow.go.clear()
    run = asyncio.create_task(stage_of(Pool(slow, hedge), LeaseKeeper(Places()), hedge_after_s=0.01).run(request()))
    await hedge.called.wait()
    await asyncio.sleep(0.02)
    assert not run.done()
    slow.go.set()
    assert (await run).lease == "r-1#1"


async def test_no_hedge_without_a_retry_to_spare() -> None:
    slow, quick = Preprocessor(), Preprocessor(ELSEWHERE)
    slow.go.clear()
    run = asyncio.create_task(
        stage_of(Pool(slow, quick), LeaseKeeper(Places()), hedge_after_s=0.01, burst=0).run(request())
    )
    await slow.called.wait()
    await asyncio.sleep(0.03)
    assert not quick.called.is_set()
    slow.go.set()
    assert (await run).reply == REPLY


async def test_no_answer_in_time_is_a_loss() -> None:
    slow = Preprocessor()
    slow.go.clear()
    with pytest.raises(Unavailable) as caught:
        await stage_of(slow, LeaseKeeper(Places()), hedge_after_s=0.01, timeout_s=0.05).run(request())
    assert caught.value.reason == "STAGE_LOST"
    slow.go.set()


def no_unit(unit: EncodedUnit) -> None:
    raise AssertionError(f"{unit} was told")


class Frozen(Places):
    """Places of which some do not answer; the encoder says nothing either."""

    def __init__(self, silent: str) -> None:
        super().__init__()
        self._silent = silent

    async def renew(self, address: str, leases: list[str]) -> list[str]:
        if address == self._silent:
            raise Unavailable("no answer", reason="STAGE_LOST")
        return []

    async def encode(self, address: str, **_: object) -> AsyncIterator[Any]:
        await asyncio.Event().wait()
        yield


@pytest.mark.parametrize(("silent", "raised"), [("enc:1", Unavailable), ("pre:1", MissingPatches)])
async def test_a_frozen_place_is_given_up(
    silent: str, raised: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.router.leases.RENEW_S", 0.01)
    places = Frozen(silent)
    leases = LeaseKeeper(places, lost_after_s=0.2, suspect_after_s=0.05)
    leases.start()
    leases.hold("pre:1", "r-1#1")
    encoder = EncoderInfo(encoder_id="v", incarnation="v", address="enc:1", fingerprint="ff", dtype="float64")
    with pytest.raises(raised):
        await EncodeStage(places, leases).run(  # type: ignore[arg-type]
            encoder, (IMAGE,), lease="r-1#2", patch_address="pre:1", timeout_s=5, on_unit=no_unit
        )
    assert leases.doubts(silent)
    await eventually(lambda: not leases.doubts("enc:1" if silent == "pre:1" else "pre:1"))
    await leases.close()


class Deaf(Frozen):
    """Misses every other renewal."""

    def __init__(self) -> None:
        super().__init__("")
        self.asked = 0

    async def renew(self, address: str, leases: list[str]) -> list[str]:
        self.asked += 1
        if self.asked % 2:
            await asyncio.sleep(0.05)
            raise Unavailable("no answer", reason="STAGE_LOST")
        return []


async def test_a_missed_renewal_is_made_up_for_at_once() -> None:
    places = Deaf()
    leases = LeaseKeeper(places)
    leases.hold("enc:1", "r-1#1")
    leases._heard_at["enc:1"] -= 2.9
    leases._renewals["enc:1"] = asyncio.create_task(leases._renew_at("enc:1"))
    await leases._renewals["enc:1"]
    assert places.asked == 2 and leases._silent_s("enc:1") < 2.9 and not leases._renewals


@pytest.mark.parametrize(
    ("outcome", "expected", "reason"),
    [
        (InvalidRequest("bad", field="messages"), InvalidRequest, "INVALID_FIELD"),
        (ray.exceptions.ActorDiedError(), Unavailable, "STAGE_LOST"),
        (ray.serve.exceptions.DeploymentUnavailableError(None), Unavailable, "STAGE_LOST"),
    ],
)
async def test_errors_of_a_preprocessor(outcome: Exception, expected: type[ServingError], reason: str) -> None:
    stage = stage_of(Preprocessor(outcome), LeaseKeeper(Places()))
    with pytest.raises(expected) as caught:
        await stage.run(request())
    assert caught.value.reason == reason
    died = isinstance(outcome, ray.exceptions.ActorDiedError)
    assert getattr(caught.value, "died", False) == died
    assert (caught.value.retry_after_s is not None) == (expected is Unavailable)


async def test_a_lost_encoder_is_told_without_its_address() -> None:
    client = MediaClient()
    encoder = EncoderInfo(encoder_id="v", incarnation="v", address="127.0.0.1:1", fingerprint="ff", dtype="float64")
    stage = EncodeStage(client, LeaseKeeper(Places()))
    with pytest.raises(Unavailable, match="a vision encoder was lost") as caught:
        await stage.run(encoder, (IMAGE,), lease="r-1#2", patch_address="pre:1", timeout_s=5, on_unit=no_unit)
    assert "127.0.0.1" not in caught.value.message and caught.value.retry_after_s is not None
    await client.close()
    assert stage._leases.doubts(encoder.address)


class Other(Places):
    """An encoder of other weights than the registry says."""

    async def encode(self, address: str, **_: object) -> AsyncIterator[EncodedUnit]:
        yield EncodedUnit(content_key=IMAGE.content_keys[0], embedding_key=b"other" * 6)


async def test_an_encoder_that_is_not_the_one_known_at_its_address_is_lost() -> None:
    places = Other()
    encoder = EncoderInfo(encoder_id="v", incarnation="v", address="enc:1", fingerprint="ff", dtype="float64")
    stage = EncodeStage(places, LeaseKeeper(places))  # type: ignore[arg-type]
    with pytest.raises(StageLost):
        await stage.run(encoder, (IMAGE,), lease="r-1#2", patch_address="pre:1", timeout_s=5, on_unit=no_unit)
