"""Attention of one step over the paged cache: the form that runs everywhere, and the plain form beside it.

T tokens of the step, n tokens of one chunk or decoding group, H query heads, K key / value heads, G = H / K, d head
width, P pages of a sequence, b block size, C = P * b context slots.

New keys and values of all tokens go into their blocks first; then every token attends to what its sequence has in the
cache up to itself. ``PagedAttention`` runs decoding rows together, in groups of similar context, and chunks one by one.
No gather is larger than ``max_gather_bytes``, except on devices without ``attention_split``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from actors.engine.execution.attention_split import attend_earlier, attend_square, can_split, merge
from actors.engine.execution.kv_cache import KvCache
from actors.engine.execution.step_batch import Chunk, StepLayout

MAX_GATHER_BYTES = 64 << 20
"""Of keys, and as many of values."""
MAX_MASK = 16 << 20
"""Elements: query tokens times context of one masked call."""
QUERY_STEP = 512
"""Query tokens of one masked call over earlier context; less of the masked part is computed than with one for all."""


def cache_rows(cache: KvCache, layout: StepLayout) -> Tensor:
    """Row of the keys in layer 0 of every token of the step: int64 [T] on the cache's device."""
    blocks_T, offsets_T = layout.places(cache.layout.block_size)
    return cache.rows_of(torch.from_numpy(blocks_T).to(cache.device), torch.from_numpy(offsets_T).to(cache.device))


def store(cache: KvCache, layer: int, rows_T: Tensor, k_TKd: Tensor, v_TKd: Tensor) -> None:
    """Writes keys and values of one layer to where ``cache_rows`` says."""
    rows_T = rows_T + layer * 2 * cache.layout.block_size
    cache.rows.index_copy_(0, rows_T, k_TKd.flatten(1))
    cache.rows.index_copy_(0, rows_T + cache.layout.block_size, v_TKd.flatten(1))


@dataclass(frozen=True, slots=True)
class _DecodeGroup:
    start: int
    stop: int
    pages_nP: Tensor
    """Keys of layer 0."""
    mask_n11C: Tensor
    """0 where the context holds a token, else -inf."""


@dataclass(frozen=True, slots=True)
class _Piece:
    """A chunk and its earlier context in segments: (pages of the keys in layer 0, tokens in them)."""

    chunk: Chunk
    earlier: tuple[tuple[Tensor, int], ...]


class PagedAttention:
    """One step's attention; implements ``actors.ernie.attention.Attention``."""

    def __init__(self, cache: KvCache, layout: StepLayout, *, max_gather_bytes: int = MAX_GATHER_BYTES) -> None:
        self.cache = cache
        self._rows_T = cache_rows(cache, layout)
        self._block_size = cache.layout.block_size
        self._segment_pages = max(1, max_gather_bytes // _page_bytes(cache))
        self._split = can_split(cache.device, cache.layout.dtype)
        pages_n = -(-layout.contexts_n // self._block_size)
        together = layout.decode_count
        if self._split:
            together = int(np.searchsorted(pages_n, self._segment_pages, side="right"))
        self._groups = [
            self._group(layout, start, stop) for start, stop in group_rows(pages_n[:together], self._segment_pages)
        ]
        alone = [_as_chunk(layout, row) for row in range(together, layout.decode_count)]
        self._pieces = [_Piece(chunk, tuple(self._segments(chunk))) for chunk in (*alone, *layout.chunks)]

    def attend(self, layer: int, q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor) -> Tensor:
        store(self.cache, layer, self._rows_T, k_TKd, v_TKd)
        out_THd = torch.empty_like(q_THd, memory_format=torch.contiguous_format)
        for group in self._groups:
            out_THd[group.start : group.stop] = self._attend_group(layer, group, q_THd[group.start : group.stop])
        for piece in self._pieces:
            at = slice(piece.chunk.start, piece.chunk.start + piece.chunk.count)
            out_THd[at] = self._attend_piece(layer, piece, q_THd[at], k_TKd[at], v_TKd[at])
        return out_THd

    def _attend_group(self, layer: int, group: _DecodeGroup, q_nHd: Tensor) -> Tensor:
        """Query heads of one key head become query positions: no key is repeated."""
        n, heads, width = q_nHd.shape
        kv_heads = self.cache.layout.num_kv_heads
        k_nCKd, v_nCKd = (x.view(n, -1, kv_heads, width) for x in _gather(self.cache, layer, group.pages_nP))
        q_nKGd = q_nHd.view(n, kv_heads, heads // kv_heads, width)
        out_nKGd = F.scaled_dot_product_attention(
            q_nKGd, k_nCKd.transpose(1, 2), v_nCKd.transpose(1, 2), attn_mask=group.mask_n11C
        )
        return out_nKGd.reshape(n, heads, width)

    def _attend_piece(self, layer: int, piece: _Piece, q_nHd: Tensor, k_nKd: Tensor, v_nKd: Tensor) -> Tensor:
        chunk = piece.chunk
        if self._split:
            part = attend_square(q_nHd, k_nKd, v_nKd)
            for pages_P, count in piece.earlier:
                k_CKd, v_CKd = (x.view(-1, *k_nKd.shape[1:])[:count] for x in _gather(self.cache, layer, pages_P))
                part = merge(part, attend_earlier(q_nHd, k_CKd, v_CKd))
            return part.heads_last(q_nHd.dtype)
        if chunk.first == 0:
            return _attend_masked(q_nHd, k_nKd, v_nKd, 0)
        ((pages_P, _),) = piece.earlier
        k_CKd, v_CKd = (x.view(-1, *k_nKd.shape[1:]) for x in _gather(self.cache, layer, pages_P))
        return _attend_masked(q_nHd, k_CKd, v_CKd, chunk.first)

    def _segments(self, chunk: Chunk) -> Iterator[tuple[Tensor, int]]:
        """Of the context before a chunk; without splitting, one of all its context."""
        if not self._split:
            if chunk.first:
                yield self._pages(chunk.blocks[: -(-chunk.context // self._block_size)]), chunk.context
            return
        size = self._segment_pages * self._block_size
        for first in range(0, chunk.first, size):
            stop = min(first + size, chunk.first)
            yield self._pages(chunk.blocks[first // self._block_size : -(-stop // self._block_size)]), stop - first

    def _group(self, layout: StepLayout, start: int, stop: int) -> _DecodeGroup:
        contexts_n = layout.contexts_n[start:stop]
        pages = -(-int(contexts_n[-1]) // self._block_size)
        empty_nC = np.arange(pages * self._block_size)[None] >= contexts_n[:, None]
        mask_nC = torch.zeros(empty_nC.shape, dtype=self.cache.layout.dtype)
        mask_nC.masked_fill_(torch.from_numpy(empty_nC), float("-inf"))
        pages_nP = self._pages(layout.tables_nP[start:stop, :pages])
        return _DecodeGroup(start, stop, pages_nP, mask_nC[:, None, None].to(self.cache.device))

    def _pages(self, blocks: npt.NDArray[np.int64]) -> Tensor:
        return self.cache.pages_of(torch.from_numpy(blocks).to(self.cache.device))


class PlainAttention:
    """The plain form: every sequence alone, its whole context gathered, one masked product. Memory is not bounded."""

    def __init__(self, cache: KvCache, layout: StepLayout) -> None:
        self.cache = cache
        self._rows_T = cache_rows(cache, layout)
        self._chunks = [*(_as_chunk(layout, row) for row in range(layout.decode_count)), *layout.chunks]

    def attend(self, layer: int, q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor) -> Tensor:
        store(self.cache, layer, self._rows_T, k_TKd, v_TKd)
        outs = []
        for chunk in self._chunks:
            k_CKd, v_CKd = self.cache.read_tokens(layer, chunk.blocks.tolist(), 0, chunk.context).unbind(1)
            seen_nC = torch.ones(chunk.count, chunk.context, dtype=torch.bool, device=q_THd.device).tril(chunk.first)
            q_Hnd, k_KCd, v_KCd = (
                x.transpose(0, 1) for x in (q_THd[chunk.start : chunk.start + chunk.count], k_CKd, v_CKd)
            )
            out_1Hnd = F.scaled_dot_product_attention(
                q_Hnd[None], k_KCd[None], v_KCd[None], attn_mask=seen_nC, enable_gqa=True
            )
            outs.append(out_1Hnd[0].transpose(0, 1))
        return torch.cat(outs) if outs else q_THd


def group_rows(pages_n: npt.NDArray[np.int64], max_pages: int) -> list[tuple[int, int]]:
    """Runs start .. stop of rows whose page counts ascend, to be gathered together, padded to the longest.

    No run has more than ``max_pages`` pages, unless it is one row, and none pads much: its longest row has at most
    twice the pages of its shortest, and two.
    """
    runs = []
    start = 0
    while start < len(pages_n):
        padded = np.arange(1, len(pages_n) - start + 1) * pages_n[start:]
        fitting = np.searchsorted(padded, max_pages, side="right")
        similar = np.searchsorted(pages_n[start:], 2 * pages_n[start] + 2, side="right")
        stop = start + max(1, int(min(fitting, similar)))
        runs.append((start, stop))
        start = stop
    return runs


def _attend_masked(q_nHd: Tensor, k_CKd: Tensor, v_CKd: Tensor, first: int) -> Tensor:
    """Causal attention of tokens first .. first + n over keys that begin with the sequence; surplus keys are unseen."""
    count, context = q_nHd.shape[0], first + q_nHd.shape[0]
    q_1Hnd, k_1KCd, v_1KCd = (x.transpose(0, 1)[None] for x in (q_nHd, k_CKd, v_CKd))
    # Without earlier context the square causal mask is the kernel's own; one token sees everything.
    step = count if first == 0 else max(1, min(QUERY_STEP, MAX_MASK // context))
    parts = []
    for begin in range(0, count, step):
        end = min(begin + step, count)
        seen = first + end
        mask = None
        if first and end - begin > 1:
            query = torch.arange(first + begin, seen, device=q_nHd.device)
            mask = torch.arange(seen, device=q_nHd.device)[None] <= query[:, None]
        parts.append(
            F.scaled_dot_product_attention(
                q_1Hnd[:, :, begin:end],
                k_1KCd[:, :, :seen],
                v_1KCd[:, :, :seen],
                attn_mask=mask,
                is_causal=first == 0 and count > 1,
                enable_gqa=True,
            )
        )
    return torch.cat(parts, dim=2)[0].transpose(0, 1)


def _gather(cache: KvCache, layer: int, pages: Tensor) -> tuple[Tensor, Tensor]:
    at = pages.flatten() + 2 * layer
    return cache.pages.index_select(0, at), cache.pages.index_select(0, at + 1)


def _page_bytes(cache: KvCache) -> int:
    return cache.pages.shape[1] * cache.pages.element_size()


def _as_chunk(layout: StepLayout, row: int) -> Chunk:
    return Chunk(start=row, first=int(layout.contexts_n[row]) - 1, count=1, blocks=layout.tables_nP[row])
