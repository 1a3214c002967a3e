"""Keys and values of all layers in blocks. Block i is [L, 2, b, K, d], contiguous in the arena.

L layers, b block size (tokens), K key / value heads, d head width, B blocks, n tokens of one read or write.
Block-major, so that a whole block is one run of bytes and any block can hold any sequence's tokens.

Two flat views serve attention: *rows*, [B * L * 2 * b, K * d], one token's keys (or values) of one layer each; and
*pages*, [B * L * 2, b * K * d], the keys (or values) of a block in one layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class KvLayout:
    """Shape of one block."""

    num_layers: int
    block_size: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def token_values(self) -> int:
        """Elements of one token's keys in one layer."""
        return self.num_kv_heads * self.head_dim

    @property
    def block_bytes(self) -> int:
        return self.num_layers * 2 * self.block_size * self.token_values * self.dtype.itemsize

    @property
    def token_bytes(self) -> int:
        """Bytes one token takes in all layers."""
        return self.block_bytes // self.block_size


class KvCache:
    """Views of the blocks in ``storage``; which there are at present, and whose, is the BlockPool's business."""

    def __init__(self, layout: KvLayout, storage: Tensor) -> None:
        """``storage``: uint8, contiguous, a whole number of blocks. Raises ValueError for anything else."""
        if storage.dtype != torch.uint8 or storage.dim() != 1 or not storage.is_contiguous():
            raise ValueError("KV blocks need a contiguous one-dimensional uint8 buffer")
        if storage.numel() == 0 or storage.numel() % layout.block_bytes:
            raise ValueError(f"{storage.numel()} bytes are not a whole number of {layout.block_bytes}-byte blocks")
        self.layout = layout
        self.block_count = storage.numel() // layout.block_bytes
        self.device = storage.device
        flat = storage.view(layout.dtype)
        self.rows = flat.view(-1, layout.token_values)
        self.pages = flat.view(-1, layout.block_size * layout.token_values)
        self._blocks = flat.view(-1, layout.num_layers, 2, layout.block_size, layout.num_kv_heads, layout.head_dim)

    @classmethod
    def allocate(cls, layout: KvLayout, block_count: int, device: torch.device | str = "cpu") -> KvCache:
        """A cache with memory of its own, for those who have no arena."""
        return cls(layout, torch.zeros(block_count * layout.block_bytes, dtype=torch.uint8, device=device))

    def rows_of(self, blocks: Tensor, offsets: Tensor, layer: int = 0) -> Tensor:
        """Row of the keys in ``layer`` of tokens at ``offsets`` in ``blocks`` (int64, any equal shapes).

        Values lie ``block_size`` rows further, the next layer's keys ``2 * block_size``.
        """
        return ((blocks * self.layout.num_layers + layer) * 2) * self.layout.block_size + offsets

    def pages_of(self, blocks: Tensor, layer: int = 0) -> Tensor:
        """Page of the keys in ``layer`` of ``blocks`` (int64). Values lie 1 further, the next layer's keys 2."""
        return (blocks * self.layout.num_layers + layer) * 2

    def layer_pages(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer as views [B, b, K, d]; blocks lie ``block_bytes`` apart."""
        return self._blocks[:, layer, 0], self._blocks[:, layer, 1]

    @torch.no_grad()
    def read_tokens(self, layer: int, block_table: Sequence[int], first: int, count: int) -> Tensor:
        """Keys and values [n, 2, K, d] of tokens first .. first + count of a sequence, gathered into new memory."""
        layout = self.layout
        rows = self._token_rows(layer, block_table, first, count)
        pairs = torch.stack((rows, rows + layout.block_size), dim=1).flatten()
        return self.rows.index_select(0, pairs).view(count, 2, layout.num_kv_heads, layout.head_dim)

    @torch.no_grad()
    def write_tokens(self, layer: int, block_table: Sequence[int], first: int, kv_n2Kd: Tensor) -> None:
        """The inverse of ``read_tokens``. Raises ValueError for another shape or dtype, or tokens outside the table."""
        layout = self.layout
        count = kv_n2Kd.shape[0]
        expected = (count, 2, layout.num_kv_heads, layout.head_dim)
        if tuple(kv_n2Kd.shape) != expected or kv_n2Kd.dtype != layout.dtype:
            raise ValueError(f"got {tuple(kv_n2Kd.shape)} {kv_n2Kd.dtype}, expected {expected} {layout.dtype}")
        rows = self._token_rows(layer, block_table, first, count)
        pairs = torch.stack((rows, rows + layout.block_size), dim=1).flatten()
        self.rows.index_copy_(0, pairs, kv_n2Kd.to(self.device).reshape(2 * count, layout.token_values))

    def _token_rows(self, layer: int, block_table: Sequence[int], first: int, count: int) -> Tensor:
        size = self.layout.block_size
        if not 0 <= layer < self.layout.num_layers:
            raise ValueError(f"layer {layer} of {self.layout.num_layers}")
        if first < 0 or first + count > len(block_table) * size:
            raise ValueError(f"tokens {first} .. {first + count} are outside a table of {len(block_table)} blocks")
        token = torch.arange(first, first + count, device=self.device)
        start = first // size
        table = torch.tensor(block_table[start : -(-(first + count) // size)], dtype=torch.int64, device=self.device)
        return self.rows_of(table[token // size - start], token % size, layer)
