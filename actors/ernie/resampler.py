"""Variable-resolution resampler: tower features of a unit into the language model's width.

B units of one shape, F frames of a unit, R tokens of a frame, S features of a merged 2 x 2 square of patches, C tower
width, D language width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from actors.ernie.config import VisionConfig
from actors.ernie.layers import LayerNorm, Linear, rms_norm

PREFIX = "model.resampler_model"


@dataclass(frozen=True, kw_only=True, slots=True)
class UnitRun:
    """Neighbouring units of one shape: ``count`` units of ``frames`` (1 or 2) frames of ``patches`` patches each."""

    count: int
    frames: int
    patches: int

    @property
    def rows(self) -> int:
        return self.count * self.frames * self.patches


class MergeMlp:
    """norm(fc2(gelu(fc1 x))) with the exact gelu."""

    def __init__(self, columns: int, rows: int, eps: float, dtype: torch.dtype, device: torch.device) -> None:
        self.fc1 = Linear.empty(rows, columns, bias=True, dtype=dtype, device=device)
        self.fc2 = Linear.empty(rows, rows, bias=True, dtype=dtype, device=device)
        self.norm = LayerNorm.empty(rows, eps=eps, dtype=dtype, device=device)

    def __call__(self, x: Tensor) -> Tensor:
        return self.norm(self.fc2(F.gelu(self.fc1(x))))

    def parameters(self, prefix: str) -> dict[str, Tensor]:
        rows = self.fc1.weight_OI.shape[0]
        return {
            **self.fc1.parameters({f"{prefix}.fc1": rows}),
            **self.fc2.parameters({f"{prefix}.fc2": rows}),
            **self.norm.parameters(f"{prefix}.ln"),
        }


class Resampler:
    """Four patches become one feature row, two frames share it; a still image is paired with itself."""

    def __init__(self, config: VisionConfig, dtype: torch.dtype, device: torch.device) -> None:
        self.config = config
        eps = config.layer_norm_eps
        self.spatial = MergeMlp(config.spatial_size, config.spatial_size, eps, dtype, device)
        self.temporal = MergeMlp(config.temporal_size, config.spatial_size, eps, dtype, device)
        self.project = Linear.empty(config.output_size, config.spatial_size, bias=True, dtype=dtype, device=device)
        self.norm_D = torch.empty(config.output_size, dtype=dtype, device=device)

    def __call__(self, features_PC: Tensor, runs: Sequence[UnitRun]) -> Tensor:
        """[all patches, C] in merge-block order, unit after unit, to [all tokens, D] in the same order of units."""
        squares = self.config.spatial_merge_size**2
        merged_RS = self.spatial(features_PC.view(-1, self.config.spatial_size))
        pairs: list[Tensor] = []
        for run, rows in zip(runs, torch.split(merged_RS, [run.rows // squares for run in runs]), strict=True):
            frames_BFRS = rows.view(run.count, run.frames, run.patches // squares, -1)
            pairs.append(torch.cat([frames_BFRS[:, 0], frames_BFRS[:, -1]], dim=-1).flatten(0, 1))
        tokens = self.project(self.temporal(torch.cat(pairs)))
        return rms_norm(tokens, self.norm_D, self.config.rms_norm_eps)

    def parameters(self) -> dict[str, Tensor]:
        return {
            **self.spatial.parameters(f"{PREFIX}.spatial_linear"),
            **self.temporal.parameters(f"{PREFIX}.temporal_linear"),
            **self.project.parameters({f"{PREFIX}.mlp": self.config.output_size}),
            f"{PREFIX}.after_norm.weight": self.norm_D,
        }
