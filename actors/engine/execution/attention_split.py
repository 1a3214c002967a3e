"""Attention of a chunk in parts, merged: the chunk's own square, and what lies before it in segments without a mask.

n tokens of the chunk, H query heads, K key / value heads, G = H / K, d head width, C keys of a segment.

softmax over a union of keys is the mean of the softmaxes over its parts, weighted by exp(lse), where lse is the log of
the sum of a part's exponentials. The CPU kernel of scaled_dot_product_attention returns both.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from actors.ernie.layers import wide_dtype


@dataclass(frozen=True, slots=True)
class Part:
    """Attention over some of the keys: the result and the log of its sum of exponentials."""

    out_GKnd: Tensor
    lse_GKn: Tensor

    def heads_last(self, dtype: torch.dtype) -> Tensor:
        """[n, H, d]"""
        return self.out_GKnd.permute(2, 1, 0, 3).flatten(1, 2).to(dtype)


def can_split(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernel that returns log-sum-exps exists."""
    return device.type == "cpu" and dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def attend_square(q_nHd: Tensor, k_nKd: Tensor, v_nKd: Tensor) -> Part:
    """Causal attention of a chunk over itself. Query heads of one key head are a batch, whose keys are one tensor."""
    n, kv_heads, width = k_nKd.shape
    q_GKnd = q_nHd.view(n, kv_heads, -1, width).permute(2, 1, 0, 3)
    k_GKnd, v_GKnd = (x.transpose(0, 1).expand(q_GKnd.shape[0], -1, -1, -1) for x in (k_nKd, v_nKd))
    return Part(*_kernel(q_GKnd, k_GKnd, v_GKnd, True))


def attend_earlier(q_nHd: Tensor, k_CKd: Tensor, v_CKd: Tensor) -> Part:
    """Attention of a chunk over keys that all its tokens see. Query heads of one key head become query positions."""
    _, kv_heads, width = k_CKd.shape
    q_KGnd = q_nHd.view(q_nHd.shape[0], kv_heads, -1, width).permute(1, 2, 0, 3)
    out, lse = _kernel(q_KGnd.flatten(1, 2)[None], k_CKd.transpose(0, 1)[None], v_CKd.transpose(0, 1)[None], False)
    return Part(out.view(q_KGnd.shape).transpose(0, 1), lse.view(q_KGnd.shape[:3]).transpose(0, 1))


def merge(one: Part, other: Part) -> Part:
    """Attention over the keys of both, in float32 (float64 for float64)."""
    wide = wide_dtype(one.out_GKnd.dtype)
    lse_GKn = torch.logaddexp(one.lse_GKn, other.lse_GKn)
    share_GKn1 = (other.lse_GKn - lse_GKn).exp().unsqueeze(-1).to(wide)
    return Part(torch.lerp(one.out_GKnd.to(wide), other.out_GKnd.to(wide), share_GKn1), lse_GKn)


def _kernel(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)
    return out, lse
