"""How the backbone asks for attention, and the plain form without a cache.

T tokens of all sequences of a batch, H query heads, K key / value heads, d head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class Attention(Protocol):
    """Knows which tokens belong together; the model does not."""

    def attend(self, layer: int, q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor) -> Tensor:
        """Causal attention of the batch's tokens over their own sequences, keys and values kept if there is a cache.

        Queries and keys come rotated; the scale d ** -0.5 is applied inside. Returns [T, H, d].
        """
        ...


class PackedAttention:
    """Whole sequences laid end to end, no cache: sequence i is tokens ``cu_seqlens[i] : cu_seqlens[i + 1]``."""

    def __init__(self, cu_seqlens: Sequence[int]) -> None:
        if not cu_seqlens or cu_seqlens[0] != 0 or any(a > b for a, b in pairwise(cu_seqlens)):
            raise ValueError(f"cu_seqlens must ascend from 0, got {list(cu_seqlens)}")
        self.cu_seqlens = tuple(cu_seqlens)

    def attend(self, layer: int, q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor) -> Tensor:
        if q_THd.shape[0] != self.cu_seqlens[-1]:
            raise ValueError(f"{q_THd.shape[0]} tokens for sequences of {self.cu_seqlens[-1]}")
        out_THd = torch.empty_like(q_THd)
        for start, end in pairwise(self.cu_seqlens):
            q, k, v = (x[start:end].transpose(0, 1).unsqueeze(0) for x in (q_THd, k_TKd, v_TKd))
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            out_THd[start:end] = out.squeeze(0).transpose(0, 1)
        return out_THd
