"""Rotary embeddings: three axes in the language model, two in the vision tower.

T tokens, N patches, H heads, d head width, F = d / 2 rotary frequencies.
"""

from __future__ import annotations

import torch
from torch import Tensor

from actors.ernie.config import TextConfig
from actors.kernels.cpu import CpuKernels


def inverse_frequencies(theta: float, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """theta ** (-2 i / width) for i in 0 .. width / 2 - 1."""
    exponents = torch.arange(0, width, 2, dtype=dtype, device=device) / width
    return 1.0 / theta**exponents


def text_rope_tables(positions_3T: Tensor, config: TextConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [T, F] in ``dtype`` (float32 or float64) for integer positions in the rows t, h, w.

    Frequencies turn with h, w, h, w ... and the lowest ones with t; h and w have equally many (TextConfig checks).
    """
    device = positions_3T.device
    inverse_F = inverse_frequencies(config.rope_theta, config.head_dim, dtype, device)
    t, h, w = positions_3T.to(dtype).unsqueeze(-1).unbind(0)
    # h and w alternate; written without an index tensor, which would have to be copied to the device each call.
    pairs = config.mrope_section[0]
    hw_TF = torch.stack([h, w], dim=-1).expand(-1, pairs, 2).flatten(1)
    angles_TF = torch.cat([hw_TF, t.expand(-1, config.mrope_section[2])], dim=1) * inverse_F
    return angles_TF.cos(), angles_TF.sin()


def rotate_pairs(x_THd: Tensor, cos_TF: Tensor, sin_TF: Tensor, kernels: CpuKernels | None = None) -> Tensor:
    """Rotates elements (2i, 2i+1) by angle i, in the dtype of the tables, and casts back: the language model's form."""
    if kernels is not None:
        return kernels.rotate_pairs(x_THd, cos_TF, sin_TF)
    pairs_THF2 = x_THd.to(cos_TF.dtype).view(*x_THd.shape[:-1], x_THd.shape[-1] // 2, 2)
    even_THF, odd_THF = pairs_THF2.unbind(-1)
    cos_T1F, sin_T1F = cos_TF.unsqueeze(1), sin_TF.unsqueeze(1)
    turned = torch.stack([even_THF * cos_T1F - odd_THF * sin_T1F, odd_THF * cos_T1F + even_THF * sin_T1F], dim=-1)
    return turned.flatten(-2).to(x_THd.dtype)


def vision_rope_tables(positions_2N: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [N, F] in ``dtype``: row 0 (h) turns the first half of the frequencies, row 1 (w) the second."""
    inverse = inverse_frequencies(theta, head_dim // 2, dtype, positions_2N.device)
    h, w = positions_2N.to(dtype).unsqueeze(-1).unbind(0)
    angles_NF = torch.cat([h * inverse, w * inverse], dim=1)
    return angles_NF.cos(), angles_NF.sin()


def rotate_halves(x_NHd: Tensor, cos_NF: Tensor, sin_NF: Tensor, kernels: CpuKernels | None = None) -> Tensor:
    """Rotates elements (i, i + d/2) by angle i, in the dtype of the tables, and casts back: the vision tower's form."""
    if kernels is not None:
        return kernels.rotate_halves(x_NHd, cos_NF, sin_NF)
    first_NHF, second_NHF = x_NHd.to(cos_NF.dtype).chunk(2, dim=-1)
    cos_N1F, sin_N1F = cos_NF.unsqueeze(1), sin_NF.unsqueeze(1)
    turned = torch.cat([first_NHF * cos_N1F - second_NHF * sin_N1F, second_NHF * cos_N1F + first_NHF * sin_N1F], dim=-1)
    return turned.to(x_NHd.dtype)
