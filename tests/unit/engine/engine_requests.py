"""Requests for engines and schedulers in tests."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from actors.types import EngineRequest, Grid, MediaKind, MediaSpan, SamplingParams, SequenceKey

Embeddings = dict[tuple[int, int], torch.Tensor]
"""By medium and unit, [tokens of the unit, hidden size]."""
Wanted = tuple[EngineRequest, Embeddings | None]

IMAGE, VIDEO = 100, 127
EOS = 2


def key(name: str | int, attempt: int = 0) -> SequenceKey:
    return SequenceKey(str(name), attempt, 0)


def request(
    prompt: Sequence[int],
    *,
    max_tokens: int = 8,
    media: Sequence[MediaSpan] = (),
    outputs: Sequence[int] = (),
    arrival_s: float = 0.0,
    deadline_s: float = 4e9,
    priority: int = 0,
    seed: int = 7,
    salt: bytes = b"",
    **sampling: Any,
) -> EngineRequest:
    sampling = {"temperature": 0.0, "ignore_eos": True} | sampling
    return EngineRequest(
        prompt_ids=tuple(prompt),
        media=tuple(media),
        output_ids=tuple(outputs),
        sampling=SamplingParams(max_tokens=max_tokens, **sampling),
        seed=seed,
        salt=salt,
        arrival_s=arrival_s,
        deadline_s=deadline_s,
        priority=priority,
    )


def span(kind: MediaKind, offset: int, grid: Grid) -> MediaSpan:
    keys = tuple(bytes([i]) * 32 for i in range(grid.units))
    return MediaSpan(kind=kind, offset=offset, grid=grid, embedding_keys=keys, encoder_address="")


def media_request(content: int, **options: Any) -> tuple[EngineRequest, Embeddings]:
    """Text, an image of 2 x 3 tokens, text, a video of 3 pairs of 2 x 2 tokens, text; and its embeddings."""
    generator = torch.Generator().manual_seed(content)
    text = torch.randint(3, IMAGE, (12,), generator=generator).tolist()
    image, video = Grid(1, 4, 6), Grid(6, 4, 4)
    prompt = [*text[:3], 110, *[IMAGE] * image.tokens, 111, *text[3:6], 112, *[VIDEO] * video.tokens, 113, *text[6:]]
    embeddings = {
        (media, unit): torch.randn(grid.tokens_per_unit, 48, generator=generator, dtype=torch.float64)
        for media, grid in enumerate((image, video))
        for unit in range(grid.units)
    }
    spans = [span(MediaKind.IMAGE, 4, image), span(MediaKind.VIDEO, 4 + image.tokens + 5, video)]
    return request(prompt, media=named_by(embeddings, spans), **options), embeddings


def named_by(embeddings: Embeddings, media: Sequence[MediaSpan]) -> tuple[MediaSpan, ...]:
    """The spans with keys that follow from the embeddings, as they do outside tests."""
    return tuple(
        replace(one, embedding_keys=tuple(_name(embeddings[number, unit]) for unit in range(one.grid.units)))
        for number, one in enumerate(media)
    )


def _name(embedding: torch.Tensor) -> bytes:
    return hashlib.blake2b(embedding.numpy().tobytes(), digest_size=32).digest()


def chats() -> list[Wanted]:
    """32 replies: text and media, many of which begin alike; some sampled."""
    generator = torch.Generator().manual_seed(11)
    start = torch.randint(3, IMAGE, (21,), generator=generator).tolist()
    wanted: list[Wanted] = []
    for number in range(24):
        tail = torch.randint(3, IMAGE, (1 + number % 7,), generator=generator).tolist()
        how = {"temperature": 0.9, "seed": number} if number % 3 == 2 else {}
        wanted.append((request([*start[: 21 - 4 * (number % 3)], *tail], max_tokens=3 + number % 9, **how), None))
    for number in range(8):
        shown, embeddings = media_request(number % 2)
        question = torch.randint(3, IMAGE, (number,), generator=generator).tolist()
        prompt = [*shown.prompt_ids, *question]
        wanted.append((request(prompt, media=named_by(embeddings, shown.media), max_tokens=5 + number), embeddings))
    return wanted
