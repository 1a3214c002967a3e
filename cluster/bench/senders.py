"""Requests over gRPC and over OpenAI-compatible HTTP, streamed and timed.

Token ids are asked for: they say which chunk carries tokens even where text is held back. An HTTP server that does not
know the field and sends none is measured by its text.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
from typing import Any

import httpx

from cluster.bench.load import Ask, Reply, Sender, SendFailed
from cluster.bench.settings import BenchSettings
from cluster.bench.workload import Turn
from cluster.client import AsyncClient, ClientError, generate_request
from ernie_serving.v1 import content_pb2, inference_pb2

STREAMS_PER_CONNECTION = 64
"""gRPC queues what goes over a connection's stream limit here, unseen; so requests are spread over connections."""
MAX_CONNECTIONS = 64
MAX_ERROR_LENGTH = 300


class Unreachable(SendFailed):
    """Nothing answers there."""


def make_sender(settings: BenchSettings) -> GrpcSender | HttpSender:
    """By the scheme of the URL."""
    if settings.url.startswith("grpc://"):
        return GrpcSender(settings.url.removeprefix("grpc://").rstrip("/"), settings)
    return HttpSender(settings.url.rstrip("/").removesuffix("/v1"), settings)


class GrpcSender(Sender):
    """``StreamGenerate`` over a few connections. Use inside one event loop; ``close`` at the end."""

    def __init__(self, address: str, settings: BenchSettings) -> None:
        in_flight = settings.concurrency or settings.num_requests
        count = min(MAX_CONNECTIONS, -(-in_flight // STREAMS_PER_CONNECTION))
        self._clients = [AsyncClient(address, retries=0, own_connection=True) for _ in range(count)]
        self._turn = itertools.cycle(self._clients)
        self._settings = settings

    def prepare(self, ask: Ask) -> inference_pb2.GenerateRequest:
        messages = [_grpc_message(content_pb2.ROLE_SYSTEM, ask.system)] if ask.system is not None else []
        for turn, reply in ask.history:
            messages += [_grpc_question(turn), _grpc_message(content_pb2.ROLE_ASSISTANT, reply)]
        messages.append(_grpc_question(ask.turn))
        return generate_request(
            messages,
            model=self._settings.model,
            max_tokens=ask.turn.output_tokens,
            ignore_eos=self._settings.ignore_eos,
            temperature=self._settings.temperature,
            return_token_ids=True,
        )

    async def send(self, prepared: inference_pb2.GenerateRequest) -> Reply:
        now = asyncio.get_running_loop().time
        text: list[str] = []
        chunk_s: list[float] = []
        usage: inference_pb2.Usage | None = None
        responses = next(self._turn).stream_generate(prepared, timeout_s=self._settings.timeout_s)
        try:
            async with contextlib.aclosing(responses):
                async for response in responses:
                    if response.HasField("delta"):
                        if response.delta.token_ids or response.delta.text or response.delta.reasoning_text:
                            chunk_s.append(now())
                        text.append(response.delta.text)
                    elif response.HasField("finished"):
                        usage = response.finished.usage
        except ClientError as error:
            kind = Unreachable if error.unreachable else SendFailed
            raise kind(_short(f"{error.code.name}: {error.message}")) from None
        if usage is None:
            raise SendFailed("the stream ended early")
        return Reply(
            text="".join(text),
            chunk_s=tuple(chunk_s),
            end_s=now(),
            prompt_tokens=usage.prompt_token_count,
            cached_tokens=usage.cached_token_count,
            output_tokens=usage.output_token_count,
        )

    async def close(self) -> None:
        for client in self._clients:
            await client.close()


def _grpc_question(turn: Turn) -> content_pb2.ChatMessage:
    parts = []
    for medium in turn.media:
        source = content_pb2.MediaSource(content=medium.content, mime_type=medium.mime_type)
        if medium.kind == "image":
            parts.append(content_pb2.ContentPart(image=content_pb2.ImagePart(source=source)))
        else:
            parts.append(content_pb2.ContentPart(video=content_pb2.VideoPart(source=source)))
    parts.append(content_pb2.ContentPart(text=turn.text))
    return content_pb2.ChatMessage(role=content_pb2.ROLE_USER, parts=parts)


def _grpc_message(role: content_pb2.Role.ValueType, text: str) -> content_pb2.ChatMessage:
    return content_pb2.ChatMessage(role=role, parts=[content_pb2.ContentPart(text=text)])


class HttpSender(Sender):
    """``POST /v1/chat/completions`` as server-sent events. Use inside one event loop; ``close`` at the end."""

    def __init__(self, url: str, settings: BenchSettings, *, transport: httpx.AsyncBaseTransport | None = None) -> None:
        self._settings = settings
        self._client = httpx.AsyncClient(
            base_url=url,
            timeout=settings.timeout_s,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
            trust_env=False,
            transport=transport,
        )

    def prepare(self, ask: Ask) -> bytes:
        messages: list[dict[str, Any]] = []
        if ask.system is not None:
            messages.append({"role": "system", "content": ask.system})
        for turn, reply in ask.history:
            messages += [_http_question(turn), {"role": "assistant", "content": reply}]
        messages.append(_http_question(ask.turn))
        body: dict[str, Any] = {
            "messages": messages,
            "max_tokens": ask.turn.output_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
        }
        if self._settings.model is not None:
            body["model"] = self._settings.model
        if self._settings.ignore_eos:
            body["ignore_eos"] = True
        if self._settings.temperature is not None:
            body["temperature"] = self._settings.temperature
        return json.dumps(body).encode()

    async def send(self, prepared: bytes) -> Reply:
        try:
            async with asyncio.timeout(self._settings.timeout_s):
                return await self._send(prepared)
        except TimeoutError:
            raise SendFailed(f"no whole reply within {self._settings.timeout_s:g} s") from None
        except httpx.ConnectError as error:
            raise Unreachable(_short(f"cannot connect: {error}")) from None
        except httpx.HTTPError as error:
            raise SendFailed(_short(f"{type(error).__name__}: {error}")) from None

    async def _send(self, prepared: bytes) -> Reply:
        reply = _Gathered()
        headers = {"content-type": "application/json"}
        async with self._client.stream("POST", "/v1/chat/completions", content=prepared, headers=headers) as response:
            if response.is_error:
                raise SendFailed(_http_error(response.status_code, await response.aread()))
            async for line in response.aiter_lines():
                data = line.removeprefix("data:").strip()
                if data == "[DONE]":
                    return reply.whole()
                if line.startswith("data:"):
                    reply.add(data)
        raise SendFailed("the stream ended early")

    async def close(self) -> None:
        await self._client.aclose()


class _Gathered:
    """The events of one HTTP reply."""

    def __init__(self) -> None:
        self._now = asyncio.get_running_loop().time
        self._text: list[str] = []
        self._chunk_s: list[float] = []
        self._usage: dict[str, Any] | None = None

    def add(self, data: str) -> None:
        try:
            chunk = json.loads(data)
            if "error" in chunk:
                raise SendFailed(_short(f"mid-stream: {chunk['error']['message']}"))
            for choice in chunk["choices"]:
                delta = choice["delta"]
                content = delta.get("content") or ""
                if choice.get("token_ids") or content or delta.get("reasoning") or delta.get("reasoning_content"):
                    self._chunk_s.append(self._now())
                self._text.append(content)
            self._usage = chunk.get("usage") or self._usage
        except (ValueError, KeyError, TypeError, AttributeError):
            raise SendFailed("an event does not have OpenAI's form") from None

    def whole(self) -> Reply:
        if self._usage is None:
            raise SendFailed("the server sent no usage")
        try:
            return Reply(
                text="".join(self._text),
                chunk_s=tuple(self._chunk_s),
                end_s=self._now(),
                prompt_tokens=self._usage["prompt_tokens"],
                cached_tokens=(self._usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0,
                output_tokens=self._usage["completion_tokens"],
            )
        except KeyError:
            raise SendFailed("the usage does not have OpenAI's form") from None


def _http_question(turn: Turn) -> dict[str, Any]:
    parts: list[dict[str, Any]] = []
    for medium in turn.media:
        url = {"url": f"data:{medium.mime_type};base64,{base64.b64encode(medium.content).decode()}"}
        parts.append({"type": f"{medium.kind}_url", f"{medium.kind}_url": url})
    parts.append({"type": "text", "text": turn.text})
    return {"role": "user", "content": parts}


def _http_error(status: int, body: bytes) -> str:
    """The message of an OpenAI-shaped error, else the body."""
    text = body.decode(errors="replace")
    with contextlib.suppress(ValueError, KeyError, TypeError):
        text = str(json.loads(text)["error"]["message"])
    return _short(f"HTTP {status}: {text}")


def _short(text: str) -> str:
    return text if len(text) <= MAX_ERROR_LENGTH else text[: MAX_ERROR_LENGTH - 3] + "..."
