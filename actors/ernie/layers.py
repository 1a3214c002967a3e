"""Building blocks shared by the backbone and the vision side.

T tokens, D model width, O / I output and input width of a linear, M width inside an MLP.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from actors.kernels.cpu import CpuKernels


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """dtype of norms, routers, rotary tables and pixels: float32, and float64 in a float64 model."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float, kernels: CpuKernels | None = None) -> Tensor:
    """x / sqrt(mean(x^2) + eps), computed wide, rounded to the dtype of ``x_TD`` and only then scaled by the weight."""
    if kernels is not None:
        return kernels.rms_norm(x_TD, weight_D, eps)
    wide_TD = x_TD.to(wide_dtype(x_TD.dtype))
    wide_TD = wide_TD * torch.rsqrt(wide_TD.square().mean(-1, keepdim=True) + eps)
    return weight_D * wide_TD.to(x_TD.dtype)


def product(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, kernels: CpuKernels | None) -> Tensor:
    """x W^T + b, by the ``kernels`` where they are given and the rows are few."""
    if kernels is not None and x_TI.shape[0] <= kernels.row_limit:
        return kernels.linear(x_TI.contiguous(), weight_OI, bias_O)
    return F.linear(x_TI, weight_OI, bias_O)


@dataclass(frozen=True, kw_only=True, slots=True)
class Linear:
    """x W^T + b. Several linears of a checkpoint that read the same input may share one, stacked on rows."""

    weight_OI: Tensor
    bias_O: Tensor | None
    kernels: CpuKernels | None = None
    """For few rows; None is the plain form."""

    @classmethod
    def empty(
        cls,
        rows: int,
        columns: int,
        *,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device,
        kernels: CpuKernels | None = None,
    ) -> Linear:
        return cls(
            weight_OI=torch.empty(rows, columns, dtype=dtype, device=device),
            bias_O=torch.empty(rows, dtype=dtype, device=device) if bias else None,
            kernels=kernels,
        )

    def __call__(self, x_TI: Tensor) -> Tensor:
        return product(x_TI, self.weight_OI, self.bias_O, self.kernels)

    def parameters(self, rows_by_prefix: Mapping[str, int]) -> dict[str, Tensor]:
        """Views of the stacked parts: ``{prefix: rows}`` in storage order gives ``prefix.weight``, ``prefix.bias``."""
        views: dict[str, Tensor] = {}
        start = 0
        for prefix, rows in rows_by_prefix.items():
            views[f"{prefix}.weight"] = self.weight_OI[start : start + rows]
            if self.bias_O is not None:
                views[f"{prefix}.bias"] = self.bias_O[start : start + rows]
            start += rows
        if start != self.weight_OI.shape[0]:
            raise ValueError(f"parts of {list(rows_by_prefix)} have {start} rows of {self.weight_OI.shape[0]}")
        return views


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerNorm:
    """Mean and variance normalisation with weight and bias."""

    weight_D: Tensor
    bias_D: Tensor
    eps: float

    @classmethod
    def empty(cls, width: int, *, eps: float, dtype: torch.dtype, device: torch.device) -> LayerNorm:
        weight_D, bias_D = torch.empty(2, width, dtype=dtype, device=device)
        return cls(weight_D=weight_D, bias_D=bias_D, eps=eps)

    def __call__(self, x_TD: Tensor) -> Tensor:
        return F.layer_norm(x_TD, self.weight_D.shape, self.weight_D, self.bias_D, self.eps)

    def parameters(self, prefix: str) -> dict[str, Tensor]:
        return {f"{prefix}.weight": self.weight_D, f"{prefix}.bias": self.bias_D}


def silu_and_multiply(gate_up_TF: Tensor) -> Tensor:
    """silu(gate) * up, where ``gate_up_TF`` holds gate in the first half of the columns and up in the second."""
    gate_TM, up_TM = gate_up_TF.chunk(2, dim=-1)
    return F.silu(gate_TM) * up_TM


@dataclass(frozen=True, kw_only=True, slots=True)
class GatedMlp:
    """down(silu(gate x) * up x), gate and up stored as one matrix. Dense layers and shared experts."""

    gate_up: Linear
    down: Linear

    @classmethod
    def empty(
        cls,
        width: int,
        inner: int,
        *,
        bias: bool,
        dtype: torch.dtype,
        device: torch.device,
        kernels: CpuKernels | None = None,
    ) -> GatedMlp:
        return cls(
            gate_up=Linear.empty(2 * inner, width, bias=bias, dtype=dtype, device=device, kernels=kernels),
            down=Linear.empty(width, inner, bias=bias, dtype=dtype, device=device, kernels=kernels),
        )

    def __call__(self, x_TD: Tensor) -> Tensor:
        kernels = self.gate_up.kernels
        if kernels is not None and self.gate_up.bias_O is None and x_TD.shape[0] <= kernels.row_limit:
            return kernels.gated_mlp(x_TD, self.gate_up.weight_OI, self.down.weight_OI)
        return self.down(silu_and_multiply(self.gate_up(x_TD)))

    def parameters(self, prefix: str) -> dict[str, Tensor]:
        inner = self.down.weight_OI.shape[1]
        views = self.gate_up.parameters({f"{prefix}.gate_proj": inner, f"{prefix}.up_proj": inner})
        return views | self.down.parameters({f"{prefix}.down_proj": self.down.weight_OI.shape[0]})
