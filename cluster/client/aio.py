"""The asyncio client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from types import TracebackType
from typing import Any

import grpc

from cluster.client.attempts import (
    CONTROL_TIMEOUT_S,
    DEFAULT_ADDRESS,
    DEFAULT_RETRIES,
    Attempts,
    GenerateAttempts,
    channel_options,
    taking,
)
from cluster.client.events import Event, Model, Reply, ReplyBuilder, TokenCount, event_of, model_of, reply_of
from cluster.client.requests import count_request, generate_request
from ernie_serving.v1 import inference_pb2, inference_pb2_grpc


class AsyncClient:
    """One channel to a cluster, inside one event loop. Use as an async context manager. See ``Client``.

    async with AsyncClient() as client:
        reply = await client.chat("What is this?", images=["cat.png"])
        async with client.stream("And this?", images=["dog.png"]) as events:
            async for event in events:
                ...

    Cancelling a task that waits here cancels the request in the cluster.
    """

    def __init__(
        self, address: str = DEFAULT_ADDRESS, *, retries: int = DEFAULT_RETRIES, own_connection: bool = False
    ) -> None:
        self.address = address
        self._retries = retries
        self._channel = grpc.aio.insecure_channel(
            address, options=channel_options(address, own_connection=own_connection)
        )
        self._stub: inference_pb2_grpc.InferenceServiceAsyncStub = inference_pb2_grpc.InferenceServiceStub(
            self._channel
        )

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends the channel; calls in progress are cancelled."""
        await self._channel.close()

    @taking(generate_request)
    async def chat(self, request: inference_pb2.GenerateRequest) -> Reply:
        """Asks and returns the whole reply. Takes what ``generate_request`` takes."""
        return reply_of(await self.generate(request))

    @taking(generate_request)
    def stream(self, request: inference_pb2.GenerateRequest) -> AsyncStream:
        """Asks and returns the events of the reply as they come. Takes what ``generate_request`` takes."""
        return self.stream_request(request)

    @taking(count_request)
    async def count_tokens(self, request: inference_pb2.CountTokensRequest) -> TokenCount:
        """Counts the tokens, media included, a conversation would use. Takes what ``count_request`` takes."""
        response = await self._unary(self._stub.CountTokens, request, None)
        return TokenCount(tokens=response.token_count, media_tokens=response.media_token_count)

    async def cancel(self, request_id: str, *, timeout_s: float | None = CONTROL_TIMEOUT_S) -> None:
        """Stops a generation by its assigned name or the caller's alias."""
        request = inference_pb2.CancelGenerationRequest(request_id=request_id)
        await self._unary(self._stub.CancelGeneration, request, timeout_s)

    async def models(self, *, timeout_s: float | None = CONTROL_TIMEOUT_S) -> list[Model]:
        """Lists all served models."""
        response = await self._unary(self._stub.ListModels, inference_pb2.ListModelsRequest(), timeout_s)
        return [model_of(model) for model in response.models]

    async def generate(
        self, request: inference_pb2.GenerateRequest, *, timeout_s: float | None = None
    ) -> inference_pb2.GenerateResponse:
        """``chat`` in protobuf. ``timeout_s`` bounds the call here and, through ``timeout``, in the cluster."""
        attempts = GenerateAttempts(self._retries, request, timeout_s)
        response: inference_pb2.GenerateResponse = await self._answer(self._stub.Generate, attempts.request, attempts)
        return response

    def stream_request(self, request: inference_pb2.GenerateRequest) -> AsyncStream:
        """``stream`` of a request that was made before. Its time is its own ``timeout``."""
        return AsyncStream(self.stream_generate(request))

    async def stream_generate(
        self, request: inference_pb2.GenerateRequest, *, timeout_s: float | None = None
    ) -> AsyncGenerator[inference_pb2.StreamGenerateResponse, None]:
        """``stream`` in protobuf: the responses that carry an event. Closing the iterator cancels the request."""
        attempts = GenerateAttempts(self._retries, request, timeout_s)
        while True:
            asked = inference_pb2.StreamGenerateRequest(request=attempts.request())
            call = self._stub.StreamGenerate(asked, timeout=attempts.left_s())
            try:
                async for response in call:
                    if response.WhichOneof("event") is not None:
                        attempts.begun = True
                        yield response
                return
            except grpc.RpcError as error:
                delay_s = attempts.again_after_s(error)
            finally:
                call.cancel()
            await asyncio.sleep(delay_s)

    async def _unary(self, method: Any, request: Any, timeout_s: float | None) -> Any:
        return await self._answer(method, lambda: request, Attempts(self._retries, timeout_s))

    async def _answer(self, method: Any, next_request: Callable[[], Any], attempts: Attempts) -> Any:
        while True:
            try:
                return await method(next_request(), timeout=attempts.left_s())
            except grpc.RpcError as error:
                await asyncio.sleep(attempts.again_after_s(error))


class AsyncStream:
    """The events of one reply. Leaving the block, or ``close``, cancels a request that has not ended."""

    def __init__(self, responses: AsyncGenerator[inference_pb2.StreamGenerateResponse, None]) -> None:
        self._responses = responses
        self._builder = ReplyBuilder()

    async def __aenter__(self) -> AsyncStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def __aiter__(self) -> AsyncStream:
        return self

    async def __anext__(self) -> Event:
        async for response in self._responses:
            event = event_of(response)
            if event is not None:
                self._builder.add(event)
                return event
        self._builder.whole()
        raise StopAsyncIteration

    async def close(self) -> None:
        """Cancels the request unless it has ended."""
        await self._responses.aclose()

    @property
    def reply(self) -> Reply | None:
        """All events put together; None before the last one."""
        return self._builder.reply()

    async def rest(self) -> Reply:
        """Reads on to the end and returns the whole reply."""
        async for _ in self:
            pass
        return self._builder.whole()
