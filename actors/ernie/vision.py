"""Vision tower and resampler: uint8 patches of images and frame pairs to embeddings of the language model.

P patches of all units, C tower width, H heads, d head width, F = d / 2 rotary frequencies, V values of a patch,
D width of the language model.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from actors.ernie.config import VisionConfig
from actors.ernie.layers import LayerNorm, Linear, wide_dtype
from actors.ernie.resampler import Resampler, UnitRun
from actors.ernie.rope import rotate_halves, vision_rope_tables
from actors.kernels.cpu import CpuKernels, find_cpu_kernels
from actors.types import SPATIAL_MERGE, TEMPORAL_MERGE, Grid

PREFIX = "model.vision_tower"

log = logging.getLogger(__name__)


def quick_gelu(x: Tensor, kernels: CpuKernels | None = None) -> Tensor:
    if kernels is not None:
        return kernels.quick_gelu(x)
    return x * torch.sigmoid(1.702 * x)


def patch_positions(height: int, width: int) -> Tensor:
    """int64 [2, height * width]: row and column of each patch of a frame, in merge-block order (2 x 2 squares)."""
    m = SPATIAL_MERGE
    grid = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"))
    return grid.view(2, height // m, m, width // m, m).transpose(2, 3).flatten(1)


class TowerBlock:
    """x += attention(norm(x)); x += mlp(norm(x)). Attention is full within a frame and never crosses frames."""

    def __init__(
        self, config: VisionConfig, index: int, dtype: torch.dtype, device: torch.device, kernels: CpuKernels | None
    ) -> None:
        self.config = config
        self.index = index
        self.kernels = kernels
        width, inner, eps = config.hidden_size, config.intermediate_size, config.layer_norm_eps
        self.norm1 = LayerNorm.empty(width, eps=eps, dtype=dtype, device=device)
        self.norm2 = LayerNorm.empty(width, eps=eps, dtype=dtype, device=device)
        self.qkv = Linear.empty(3 * width, width, bias=True, dtype=dtype, device=device)
        self.out = Linear.empty(width, width, bias=True, dtype=dtype, device=device)
        self.fc1 = Linear.empty(inner, width, bias=True, dtype=dtype, device=device)
        self.fc2 = Linear.empty(width, inner, bias=True, dtype=dtype, device=device)

    def __call__(self, x_PC: Tensor, cos_PF: Tensor, sin_PF: Tensor, segments: Sequence[tuple[int, int]]) -> Tensor:
        """``segments``: (count, patches) of runs of equally long frames, in the order of the rows."""
        x_PC = x_PC + self._attend(self.norm1(x_PC), cos_PF, sin_PF, segments)
        return x_PC + self.fc2(quick_gelu(self.fc1(self.norm2(x_PC)), self.kernels))

    def _attend(self, x_PC: Tensor, cos_PF: Tensor, sin_PF: Tensor, segments: Sequence[tuple[int, int]]) -> Tensor:
        heads, width = self.config.num_heads, self.config.head_dim
        qkv_PHd = self.qkv(x_PC).view(x_PC.shape[0], 3 * heads, width)
        qk_PHd = rotate_halves(qkv_PHd[:, : 2 * heads], cos_PF, sin_PF, self.kernels)
        q_PHd, k_PHd, v_PHd = qk_PHd[:, :heads], qk_PHd[:, heads:], qkv_PHd[:, 2 * heads :]
        outputs: list[Tensor] = []
        start = 0
        for count, patches in segments:
            end = start + count * patches
            outputs += self._attend_frames(q_PHd[start:end], k_PHd[start:end], v_PHd[start:end], patches)
            start = end
        return self.out(outputs[0] if len(outputs) == 1 else torch.cat(outputs))

    def _attend_frames(self, q_PHd: Tensor, k_PHd: Tensor, v_PHd: Tensor, patches: int) -> list[Tensor]:
        """Parts [some frames' patches, C] in order, for frames of ``patches`` each."""
        heads, width = self.config.num_heads, self.config.head_dim
        if self.kernels is not None and self.kernels.attends(width):
            frames = zip(*(torch.split(x, patches) for x in (q_PHd, k_PHd, v_PHd)), strict=True)
            return [self.kernels.attention(q, k, v, causal=False).flatten(1) for q, k, v in frames]
        q, k, v = (x.view(-1, patches, heads, width).transpose(1, 2) for x in (q_PHd, k_PHd, v_PHd))
        return [F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, heads * width)]

    def parameters(self) -> dict[str, Tensor]:
        prefix, width = f"{PREFIX}.blocks.{self.index}", self.config.hidden_size
        return {
            **self.norm1.parameters(f"{prefix}.norm1"),
            **self.norm2.parameters(f"{prefix}.norm2"),
            **self.qkv.parameters({f"{prefix}.attn.qkv": 3 * width}),
            **self.out.parameters({f"{prefix}.attn.proj": width}),
            **self.fc1.parameters({f"{prefix}.mlp.fc1": self.config.intermediate_size}),
            **self.fc2.parameters({f"{prefix}.mlp.fc2": width}),
        }


class VisionModel:
    """Everything an encoder holds. Tensors are uninitialised until a loader has filled ``parameters_by_name``."""

    def __init__(
        self,
        config: VisionConfig,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        image_mean: Sequence[float],
        image_std: Sequence[float],
        plain: bool = False,
    ) -> None:
        """``image_mean``, ``image_std``: per channel, of pixels in 0..1, from preprocessor_config.json. ``plain`` keeps
        to torch where compiled kernels would be used.
        """
        if len(image_mean) != config.in_channels or len(image_std) != config.in_channels or min(image_std) <= 0:
            raise ValueError(f"image mean and std need {config.in_channels} values, std positive")
        self.config = config
        self.dtype = dtype
        self.device = torch.device(device)
        wide, values = wide_dtype(dtype), config.patch_size**2
        self.mean_V = torch.tensor(image_mean, dtype=wide, device=self.device).repeat_interleave(values)
        self.std_V = torch.tensor(image_std, dtype=wide, device=self.device).repeat_interleave(values)
        self.embed = Linear.empty(config.hidden_size, config.patch_values, bias=False, dtype=dtype, device=self.device)
        self.kernels = None if plain else _find_kernels(self.device, dtype)
        self.blocks = [TowerBlock(config, i, dtype, self.device, self.kernels) for i in range(config.depth)]
        self.norm = LayerNorm.empty(config.hidden_size, eps=config.layer_norm_eps, dtype=dtype, device=self.device)
        self.resampler = Resampler(config, dtype, self.device)

    def parameters_by_name(self) -> dict[str, Tensor]:
        """Destination view of every tower and resampler tensor by canonical name, in the checkpoint's shape."""
        views = self.embed.parameters({f"{PREFIX}.patch_embed.proj": self.config.hidden_size})
        for block in self.blocks:
            views |= block.parameters()
        return views | self.norm.parameters(f"{PREFIX}.ln") | self.resampler.parameters()

    def encode(self, patches: Tensor, unit_grids: Sequence[Grid]) -> list[Tensor]:
        """Embeddings [tokens of the unit, D] of each unit, in the order given.

        ``patches``: uint8 [P, 588], rows flattened (channel, 14, 14), unit after unit, frame after frame inside a unit,
        patches of a frame in merge-block order; on any device. ``unit_grids``: one image (frames = 1) or one frame pair
        (frames = 2) each, in patches; units of many sizes may share a call.

        Raises ValueError for grids that are no unit or do not add up to the rows.
        """
        self._check(patches, unit_grids)
        if not unit_grids:
            return []
        # Units of one shape become neighbours: attention and resampler then take each run as one batch.
        order = sorted(range(len(unit_grids)), key=lambda i: _shape(unit_grids[i]))
        pieces = torch.split(patches, [grid.patches for grid in unit_grids])
        moved = torch.cat([pieces[i] for i in order]) if order != sorted(order) else patches
        tokens = self._run(self.normalise(moved.to(self.device)), [unit_grids[i] for i in order])
        embeddings: list[Tensor | None] = [None] * len(unit_grids)
        for i, rows in zip(order, torch.split(tokens, [unit_grids[i].tokens for i in order]), strict=True):
            embeddings[i] = rows
        return [rows for rows in embeddings if rows is not None]

    def normalise(self, patches: Tensor) -> Tensor:
        """(pixel / 255 - mean) / std in float32 (float64 in a float64 model), then the model's dtype."""
        return ((patches.to(self.mean_V.dtype) / 255 - self.mean_V) / self.std_V).to(self.dtype)

    def _run(self, pixels: Tensor, grids: Sequence[Grid]) -> Tensor:
        """Tower and resampler over normalised rows of units that are sorted by ``_shape``."""
        runs = _runs(grids)
        segments: list[tuple[int, int]] = []
        for run in runs:
            frames = run.count * run.frames
            if segments and segments[-1][1] == run.patches:
                segments[-1] = (segments[-1][0] + frames, run.patches)
            else:
                segments.append((frames, run.patches))
        positions_2P = torch.cat([patch_positions(g.height, g.width).repeat(1, g.frames) for g in grids], dim=1)
        cos_PF, sin_PF = vision_rope_tables(
            positions_2P.to(self.device), self.config.head_dim, self.config.rope_theta, wide_dtype(self.dtype)
        )
        x_PC = self.embed(pixels)
        for block in self.blocks:
            x_PC = block(x_PC, cos_PF, sin_PF, segments)
        return self.resampler(self.norm(x_PC), runs)

    def _check(self, patches: Tensor, unit_grids: Sequence[Grid]) -> None:
        if patches.dtype != torch.uint8 or patches.dim() != 2 or patches.shape[1] != self.config.patch_values:
            raise ValueError(f"patches must be uint8 rows of {self.config.patch_values}, got {tuple(patches.shape)}")
        for grid in unit_grids:
            if not 1 <= grid.frames <= TEMPORAL_MERGE or grid.height % SPATIAL_MERGE or grid.width % SPATIAL_MERGE:
                raise ValueError(f"{grid} is not an image or a frame pair of whole 2 x 2 squares")
            if grid.height < SPATIAL_MERGE or grid.width < SPATIAL_MERGE:
                raise ValueError(f"{grid} is empty")
        expected = sum(grid.patches for grid in unit_grids)
        if patches.shape[0] != expected:
            raise ValueError(f"{patches.shape[0]} rows of patches for grids of {expected}")


def _find_kernels(device: torch.device, dtype: torch.dtype) -> CpuKernels | None:
    kernels, problem = find_cpu_kernels(device.type, dtype)
    if device.type != "meta":
        log.info("vision tower: %s", "compiled kernels" if kernels else f"plain form (no compiled kernels: {problem})")
    return kernels


def _shape(grid: Grid) -> tuple[int, int]:
    """(patches of a frame, frames): what a batch has in common."""
    return grid.height * grid.width, grid.frames


def _runs(grids: Sequence[Grid]) -> list[UnitRun]:
    """Runs of neighbours of one shape."""
    runs: list[UnitRun] = []
    for grid in grids:
        patches, frames = _shape(grid)
        if runs and (runs[-1].patches, runs[-1].frames) == (patches, frames):
            runs[-1] = UnitRun(count=runs[-1].count + 1, frames=frames, patches=patches)
        else:
            runs.append(UnitRun(count=1, frames=frames, patches=patches))
    return runs
