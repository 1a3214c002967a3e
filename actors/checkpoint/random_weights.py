"""Random weights by tensor name: the same seed gives the same model under both namings, whatever else is written.

Scales keep activations and logits of order one and make text that is not constant: norms lie around 1, every matrix
maps unit input to unit output, embedding rows are short against what the layers add (with tied embeddings a token would
otherwise predict itself), attention and routers are neither flat nor saturated.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from actors.ernie.names import CORRECTION_BIAS, Source, TensorSpec

NORM_NOISE = 0.1
BIAS_SCALE = 0.05
CORRECTION_SCALE = 0.25
"""Of the mean routing probability."""
ROUTER_GAIN = 1.5
QUERY_KEY_GAIN = 1.4
DOWN_GAIN = 1.7
"""silu(gate) * up of unit gate and up has a root mean square of about 0.6."""


def pieces(name: str, spec: TensorSpec, source: Source, seed: int) -> Iterator[Tensor]:
    """float32 values that ``source`` stores of canonical tensor ``name``, in storage order, one expert at a time."""
    if len(spec.shape) < 3:
        values = _matrix(name, spec.shape, seed)
        yield values.t() if source.transpose else values
    elif not source.target:
        for expert in range(spec.shape[0]):
            yield _matrix(f"{name}[{expert}]", spec.shape[1:], seed)
    else:
        expert_index, *rest = source.target
        values = _matrix(f"{name}[{expert_index}]", spec.shape[1:], seed)
        yield values[rest[0]] if rest else values


@lru_cache(maxsize=2)
def _matrix(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Gate and up of an expert may be stored apart, one after the other, hence the cache."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
    mean, scale = _distribution(name, shape)
    return torch.randn(shape, generator=generator).mul_(scale).add_(mean)


def _distribution(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    if name.endswith(CORRECTION_BIAS):
        return 0.0, CORRECTION_SCALE / shape[-1]
    if name.endswith(".bias"):
        return 0.0, BIAS_SCALE
    if len(shape) == 1:
        return 1.0, NORM_NOISE
    gain = 1.0
    if "moe.gate." in name:
        gain = ROUTER_GAIN
    elif "q_proj" in name or "k_proj" in name:
        gain = QUERY_KEY_GAIN
    elif "down_proj" in name or "mlp.fc2" in name:
        gain = DOWN_GAIN
    return 0.0, gain / math.sqrt(shape[-1])
