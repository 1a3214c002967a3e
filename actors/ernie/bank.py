"""The vision expert bank of all layers inside one run of bytes, so that it can come and go without moving anything.

A decode engine uses those bytes as KV blocks. Layout: per sparse layer, in order, router, correction, gate_up, down;
each tensor starts at a multiple of 256 bytes from the start of the buffer. A rank of a group has the whole routers and
its own share of the experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from actors.ernie.config import TextConfig
from actors.ernie.moe import ExpertBank, bank_shapes, expert_tensor_names
from actors.parallel.layout import ExpertShare

ALIGNMENT = 256


def _tensors(
    config: TextConfig, dtype: torch.dtype, share: ExpertShare | None
) -> Iterator[tuple[int, str, tuple[int, ...], torch.dtype, int]]:
    """(layer, field, shape, dtype, bytes) in storage order."""
    for layer in config.sparse_layers:
        held = None if share is None else len(share.vision(layer))
        shapes = bank_shapes(config, config.moe_intermediate_size[1], dtype, held)
        for field, (shape, kind) in shapes.items():
            yield layer, field, shape, kind, math.prod(shape) * kind.itemsize


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def vision_bank_bytes(config: TextConfig, dtype: torch.dtype, share: ExpertShare | None = None) -> int:
    """Bytes of the buffer a VisionBank needs, padding included. ``share``: of the experts; None = all are here."""
    return sum(_padded(size) for *_, size in _tensors(config, dtype, share))


def empty_bank_buffer(
    config: TextConfig, dtype: torch.dtype, device: torch.device | str = "cpu", share: ExpertShare | None = None
) -> Tensor:
    """An uninitialised buffer for one bank, for those who have no arena to put it in."""
    return torch.empty(vision_bank_bytes(config, dtype, share), dtype=torch.uint8, device=device)


class VisionBank:
    """Views of the vision experts and their routers into ``buffer``; nothing is allocated or written here."""

    def __init__(
        self, config: TextConfig, dtype: torch.dtype, buffer: Tensor, share: ExpertShare | None = None
    ) -> None:
        """``buffer``: uint8, contiguous, one dimension, ``vision_bank_bytes`` or more, starting at a multiple of 256.

        ``share``: which experts this rank of a group holds; None = all. Raises ValueError for any other buffer.
        """
        need = vision_bank_bytes(config, dtype, share)
        if buffer.dtype != torch.uint8 or buffer.dim() != 1 or not buffer.is_contiguous():
            raise ValueError("the vision bank needs a contiguous one-dimensional uint8 buffer")
        if buffer.numel() < need:
            raise ValueError(f"the vision bank needs {need} bytes; the buffer has {buffer.numel()}")
        if buffer.storage_offset() % ALIGNMENT:
            raise ValueError(f"the vision bank's buffer must start at a multiple of {ALIGNMENT} bytes of its storage")
        self.config = config
        self.dtype = dtype
        self.share = share
        fields: dict[int, dict[str, Tensor]] = {}
        start = 0
        for layer, field, shape, kind, size in _tensors(config, dtype, share):
            fields.setdefault(layer, {})[field] = buffer[start : start + size].view(kind).view(shape)
            start += _padded(size)
        self.layers = {layer: ExpertBank(**tensors) for layer, tensors in fields.items()}
        """By layer index; dense layers have none."""

    def parameters_by_name(self) -> dict[str, Tensor]:
        """Destination of every vision-expert tensor by canonical name, in the shape of the checkpoint.

        Those that ``expert_rows`` names have only the rows it tells.
        """
        views: dict[str, Tensor] = {}
        for layer, bank in self.layers.items():
            views |= bank.parameters(_prefix(layer))
        return views

    def expert_rows(self) -> dict[str, tuple[int, ...]]:
        """By canonical name, which experts a tensor holds, in its order. Empty if all are here."""
        if self.share is None:
            return {}
        return {name: self.share.vision(i) for i in self.layers for name in expert_tensor_names(_prefix(i))}


def _prefix(layer: int) -> str:
    return f"model.language_model.layers.{layer}.mlp.vision_moe"
