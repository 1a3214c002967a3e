"""Python client of ``ernie_serving.v1.InferenceService``: its stub plus deadlines, typed errors and media helpers.

async with Client("127.0.0.1:9000") as client:
    request = GenerateRequest(messages=[user_message("What is this?", images=["cat.png"])])
    async for response in client.stream_generate(request, timeout_s=60):
        print(response.text_delta, end="")
"""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import grpc
from google.protobuf import duration_pb2
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]

from ernie_serving.v1 import content_pb2, inference_pb2, inference_pb2_grpc

DEFAULT_ADDRESS = "127.0.0.1:9000"
_DETAILS_KEY = "grpc-status-details-bin"
_MAX_RECEIVED_BYTES = 64 * 2**20
_LOOPBACK = ("127.0.0.1", "localhost", "[::1]")

Media = str | os.PathLike[str] | bytes
"""A file's path, an http, https or data URI, or the encoded file itself."""


class ClientError(Exception):
    """A call failed.

    ``reason``, ``field`` and ``retry_after_s`` are None where the server gave none; no ``reason`` at all means that the
    error did not come from the service but from the way to it.
    """

    def __init__(
        self,
        code: grpc.StatusCode,
        message: str,
        *,
        reason: str | None = None,
        field: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(f"{code.name}: {message}")
        self.code = code
        self.message = message
        self.reason = reason
        self.field = field
        self.retry_after_s = retry_after_s

    @property
    def unreachable(self) -> bool:
        """Nothing that speaks this protocol answered."""
        return self.reason is None and self.code is grpc.StatusCode.UNAVAILABLE


class Client:
    """One channel to a cluster. Use as an async context manager, inside one event loop."""

    def __init__(self, address: str = DEFAULT_ADDRESS) -> None:
        self.address = address
        options = [("grpc.max_receive_message_length", _MAX_RECEIVED_BYTES)]
        if address.rpartition(":")[0] in _LOOPBACK:
            # A proxy of the environment is not on the way to this machine.
            options.append(("grpc.enable_http_proxy", 0))
        self._channel = grpc.aio.insecure_channel(address, options=options)
        self._stub: inference_pb2_grpc.InferenceServiceAsyncStub = inference_pb2_grpc.InferenceServiceStub(
            self._channel
        )

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends the channel; calls in progress are cancelled."""
        await self._channel.close()

    async def generate(
        self, request: inference_pb2.GenerateRequest, *, timeout_s: float | None = None
    ) -> inference_pb2.GenerateResponse:
        """Generates a whole reply. ``timeout_s`` bounds the call here and, through ``timeout``, in the cluster."""
        request, deadline_s = _with_timeout(request, timeout_s)
        response: inference_pb2.GenerateResponse = await self._unary(self._stub.Generate, request, deadline_s)
        return response

    async def stream_generate(
        self, request: inference_pb2.GenerateRequest, *, timeout_s: float | None = None
    ) -> AsyncGenerator[inference_pb2.StreamGenerateResponse, None]:
        """Yields the responses that carry an event or token ids. Closing the iterator cancels the request."""
        request, deadline_s = _with_timeout(request, timeout_s)
        call = self._stub.StreamGenerate(inference_pb2.StreamGenerateRequest(request=request), timeout=deadline_s)
        try:
            async for response in call:
                if response.WhichOneof("event") is not None or response.token_ids:
                    yield response
        except grpc.RpcError as error:
            raise _client_error(error) from None
        finally:
            call.cancel()

    async def cancel(self, request_id: str, *, timeout_s: float | None = 10.0) -> None:
        """Stops a generation by its assigned name or the caller's alias."""
        await self._unary(
            self._stub.CancelGeneration, inference_pb2.CancelGenerationRequest(request_id=request_id), timeout_s
        )

    async def count_tokens(
        self, request: inference_pb2.CountTokensRequest, *, timeout_s: float | None = None
    ) -> inference_pb2.CountTokensResponse:
        """Counts the tokens, media included, a request would use."""
        response: inference_pb2.CountTokensResponse = await self._unary(self._stub.CountTokens, request, timeout_s)
        return response

    async def models(self, *, timeout_s: float | None = 10.0) -> list[inference_pb2.Model]:
        """Lists all served models."""
        found: list[inference_pb2.Model] = []
        token = ""
        while True:
            page = await self._unary(
                self._stub.ListModels, inference_pb2.ListModelsRequest(page_token=token), timeout_s
            )
            found.extend(page.models)
            token = page.next_page_token
            if not token:
                return found

    @staticmethod
    async def _unary(method: Any, request: Any, timeout_s: float | None) -> Any:
        try:
            return await method(request, timeout=timeout_s)
        except grpc.RpcError as error:
            raise _client_error(error) from None


def user_message(text: str, *, images: Iterable[Media] = (), videos: Iterable[Media] = ()) -> content_pb2.ChatMessage:
    """A user's turn: pictures, then videos, then the text. Files are read at once (OSError when they cannot be)."""
    parts = [content_pb2.ContentPart(image=content_pb2.ImagePart(source=media_source(image))) for image in images]
    parts += [content_pb2.ContentPart(video=content_pb2.VideoPart(source=media_source(video))) for video in videos]
    if text:
        parts.append(content_pb2.ContentPart(text=text))
    return content_pb2.ChatMessage(role=content_pb2.ROLE_USER, parts=parts)


def media_source(media: Media) -> content_pb2.MediaSource:
    """Where the bytes of a picture or video come from."""
    if isinstance(media, bytes):
        return content_pb2.MediaSource(content=media)
    if isinstance(media, str) and media.startswith(("http://", "https://", "data:")):
        return content_pb2.MediaSource(uri=media)
    return content_pb2.MediaSource(content=Path(media).read_bytes())


def _with_timeout(
    request: inference_pb2.GenerateRequest, timeout_s: float | None
) -> tuple[inference_pb2.GenerateRequest, float | None]:
    """The request with the deadline copied into it, and the deadline: ``timeout_s`` or else the request's own."""
    if timeout_s is None:
        own = request.timeout
        return request, own.seconds + own.nanos / 1e9 if request.HasField("timeout") else None
    copied = inference_pb2.GenerateRequest()
    copied.CopyFrom(request)
    nanos = round(timeout_s * 1e9)
    copied.timeout.CopyFrom(duration_pb2.Duration(seconds=nanos // 10**9, nanos=nanos % 10**9))
    return copied, timeout_s


def _client_error(error: grpc.RpcError) -> ClientError:
    assert isinstance(error, grpc.aio.AioRpcError)
    reason = field = None
    retry_after_s = None
    for packed in _details(error.trailing_metadata()):
        info = error_details_pb2.ErrorInfo()
        retry = error_details_pb2.RetryInfo()
        if packed.Unpack(info):
            reason, field = info.reason, info.metadata.get("field")
        elif packed.Unpack(retry):
            retry_after_s = retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9
    return ClientError(error.code(), error.details() or "", reason=reason, field=field, retry_after_s=retry_after_s)


def _details(metadata: grpc.aio.Metadata | None) -> Sequence[Any]:
    for key, value in metadata or ():
        if key == _DETAILS_KEY and isinstance(value, bytes):
            try:
                return list(status_pb2.Status.FromString(value).details)
            except DecodeError:
                return ()
    return ()
