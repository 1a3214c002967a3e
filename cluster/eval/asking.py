"""Questions to a running cluster over gRPC, answered greedily; the model may look closer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cluster.client import AsyncClient, Reply, generate_request, reply_of, user_message
from cluster.client.looking import Look, Looking, look_async
from ernie_serving.v1 import content_pb2

MAX_TOKENS = 256
"""Bound on an answer, thinking included; the model's own answers and thoughts are shorter."""
MAX_ROUNDS = 3


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
    return reply_of(await client.generate(generate_request(message, **_greedy(thinking, timeout_s))))


async def ask_with_zoom(
    client: AsyncClient, text: str, image: bytes, *, timeout_s: float = 120.0
) -> tuple[Reply, list[Look]]:
    """One question about a picture, with the tool that zooms in on offer: the answer, and what was looked at before.

    ``timeout_s`` bounds each request.

    Raises:
        ClientError: the cluster refused or failed.
        OSError: ``image`` is no picture.
    """
    looking = Looking(generate_request(text, images=[image], **_greedy(False, timeout_s)), max_rounds=MAX_ROUNDS)
    return await look_async(client, looking), looking.looks


def _greedy(thinking: bool, timeout_s: float) -> dict[str, Any]:
    return {"temperature": 0, "max_tokens": MAX_TOKENS, "enable_thinking": thinking, "timeout_s": timeout_s}
