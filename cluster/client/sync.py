"""The client for plain threads."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator
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


class Client:
    """One channel to a cluster, for use from any thread. Use as a context manager.

    with Client() as client:
        print(client.chat("What is this?", images=["cat.png"], temperature=0, timeout_s=60).text)
        with client.stream("And this?", images=["dog.png"]) as events:
            for event in events:
                if isinstance(event, Delta):
                    print(event.text, end="")

    A request the cluster refuses for now is sent again after the delay it asks for, ``retries`` times at most and never
    past the deadline. Every method may raise a ClientError. A closed stream cancels its request in the cluster.
    ``own_connection``: do not share the connection other clients of this process have to the same address.
    """

    def __init__(
        self, address: str = DEFAULT_ADDRESS, *, retries: int = DEFAULT_RETRIES, own_connection: bool = False
    ) -> None:
        self.address = address
        self._retries = retries
        self._channel = grpc.insecure_channel(address, options=channel_options(address, own_connection=own_connection))
        self._stub = inference_pb2_grpc.InferenceServiceStub(self._channel)

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the channel; calls in progress are cancelled."""
        self._channel.close()

    @taking(generate_request)
    def chat(self, request: inference_pb2.GenerateRequest) -> Reply:
        """Asks and returns the whole reply. Takes what ``generate_request`` takes."""
        return reply_of(self.generate(request))

    @taking(generate_request)
    def stream(self, request: inference_pb2.GenerateRequest) -> Stream:
        """Asks and returns the events of the reply as they come. Takes what ``generate_request`` takes."""
        return self.stream_request(request)

    @taking(count_request)
    def count_tokens(self, request: inference_pb2.CountTokensRequest) -> TokenCount:
        """Counts the tokens, media included, a conversation would use. Takes what ``count_request`` takes."""
        response = self._unary(self._stub.CountTokens, request, None)
        return TokenCount(tokens=response.token_count, media_tokens=response.media_token_count)

    def cancel(self, request_id: str, *, timeout_s: float | None = CONTROL_TIMEOUT_S) -> None:
        """Stops a generation by its assigned name or the caller's alias."""
        request = inference_pb2.CancelGenerationRequest(request_id=request_id)
        self._unary(self._stub.CancelGeneration, request, timeout_s)

    def models(self, *, timeout_s: float | None = CONTROL_TIMEOUT_S) -> list[Model]:
        """Lists all served models."""
        response = self._unary(self._stub.ListModels, inference_pb2.ListModelsRequest(), timeout_s)
        return [model_of(model) for model in response.models]

    def generate(
        self, request: inference_pb2.GenerateRequest, *, timeout_s: float | None = None
    ) -> inference_pb2.GenerateResponse:
        """``chat`` in protobuf. ``timeout_s`` bounds the call here and, through ``timeout``, in the cluster."""
        attempts = GenerateAttempts(self._retries, request, timeout_s)
        response: inference_pb2.GenerateResponse = self._answer(self._stub.Generate, attempts.request, attempts)
        return response

    def stream_request(self, request: inference_pb2.GenerateRequest) -> Stream:
        """``stream`` of a request that was made before. Its time is its own ``timeout``."""
        return Stream(GenerateAttempts(self._retries, request, None), self._stub.StreamGenerate)

    def stream_generate(
        self, request: inference_pb2.GenerateRequest, *, timeout_s: float | None = None
    ) -> Generator[inference_pb2.StreamGenerateResponse, None, None]:
        """``stream`` in protobuf: the responses that carry an event. Closing the iterator cancels the request."""
        stream = Stream(GenerateAttempts(self._retries, request, timeout_s), self._stub.StreamGenerate)
        with stream:
            yield from stream.responses()

    def _unary(self, method: Any, request: Any, timeout_s: float | None) -> Any:
        return self._answer(method, lambda: request, Attempts(self._retries, timeout_s))

    def _answer(self, method: Any, next_request: Callable[[], Any], attempts: Attempts) -> Any:
        while True:
            try:
                return method(next_request(), timeout=attempts.left_s())
            except grpc.RpcError as error:
                time.sleep(attempts.again_after_s(error))


class Stream:
    """The events of one reply. Leaving the block, or ``close`` from any thread, cancels what has not ended."""

    def __init__(self, attempts: GenerateAttempts, method: Callable[..., Any]) -> None:
        self._attempts = attempts
        self._method = method
        self._call: Any = None
        self._closed = threading.Event()
        self._builder = ReplyBuilder()
        self._responses = self.responses()

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Event:
        for response in self._responses:
            event = event_of(response)
            if event is not None:
                self._builder.add(event)
                return event
        if not self._closed.is_set():
            self._builder.whole()
        raise StopIteration

    def responses(self) -> Generator[inference_pb2.StreamGenerateResponse, None, None]:
        """The same in protobuf."""
        while not self._closed.is_set():
            asked = inference_pb2.StreamGenerateRequest(request=self._attempts.request())
            self._call = self._method(asked, timeout=self._attempts.left_s())
            if self._closed.is_set():
                self._call.cancel()
            try:
                for response in self._call:
                    if response.WhichOneof("event") is not None:
                        self._attempts.begun = True
                        yield response
                return
            except grpc.RpcError as error:
                if self._closed.is_set():
                    return
                delay_s = self._attempts.again_after_s(error)
            finally:
                self._call.cancel()
            self._closed.wait(delay_s)

    def close(self) -> None:
        """Cancels the request unless it has ended. Whoever reads sees the end of the events."""
        self._closed.set()
        if self._call is not None:
            self._call.cancel()

    @property
    def reply(self) -> Reply | None:
        """All events put together; None before the last one."""
        return self._builder.reply()

    def rest(self) -> Reply:
        """Reads on to the end and returns the whole reply."""
        for _ in self:
            pass
        return self._builder.whole()
