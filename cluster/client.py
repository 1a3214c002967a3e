"""Python client of ``ernie_serving.v1.InferenceService``: its stub plus deadlines, typed errors and media helpers.

async with Client("127.0.0.1:9000") as client:
    request = generate_request(user_message("What is this?", images=["cat.png"]), temperature=0, max_tokens=100)
    response = await client.generate(request)
    print(response.choices[0].text)
    async for response in client.stream_generate(request, timeout_s=60):
        print(response.delta.text, end="")
"""

from __future__ import annotations

import json
import os
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
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

    def __init__(self, address: str = DEFAULT_ADDRESS, *, own_connection: bool = False) -> None:
        """``own_connection``: do not share the connection other clients of this process have to the same address."""
        self.address = address
        options = [("grpc.max_receive_message_length", _MAX_RECEIVED_BYTES)]
        if own_connection:
            options.append(("grpc.use_local_subchannel_pool", 1))
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
        """Yields the responses that carry an event. Closing the iterator cancels the request."""
        request, deadline_s = _with_timeout(request, timeout_s)
        call = self._stub.StreamGenerate(inference_pb2.StreamGenerateRequest(request=request), timeout=deadline_s)
        try:
            async for response in call:
                if response.WhichOneof("event") is not None:
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


def generate_request(
    messages: str | content_pb2.ChatMessage | Iterable[content_pb2.ChatMessage],
    *,
    model: str | None = None,
    request_id: str | None = None,
    n: int = 1,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    logit_bias: Mapping[int, float] | None = None,
    allowed_token_ids: Iterable[int] | None = None,
    bad_words: Iterable[str] = (),
    seed: int | None = None,
    min_tokens: int = 0,
    max_tokens: int | None = None,
    reasoning_max_tokens: int | None = None,
    stop: Iterable[str] = (),
    stop_token_ids: Iterable[int] = (),
    ignore_eos: bool = False,
    logprobs: int | None = None,
    prompt_logprobs: int | None = None,
    json_schema: str | Mapping[str, Any] | None = None,
    json_object: bool = False,
    regex: str | None = None,
    grammar: str | None = None,
    choice: Iterable[str] | None = None,
    tools: Iterable[Mapping[str, Any]] = (),
    tool_choice: str | Mapping[str, Any] | None = None,
    parallel_tool_calls: bool | None = None,
    enable_thinking: bool | None = None,
    priority: int = 0,
    cache_salt: str | None = None,
    return_token_ids: bool = False,
    return_timings: bool = False,
) -> inference_pb2.GenerateRequest:
    """A request from the names the HTTP API uses. None leaves the choice to the model or the cluster.

    ``messages`` may be one question as plain text. ``logprobs`` and ``prompt_logprobs`` are counts of most likely
    tokens. The text of a stop string must come as a list of one. ``tools`` and ``tool_choice`` are as OpenAI has them:
    {"type": "function", "function": {"name": ..., "description": ..., "parameters": ...}}, and "auto", "none",
    "required" or {"type": "function", "function": {"name": ...}}.

    Raises:
        ValueError: more than one structure, or something that has no wire form.
    """
    if isinstance(messages, str):
        messages = [user_message(messages)]
    elif isinstance(messages, content_pb2.ChatMessage):
        messages = [messages]
    for name, texts in (("stop", stop), ("bad_words", bad_words), ("choice", choice)):
        if isinstance(texts, str):
            raise ValueError(f"{name} must be a list of texts")
    if n == 0:
        raise ValueError("n must not be 0")
    # On the wire these would say nothing.
    allowed_token_ids = None if allowed_token_ids is None else list(allowed_token_ids)
    for name, given in (
        ("model", model),
        ("request_id", request_id),
        ("cache_salt", cache_salt),
        ("allowed_token_ids", allowed_token_ids),
    ):
        if given is not None and not given:
            raise ValueError(f"{name} must not be empty")
    params = inference_pb2.SamplingParams(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        logit_bias=logit_bias or {},
        allowed_token_ids=allowed_token_ids or (),
        bad_words=bad_words,
        seed=seed,
        min_output_token_count=min_tokens,
        max_output_token_count=max_tokens,
        max_reasoning_token_count=reasoning_max_tokens,
        stop_sequences=stop,
        stop_token_ids=stop_token_ids,
        ignore_eos=ignore_eos,
    )
    return inference_pb2.GenerateRequest(
        messages=messages,
        model=model or "",
        request_id=request_id or "",
        sampling_params=params,
        structured_output=_structured_output(json_schema, json_object, regex, grammar, choice),
        tools=[_tool(tool) for tool in tools],
        tool_choice=_tool_choice(tool_choice),
        parallel_tool_calls=parallel_tool_calls,
        choice_count=n,
        top_logprob_count=logprobs,
        prompt_top_logprob_count=prompt_logprobs,
        thinking_mode=_THINKING[enable_thinking],
        priority=priority,
        cache_salt=cache_salt or "",
        return_token_ids=return_token_ids,
        return_timings=return_timings,
    )


_THINKING = {
    None: inference_pb2.THINKING_MODE_UNSPECIFIED,
    True: inference_pb2.THINKING_MODE_ENABLED,
    False: inference_pb2.THINKING_MODE_DISABLED,
}


def _structured_output(
    json_schema: str | Mapping[str, Any] | None,
    json_object: bool,
    regex: str | None,
    grammar: str | None,
    choice: Iterable[str] | None,
) -> inference_pb2.StructuredOutput | None:
    given = [json_schema is not None, json_object, regex is not None, grammar is not None, choice is not None]
    if sum(given) > 1:
        raise ValueError("give one of json_schema, json_object, regex, grammar and choice")
    if json_schema is not None:
        text = json_schema if isinstance(json_schema, str) else json.dumps(json_schema, ensure_ascii=False)
        return inference_pb2.StructuredOutput(json_schema=text)
    if json_object:
        return inference_pb2.StructuredOutput(json_object=inference_pb2.JsonObject())
    if regex is not None:
        return inference_pb2.StructuredOutput(regex=regex)
    if grammar is not None:
        return inference_pb2.StructuredOutput(grammar=grammar)
    if choice is not None:
        return inference_pb2.StructuredOutput(choices=inference_pb2.TextChoices(texts=choice))
    return None


def _tool(tool: Mapping[str, Any]) -> content_pb2.Tool:
    function = _function(tool, "a tool", {"name", "description", "parameters", "strict"})
    parameters = function.get("parameters")
    return content_pb2.Tool(
        name=function["name"],
        description=function.get("description") or "",
        parameters_json="" if parameters is None else json.dumps(parameters, ensure_ascii=False),
    )


_TOOL_MODES = {
    "auto": inference_pb2.TOOL_CHOICE_MODE_AUTO,
    "none": inference_pb2.TOOL_CHOICE_MODE_NONE,
    "required": inference_pb2.TOOL_CHOICE_MODE_REQUIRED,
}


def _tool_choice(choice: str | Mapping[str, Any] | None) -> inference_pb2.ToolChoice | None:
    if choice is None:
        return None
    if isinstance(choice, str):
        if choice not in _TOOL_MODES:
            raise ValueError(f"tool_choice must be {', '.join(_TOOL_MODES)} or name a function, not {choice!r}")
        return inference_pb2.ToolChoice(mode=_TOOL_MODES[choice])
    return inference_pb2.ToolChoice(function_name=_function(choice, "tool_choice", {"name"})["name"])


def _function(value: Mapping[str, Any], what: str, known: set[str]) -> Mapping[str, Any]:
    """The inner object of OpenAI's two."""
    function = value.get("function") if set(value) == {"type", "function"} and value["type"] == "function" else None
    if not isinstance(function, Mapping) or "name" not in function or not set(function) <= known:
        raise ValueError(f'{what} must be {{"type": "function", "function": {{...}}}} with {", ".join(sorted(known))}')
    return function


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
