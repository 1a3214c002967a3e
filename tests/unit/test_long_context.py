"""A prompt near 131072 tokens with videos of 180 frames, through every pool within small byte windows."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch

from actors.types import EngineRole, Message, MessageRole, TextPart
from actors.wire.byte_budget import ByteBudget
from actors.wire.embedding_puller import EmbeddingPuller
from actors.wire.encode_queue import EncodeQueue
from cluster.generation import Finished, GenerateCall, Usage
from tests.in_process import in_process_cluster
from tests.media import video_part
from tests.tiny_model import tiny_checkpoint

CONTEXT = 131_072
NARROW = {
    "text_config.max_position_embeddings": CONTEXT,
    "text_config.num_hidden_layers": 1,
    "text_config.mlp_layer_types": ["sparse"],
    "text_config.hidden_size": 16,
    "text_config.num_attention_heads": 1,
    "text_config.num_key_value_heads": 1,
    "text_config.head_dim": 16,
    "text_config.intermediate_size": 16,
    "text_config.moe_intermediate_size": [8, 8],
    "text_config.moe_num_experts": 2,
    "text_config.moe_k": 1,
    "text_config.moe_num_shared_experts": 1,
    "vision_config.depth": 1,
    "vision_config.hidden_size": 16,
    "vision_config.num_heads": 2,
    "vision_config.intermediate_size": 16,
}
"""As little as a model can compute: attention over so long a prompt is the cost that is left."""
WINDOWS = {
    "patches of requests": 5_100_000,
    "patches ahead of their batch": 60_000,
    "embeddings": 200_000,
    "embeddings ahead of use": 5_000,
}
"""Bytes. Each video has 1.7 MB of patches in units of 19 kB, and 23 kB of embeddings in units of 256 bytes."""
VIDEO_TOKENS = 90 * 4


class Peaks:
    """The most that was in use, and all that went through: by the books of budgets, and of what is really held."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.booked = dict.fromkeys(WINDOWS.values(), 0)
        self.passed = dict.fromkeys(WINDOWS.values(), 0)
        self.patches = self.embeddings = 0
        self._held: dict[object, int] = {}
        admit, fetch, take_batch = ByteBudget._admit, EmbeddingPuller._fetch, EncodeQueue._take_batch
        consumed = EmbeddingPuller.consumed

        def counted_admit(budget: ByteBudget, byte_count: int) -> bool:
            admitted = admit(budget, byte_count)
            if admitted and budget.limit in self.booked:
                self.booked[budget.limit] = max(self.booked[budget.limit], budget.used)
                self.passed[budget.limit] += byte_count
            return admitted

        async def counted_fetch(puller: EmbeddingPuller, *unit: Any) -> torch.Tensor:
            tensor = await fetch(puller, *unit)
            key, _, media_index, unit_index = unit
            self._held[key, media_index, unit_index] = tensor.nbytes
            self.embeddings = max(self.embeddings, sum(self._held.values()))
            return tensor

        def counted_consumed(puller: EmbeddingPuller, *unit: Any) -> None:
            self._held.pop(unit, None)
            consumed(puller, *unit)

        def counted_batch(queue: EncodeQueue) -> Any:
            held = sum(job.patches.nbytes for job in queue._jobs.values() if job.patches is not None)
            self.patches = max(self.patches, held)
            return take_batch(queue)

        monkeypatch.setattr(ByteBudget, "_admit", counted_admit)
        monkeypatch.setattr(EmbeddingPuller, "_fetch", counted_fetch)
        monkeypatch.setattr(EmbeddingPuller, "consumed", counted_consumed)
        monkeypatch.setattr(EncodeQueue, "_take_batch", counted_batch)


@pytest.mark.timeout(900)
async def test_a_full_context_streams_through_every_window(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = Peaks(monkeypatch)
    async with in_process_cluster(
        tiny_checkpoint(overrides=NARROW),
        EngineRole.PREFILL,
        EngineRole.DECODE,
        dtype="float32",
        preprocessor={"patch_bytes": WINDOWS["patches of requests"]},
        encoder={
            "patch_window_bytes": WINDOWS["patches ahead of their batch"],
            "embedding_bytes": WINDOWS["embeddings"],
            "cache_bytes": 0,
        },
        media_window_bytes=WINDOWS["embeddings ahead of use"],
    ) as cluster:
        tokenizer = cluster.preprocessor._processor.tokenizer
        words = tokenizer.encode("the picture shows a small red house beside a green field. " * 20_000)
        filling = tokenizer.decode(words[: CONTEXT - 2 * VIDEO_TOKENS - 100])

        async def usage(text: str, *seeds: int) -> Usage:
            videos = (video_part(32, 32, 180, 2, seed) for seed in seeds)
            message = Message(role=MessageRole.USER, parts=(*videos, TextPart(text=text)))
            call = GenerateCall(messages=(message,), temperature=0.0, max_tokens=8, ignore_eos=True)
            *_, last = [event async for event in cluster.parts.router.generate(call)]
            assert isinstance(last, Finished)
            return last.usage

        # Together their patches do not fit: the last to come waits until others are encoded.
        long, *short = await asyncio.gather(usage(filling, 1, 2), usage("What moves?", 3), usage("What moves?", 4))
        assert CONTEXT - 200 < long.prompt_tokens + long.output_tokens <= CONTEXT
        assert long.media_tokens == 2 * VIDEO_TOKENS and {other.media_tokens for other in short} == {VIDEO_TOKENS}
        assert (long.output_tokens, *(other.output_tokens for other in short)) == (8, 8, 8)
        await cluster.wait_clean()
    for name, limit in WINDOWS.items():
        assert 0 < peaks.booked[limit] <= limit, name
        # Embeddings of all three fit together: they are kept until their prompt is computed.
        assert name == "embeddings" or peaks.passed[limit] > limit, name
    assert 0 < peaks.patches <= WINDOWS["patches ahead of their batch"]
    assert 0 < peaks.embeddings <= WINDOWS["embeddings ahead of use"]
