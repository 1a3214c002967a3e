"""The router's calls to preprocessors and vision encoders: deadlines, hedges, late answers and lost places."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ray.exceptions
import ray.serve.exceptions

from actors.errors import ServingError, Unavailable
from actors.reports import EncoderInfo
from actors.types import MediaSpan, PreprocessReply, PreprocessRequest, PromptMedia
from actors.wire.media import EncodedUnit, embedding_key, units_of
from actors.wire.media_client import MediaClient
from cluster.router.leases import LeaseKeeper
from cluster.router.retry_budget import RetryBudget
from cluster.serve_errors import own_error

log = logging.getLogger(__name__)


class StageLost(Unavailable):
    """A preprocessor or an encoder died, fell silent or took too long: another one may do the same work."""

    default_reason = "STAGE_LOST"

    def __init__(self, what: str, *, died: bool = False) -> None:
        """``died``: its process ended, and so perhaps because of what it was asked."""
        super().__init__(f"{what} was lost", retry_after_s=1.0)
        self.died = died


@dataclass(frozen=True, kw_only=True, slots=True)
class Preprocessed:
    """A prompt and the lease its patches wait under, which is one of the request's and not always the one it named."""

    reply: PreprocessReply
    lease: str
    calls: int = 1
    """2 with a hedge."""


class _Call:
    """One call of the pool."""

    def __init__(self, handle: Any, request: PreprocessRequest) -> None:
        self.request = request
        self._response = handle.preprocess.remote(request)
        self.answer = asyncio.ensure_future(_answer(self._response))

    def cancel(self) -> None:
        self._response.cancel()


class PreprocessStage:
    """Calls the preprocessor pool through its Serve handle: with a deadline, and with one hedge, which goes to
    whichever replica Serve picks then.

    Args:
        places: addresses of the preprocessors there are now; one alone would only do the same work twice at once.
        hedge_after_s: silence after which the same is asked once more, if the budget has a retry to spare.
        timeout_s: after this the call counts as lost.
    """

    def __init__(
        self,
        handle: Any,
        leases: LeaseKeeper,
        budget: RetryBudget,
        *,
        places: Callable[[], Sequence[str]],
        hedge_after_s: float,
        timeout_s: float,
    ) -> None:
        self._handle = handle
        self._leases = leases
        self._budget = budget
        self._places = places
        self._hedge_after_s = hedge_after_s
        self._timeout_s = timeout_s
        self._late: set[asyncio.Task[None]] = set()

    async def run(self, request: PreprocessRequest) -> Preprocessed:
        """Returns the prompt; its patches, if kept, stay under the lease that is named, which is held from here on.

        Raises:
            StageLost: the preprocessor died or took too long.
            ServingError: what the preprocessor says of the request.
        """
        calls = [_Call(self._handle, request)]
        winner: _Call | None = None
        try:
            async with asyncio.timeout(self._timeout_s):
                first = await self._first_answer(calls)
            reply = first.answer.result()
            winner = first
        except TimeoutError:
            log.warning("no preprocessor answered %s within %g s", request.lease, self._timeout_s)
            raise StageLost("a preprocessor") from None
        finally:
            for call in calls:
                if call is not winner:
                    self._give_up(call)
        if _keeps(winner.request, reply):
            self._leases.hold(reply.media_address, winner.request.lease)
        return Preprocessed(reply=reply, lease=winner.request.lease, calls=len(calls))

    async def _first_answer(self, calls: list[_Call]) -> _Call:
        """The first call that is answered; of calls that are lost, the last. Adds the hedge to ``calls``."""
        (first,) = calls
        done, _ = await asyncio.wait([first.answer], timeout=self._hedge_after_s)
        if not done and len(self._places()) > 1 and self._budget.try_spend():
            log.warning("no preprocessor answered %s yet: asking once more", first.request.lease)
            calls.append(_Call(self._handle, replace(first.request, lease=f"{first.request.lease}+")))
        waiting = list(calls)
        while True:
            await asyncio.wait([call.answer for call in waiting], return_when=asyncio.FIRST_COMPLETED)
            for call in [call for call in waiting if call.answer.done()]:
                waiting.remove(call)
                if not waiting or not isinstance(call.answer.exception(), StageLost):
                    return call

    def _give_up(self, call: _Call) -> None:
        call.cancel()
        task = asyncio.get_running_loop().create_task(self._release_late(call))
        self._late.add(task)
        task.add_done_callback(self._late.discard)

    async def _release_late(self, call: _Call) -> None:
        """A cancelled call may still have been answered: its patches go back at once. Where the answer is lost, nobody
        knows which preprocessor gave it.
        """
        places: Sequence[str] = ()
        try:
            reply = await call.answer
            if _keeps(call.request, reply):
                places = (reply.media_address,)
        except (asyncio.CancelledError, StageLost):
            places = self._places() if call.request.keep_patches else ()
        except ServingError:
            pass
        for address in places:
            self._leases.hold(address, call.request.lease)
            self._leases.release(address, call.request.lease)


def _keeps(request: PreprocessRequest, reply: PreprocessReply) -> bool:
    return bool(reply.media) and request.keep_patches


async def _answer(response: Any) -> PreprocessReply:
    try:
        reply = await response
    except (ServingError, ray.exceptions.RayTaskError) as error:
        raise own_error(error) or error from None
    except (ray.exceptions.RayError, ray.serve.exceptions.RayServeException) as error:
        log.warning("a preprocessor was lost: %s", error)
        raise StageLost("a preprocessor", died=isinstance(error, ray.exceptions.RayActorError)) from None
    assert isinstance(reply, PreprocessReply)
    return reply


class MissingPatches(Exception):
    """The encoder found patches gone, or the place that has them is: preprocess again."""


class EncodeStage:
    """Has the units of a prompt encoded at one encoder."""

    def __init__(self, client: MediaClient, leases: LeaseKeeper) -> None:
        self._client = client
        self._leases = leases

    async def run(
        self,
        encoder: EncoderInfo,
        media: Sequence[PromptMedia],
        *,
        lease: str,
        patch_address: str,
        timeout_s: float,
        on_unit: Callable[[EncodedUnit], None],
    ) -> None:
        """Tells of each distinct unit as soon as it is made, and returns when all are. From the first one on all others
        are being made: who pulls them waits. Embeddings stay under ``lease``.

        Raises:
            MissingPatches: some patches are gone, or their place is silent.
            StageLost: the encoder died or is silent.
            ServingError: what the encoder says of the media.
        """
        self._leases.hold(encoder.address, lease)
        answers = self._client.encode(
            encoder.address, lease=lease, units=units_of(media), patch_address=patch_address, timeout_s=timeout_s
        )
        try:
            await self._unless_lost(_tell_each(answers, encoder, on_unit), encoder.address, patch_address)
        except Unavailable as error:
            log.warning("vision encoder %s was lost: %s", encoder.encoder_id, error)
            self._leases.note_lost(encoder.address)
            raise StageLost("a vision encoder", died=not isinstance(error, StageLost)) from None

    async def _unless_lost(self, work: Coroutine[Any, Any, None], encoder_address: str, patch_address: str) -> None:
        """A frozen encoder says nothing, and neither does one that waits for patches of a frozen preprocessor."""
        encoding = asyncio.create_task(work)
        encoder_lost = asyncio.create_task(self._leases.wait_lost(encoder_address))
        patches_lost = asyncio.create_task(self._leases.wait_lost(patch_address))
        tasks: list[asyncio.Task[Any]] = [encoding, encoder_lost, patches_lost]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if encoding.done():
                encoding.result()
                return
            if encoder_lost.done():
                raise StageLost(f"{encoder_address}, which is silent,")
            log.warning("%s, which keeps patches, is silent", patch_address)
            raise MissingPatches
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def _tell_each(
    answers: AsyncGenerator[EncodedUnit, None], encoder: EncoderInfo, on_unit: Callable[[EncodedUnit], None]
) -> None:
    async with contextlib.aclosing(answers):
        async for answer in answers:
            if answer.embedding_key is None:
                raise MissingPatches
            if answer.embedding_key != _key_at(encoder, answer.content_key):
                raise StageLost(f"{encoder.address}, where another encoder is now,")
            on_unit(answer)


def spans_at(encoder: EncoderInfo, media: Sequence[PromptMedia]) -> tuple[MediaSpan, ...]:
    """Media as engines take them: their embeddings are pulled from that encoder."""
    return tuple(
        MediaSpan(
            kind=item.kind,
            offset=item.offset,
            grid=item.grid,
            embedding_keys=tuple(_key_at(encoder, content_key) for content_key in item.content_keys),
            encoder_address=encoder.address,
        )
        for item in media
    )


def _key_at(encoder: EncoderInfo, content_key: bytes) -> bytes:
    return embedding_key(content_key, bytes.fromhex(encoder.fingerprint), encoder.dtype)
