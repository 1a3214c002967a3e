"""Questions to a running cluster over gRPC, answered greedily, and the loop in which the model looks closer."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageOps

from cluster.client import AsyncClient, generate_request, media_source, user_message
from cluster.eval.boxes import read_box
from cluster.eval.world import zoom
from ernie_serving.v1 import content_pb2

MAX_TOKENS = 256
"""Bound on an answer, thinking included; the model's own answers and thoughts are shorter."""


@dataclass(frozen=True, slots=True)
class Reply:
    """``reasoning`` is what thinking mode wrote before the answer; all as it came."""

    reasoning: str
    text: str
    calls: tuple[content_pb2.ToolCall, ...] = ()


@dataclass(frozen=True, slots=True)
class Look:
    """A second look: the corners asked for (thousandths of the sides), the part seen (PNG), and the reply to it."""

    corners: list[float]
    picture: bytes
    reply: Reply


async def ask(
    client: AsyncClient,
    text: str,
    *,
    images: Sequence[bytes] = (),
    videos: Sequence[bytes] = (),
    thinking: bool = False,
    question_first: bool = False,
    timeout_s: float = 120.0,
) -> Reply:
    """One question about encoded pictures and videos, which come before it, or after it with ``question_first``.

    Raises:
        ClientError: the cluster refused or failed.
    """
    message = user_message(text, images=images, videos=videos)
    if question_first:
        *media, question = message.parts
        message = content_pb2.ChatMessage(role=content_pb2.ROLE_USER, parts=[question, *media])
    return await _reply(client, [message], thinking=thinking, timeout_s=timeout_s)


async def ask_with_zoom(
    client: AsyncClient, text: str, image: bytes, *, timeout_s: float = 120.0
) -> tuple[Reply, Look | None]:
    """One question about a picture, with the tool that zooms in on offer.

    The first reply and, if it calls the tool for some part of the picture, what followed: that part is cut out
    and shown, and the model answers again. ``timeout_s`` bounds each of the two requests.

    Raises:
        ClientError: the cluster refused or failed.
        OSError: ``image`` is no picture.
    """
    conversation = [user_message(text, images=[image])]
    first = await _reply(client, conversation, tools=[zoom.TOOL], thinking=False, timeout_s=timeout_s)
    corners = zoom_call(first.calls[0]) if first.calls else None
    if corners is None:
        return first, None
    with Image.open(io.BytesIO(image)) as opened:
        whole = ImageOps.exif_transpose(opened).convert("RGB")
    try:
        part = zoom.crop(whole, corners)
    except ValueError:
        return first, None
    picture = _png(part)
    call = content_pb2.ToolCall(id=first.calls[0].id, name=zoom.NAME, arguments_json=json.dumps({"bbox_2d": corners}))
    seen = content_pb2.ContentPart(image=content_pb2.ImagePart(source=media_source(picture)))
    conversation += [
        content_pb2.ChatMessage(role=content_pb2.ROLE_ASSISTANT, tool_calls=[call]),
        content_pb2.ChatMessage(role=content_pb2.ROLE_TOOL, tool_call_id=call.id, parts=[seen]),
    ]
    second = await _reply(client, conversation, tools=[zoom.TOOL], thinking=False, timeout_s=timeout_s)
    return first, Look(corners, picture, second)


def zoom_call(call: content_pb2.ToolCall) -> list[float] | None:
    """Corners (thousandths of the sides) that a call asks to look at; None when it is no readable call of the tool."""
    try:
        arguments = json.loads(call.arguments_json)
    except ValueError:
        return None
    return read_box(arguments) if call.name == zoom.NAME else None


async def _reply(
    client: AsyncClient,
    messages: Iterable[content_pb2.ChatMessage],
    *,
    tools: Iterable[Mapping[str, Any]] = (),
    thinking: bool,
    timeout_s: float,
) -> Reply:
    request = generate_request(messages, tools=tools, temperature=0, max_tokens=MAX_TOKENS, enable_thinking=thinking)
    choice = (await client.generate(request, timeout_s=timeout_s)).choices[0]
    return Reply(choice.reasoning_text, choice.text, tuple(choice.tool_calls))


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
