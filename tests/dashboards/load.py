"""Requests of every kind and every ending, for a while: what makes a cluster's series move."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import time
from collections import Counter
from typing import Any

import httpx

from tests.media import mp4, png

TOKENS = 24
PREFIX = "You are asked about shapes and colours, again and again. " * 8
"""Long enough for blocks of the prefix cache."""
LIMIT_S = 60.0


class Load:
    """Keeps ``at_once`` requests running against a cluster and counts how they end."""

    def __init__(self, url: str, at_once: int = 6) -> None:
        self._url = url
        self._at_once = at_once
        self._number = itertools.count()
        self.ended: Counter[str] = Counter()
        """By kind of request and status, or how it broke off."""

    async def run(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=self._url, timeout=LIMIT_S, limits=limits, trust_env=False) as client:
            async with asyncio.TaskGroup() as group:
                for _ in range(self._at_once):
                    group.create_task(self._ask_until(client, end))

    async def burst(self, count: int) -> None:
        """So many long requests at once, more than a router takes."""
        async with httpx.AsyncClient(base_url=self._url, timeout=LIMIT_S, trust_env=False) as client:
            bodies = [_chat(f"Go on about {number}.", max_tokens=200) for number in range(count)]
            self.ended.update([f"burst {how}" for how in await asyncio.gather(*(_posted(client, b) for b in bodies))])

    async def _ask_until(self, client: httpx.AsyncClient, end: float) -> None:
        kinds = (
            self._text,
            self._picture,
            self._stream,
            self._clip,
            self._left,
            self._late,
            self._wrong,
            self._unknown,
        )
        while time.monotonic() < end:
            number = next(self._number)
            kind = kinds[number % len(kinds)]
            try:
                how = await kind(client, number)
            except httpx.HTTPError as error:
                how = type(error).__name__
            self.ended[f"{kind.__name__.strip('_')} {how}"] += 1

    async def _text(self, client: httpx.AsyncClient, number: int) -> str:
        return await _posted(client, _chat(f"{PREFIX} Question {number}?"))

    async def _picture(self, client: httpx.AsyncClient, number: int) -> str:
        part = {"type": "image_url", "image_url": {"url": _uri(png(150, 100, number), "image/png")}}
        return await _posted(client, _chat("What is this?", part))

    async def _clip(self, client: httpx.AsyncClient, number: int) -> str:
        part = {"type": "video_url", "video_url": {"url": _uri(mp4(96, 64, 16, 8, number), "video/mp4")}}
        return await _posted(client, _chat("What moves?", part))

    async def _stream(self, client: httpx.AsyncClient, number: int) -> str:
        body = _chat(f"Tell me about {number}.", stream=True, max_tokens=3 * TOKENS)
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            async for _ in response.aiter_lines():
                pass
        return str(response.status_code)

    async def _left(self, client: httpx.AsyncClient, number: int) -> str:
        """A client that goes away."""
        body = _chat(f"Go on for long about {number}.", stream=True, max_tokens=2000)
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            lines = response.aiter_lines()
            with contextlib.suppress(StopAsyncIteration):
                for _ in range(8):
                    await anext(lines)
        return str(response.status_code)

    async def _late(self, client: httpx.AsyncClient, number: int) -> str:
        """A deadline that cannot be met."""
        return await _posted(client, _chat(f"Go on for long about {number}.", max_tokens=3000, timeout=0.5))

    async def _wrong(self, client: httpx.AsyncClient, number: int) -> str:
        """Bytes that are no picture: found out by the preprocessor."""
        part = {"type": "image_url", "image_url": {"url": _uri(b"no picture", "image/png")}}
        return await _posted(client, _chat("What is this?", part))

    async def _unknown(self, client: httpx.AsyncClient, number: int) -> str:
        """A model that is not served: refused at once."""
        return await _posted(client, _chat("Who are you?", model="another"))


def _chat(text: str, *parts: dict[str, Any], **fields: Any) -> dict[str, Any]:
    content = [*parts, {"type": "text", "text": text}]
    return {
        "messages": [{"role": "user", "content": content}],
        "max_tokens": TOKENS,
        "temperature": 0.8,
        "ignore_eos": True,
        **fields,
    }


def _uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


async def _posted(client: httpx.AsyncClient, body: dict[str, Any]) -> str:
    return str((await client.post("/v1/chat/completions", json=body)).status_code)
