"""Requests of every kind, and what one undisturbed engine answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from actors.types import EngineRole
from cluster.client import generate_request, user_message
from cluster.generation import Delta
from cluster.grpc_request import generate_call
from ernie_serving.v1 import inference_pb2
from tests.in_process import in_process_cluster
from tests.media import mp4, png
from tests.tiny_model import tiny_checkpoint

WORDS = "word " * 300
"""Makes the prompt long enough to be met while it is computed."""

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 60}},
            "required": ["city"],
        },
    },
}


def calls(tokens: int) -> dict[str, inference_pb2.GenerateRequest]:
    """By kind; each reply has about so many tokens. All have media, so that they pass every stage."""
    picture = user_message(f"What is this? {WORDS}", images=[png(300, 200, 1), png(224, 168, 2)])
    other = user_message(f"Compare. {WORDS}", images=[png(150, 100, 3), png(280, 280, 4), png(90, 160, 5)])
    film = user_message(f"What moves? {WORDS}", videos=[mp4(96, 64, 24, 8, 6)])
    long = {"max_tokens": tokens, "ignore_eos": True}
    return {
        "greedy": generate_request(picture, temperature=0.0, **long),  # type: ignore[arg-type]
        "sampled": generate_request(film, temperature=0.9, top_p=0.95, seed=7, **long),  # type: ignore[arg-type]
        "penalised": generate_request(
            other,
            temperature=0.8,
            seed=8,
            repetition_penalty=1.3,
            presence_penalty=0.5,
            frequency_penalty=0.25,
            **long,  # type: ignore[arg-type]
        ),
        "constrained": generate_request(
            other, temperature=1.0, seed=9, regex=f"[a-z ]{{{tokens}}}", max_tokens=tokens, enable_thinking=False
        ),
        "thinking": generate_request(
            picture,
            temperature=1.0,
            seed=10,
            enable_thinking=True,
            reasoning_max_tokens=tokens // 2,
            regex=f"[a-z ]{{{tokens}}}",
            max_tokens=tokens,
        ),
        "tool": generate_request(
            picture, temperature=1.0, seed=11, tools=[WEATHER], tool_choice="required", max_tokens=tokens
        ),
    }


@dataclass(frozen=True, slots=True)
class Expected:
    """A kind of request and the tokens of its reply."""

    name: str
    request: inference_pb2.GenerateRequest
    tokens: tuple[int, ...]


async def expected(requests: Mapping[str, inference_pb2.GenerateRequest]) -> list[Expected]:
    """What the same parts answer in one process, one request at a time on one engine."""
    found = []
    async with in_process_cluster(tiny_checkpoint(), EngineRole.COLOCATED, kv_cache_gib=0.05) as cluster:
        for name, request in requests.items():
            request.return_token_ids = True
            ids: list[int] = []
            async for event in cluster.parts.router.generate(generate_call(request)):
                if isinstance(event, Delta):
                    ids += event.token_ids
            found.append(Expected(name, request, tuple(ids)))
    return found
