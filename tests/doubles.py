"""In-memory stand-ins for the narrow seams between parts."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
from grpc_health.v1 import health_pb2_grpc  # type: ignore[import-untyped]

from actors.errors import NotFound, ServingError
from actors.types import FinishReason, Stage, Timings
from cluster.generation import (
    ChoiceFinished,
    Delta,
    Event,
    Finished,
    GenerateCall,
    ModelCard,
    PositionScores,
    PromptScored,
    PromptTokens,
    Started,
    TokenScore,
    Usage,
    Vocabulary,
)
from cluster.grpc_service import InferenceServicer
from ernie_serving.v1 import inference_pb2_grpc


class Pause:
    """A step at which a scripted request stands still until ``ScriptedService.resume`` is set."""


USAGE = Usage(
    prompt_tokens=12,
    media_tokens=6,
    cached_tokens=4,
    output_tokens=5,
    reasoning_tokens=2,
    time_to_first_token_s=0.25,
    video_tokens=2,
)
TIMINGS = Timings(
    exposed={Stage.QUEUED: 0.001, Stage.PREFILL: 0.2, Stage.DECODE: 1.5},
    busy={Stage.ENCODE: 0.125, Stage.PREFILL: 0.19},
)
STARTED = Started(request_id="r-1", model="ernie", prompt_tokens=12, prompt_token_ids=(1, 2, 3))
ENDED = ChoiceFinished(reason=FinishReason.STOP, stop_reason="END")
FINISHED = Finished(usage=USAGE, timings=TIMINGS)
SCRIPT: tuple[Event, ...] = (
    STARTED,
    Delta(reasoning="hm", token_ids=(10,)),
    Delta(reasoning="m.", text="A ", token_ids=(11, 12)),
    Delta(token_ids=(13,)),
    Delta(text="cät", token_ids=(14,)),
    ENDED,
    FINISHED,
)


def scores(token: bytes, *others: bytes, logprob: float = -0.5) -> PositionScores:
    """Scores of a token that is the most likely one, ids being the sums of bytes."""
    ranked = [
        TokenScore(token_id=sum(text), token=text, logprob=logprob - rank, rank=rank + 1)
        for rank, text in enumerate((token, *others))
    ]
    return PositionScores(chosen=ranked[0], top=tuple(ranked))


SCORED: tuple[Event, ...] = (
    STARTED,
    PromptScored(entries=(None, scores(b"b", b"c"), None)),
    Delta(choice=1, text="no", token_ids=(20,), logprobs=(scores(b"no", b"na"),)),
    Delta(choice=0, reasoning="h", token_ids=(10,), logprobs=(scores(b"h", b"g"),)),
    Delta(choice=0, text="cä", token_ids=(11, 12), logprobs=(scores(b"c\xc3"), scores(b"\xa4"))),
    ChoiceFinished(choice=1, reason=FinishReason.LENGTH),
    Delta(choice=0, text="t", token_ids=(13,), logprobs=(scores(b"t", logprob=-float("inf")),)),
    ChoiceFinished(choice=0, reason=FinishReason.STOP, stop_reason=7),
    FINISHED,
)
"""Two choices, log-probabilities of prompt and reply."""


class ByteVocabulary:
    """Ids are bytes; 1 is a special token that replies leave out."""

    def spell(self, ids: Sequence[int]) -> str:
        return b"".join(map(self.token_bytes, ids)).decode(errors="replace")

    def token_text(self, token_id: int) -> str | None:
        return self.token_bytes(token_id).decode("latin-1") if token_id < 256 else None

    def token_bytes(self, token_id: int) -> bytes:
        return b"<s>" if token_id == 1 else bytes([token_id])

    def is_hidden(self, token_id: int) -> bool:
        return token_id == 1


@dataclass
class ScriptedService:
    """A ``GenerationService`` that plays the same steps for every request and remembers what was asked of it."""

    script: tuple[Event | Exception | Pause, ...] = SCRIPT
    missing: str | None = None
    known: tuple[str, ...] = ("r-1",)
    cards: tuple[ModelCard, ...] = (
        ModelCard(name="ernie", source="/models/ernie", max_model_len=4096, created=1_700_000_000),
    )
    calls: list[GenerateCall] = field(default_factory=list)
    tokenized: list[GenerateCall] = field(default_factory=list)
    vocabulary: Vocabulary = field(default_factory=lambda: ByteVocabulary())
    cancelled: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    ended: asyncio.Queue[str] = field(default_factory=asyncio.Queue)
    """One entry a request: "finished" or "closed"."""
    paused: asyncio.Event = field(default_factory=asyncio.Event)
    resume: asyncio.Event = field(default_factory=asyncio.Event)

    async def generate(self, call: GenerateCall) -> AsyncGenerator[Event, None]:
        self.calls.append(call)
        finished = False
        try:
            for step in self.script:
                if isinstance(step, Exception):
                    raise step
                if isinstance(step, Pause):
                    self.paused.set()
                    await self.resume.wait()
                else:
                    finished = isinstance(step, Finished)
                    yield step
        finally:
            self.ended.put_nowait("finished" if finished else "closed")

    def note_refused(self, error: ServingError) -> None:
        self.refused.append(error.reason)

    async def cancel(self, request_id: str) -> None:
        if request_id not in self.known:
            raise NotFound(f"no request {request_id!r}", reason="REQUEST_NOT_FOUND", field="request_id")
        self.cancelled.append(request_id)

    async def tokenize(self, call: GenerateCall) -> PromptTokens:
        self.tokenized.append(call)
        if isinstance(call.prompt, str):
            return PromptTokens(ids=tuple(call.prompt.encode()), media_tokens=0)
        return PromptTokens(ids=tuple(range(65, 77)) if call.prompt is None else call.prompt, media_tokens=6)

    def models(self) -> tuple[ModelCard, ...]:
        return self.cards

    async def not_ready(self) -> str | None:
        return self.missing


class ServeContextDouble:
    """Like Serve's ``RayServegRPCContext``: keeps what is set until the proxy copies it to the call's own context."""

    def __init__(self, metadata: Sequence[tuple[str, str | bytes]] = ()) -> None:
        self._metadata = metadata
        self.code: grpc.StatusCode | None = None
        self.details = ""
        self.trailing_metadata: list[tuple[str, str | bytes]] = [("request_id", "from-serve")]

    def invocation_metadata(self) -> Sequence[tuple[str, str | bytes]]:
        return self._metadata

    def set_code(self, code: grpc.StatusCode) -> None:
        self.code = code

    def set_details(self, details: str) -> None:
        self.details = details

    def set_trailing_metadata(self, trailing_metadata: list[tuple[str, str | bytes]]) -> None:
        self.trailing_metadata = self.trailing_metadata[:1] + trailing_metadata

    def copy_to(self, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        if self.code is not None:
            context.set_code(self.code)
        context.set_details(self.details)
        context.set_trailing_metadata(self.trailing_metadata)


def _metadata_of(context: grpc.aio.ServicerContext[Any, Any]) -> list[tuple[str, str | bytes]]:
    return [(name, value) for name, value in context.invocation_metadata() or ()]


class ServeProxyDouble:
    """Calls an ingress object by RPC name as Serve's gRPC proxy does.

    The context is taken over with every result and never when the method raises: then the client sees the exception.
    """

    def __init__(self, ingress: object) -> None:
        self._ingress = ingress

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._ingress, name)

        async def unary(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            kept = ServeContextDouble(_metadata_of(context))
            result = await method(request, grpc_context=kept)
            kept.copy_to(context)
            return result

        async def stream(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
            kept = ServeContextDouble(_metadata_of(context))
            results = method(request, grpc_context=kept)
            try:
                async for result in results:
                    kept.copy_to(context)
                    yield result
            finally:
                await results.aclose()

        return stream if name in ("StreamGenerate", "Watch") else unary


@asynccontextmanager
async def grpc_serving(service: ScriptedService) -> AsyncIterator[str]:
    """Serves the gRPC facade on a free port of this machine; yields its address."""
    ingress = InferenceServicer()
    ingress.router = service
    ingress.watch_interval_s = 0.01
    proxy: Any = ServeProxyDouble(ingress)
    server = grpc.aio.server()
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(proxy, server)
    health_pb2_grpc.add_HealthServicer_to_server(proxy, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


@contextmanager
def grpc_serving_in_a_thread(make_service: Callable[[], ScriptedService]) -> Iterator[tuple[str, ScriptedService]]:
    """The same on a loop of its own, for code that starts and ends its own loop in the test's thread."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def start() -> tuple[Any, str, ScriptedService]:
        service = make_service()
        server = grpc_serving(service)
        return server, await server.__aenter__(), service

    server, address, service = asyncio.run_coroutine_threadsafe(start(), loop).result(30)
    try:
        yield address, service
    finally:
        asyncio.run_coroutine_threadsafe(server.__aexit__(None, None, None), loop).result(30)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
