"""Attention of one step over the paged cache.

T tokens of the step, n tokens of one slice or group, H query heads, K key / value heads, G = H / K, d head width,
P pages of a sequence, b block size, C = P * b context slots.

The first tokens of a step are its decoding slices (one token each), the rest are prompt slices. New keys and values of
all tokens go into their blocks first; then each slice attends to what its sequence has in the cache up to itself.

Decoding slices run together, in groups of similar context (batched form); the plain form takes any slice alone. Both
are bounded: no group gathers more than ``max_gather_bytes`` of keys unless one sequence alone needs more, and no mask
is larger than ``MAX_MASK``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from actors.engine.kv_cache import KvCache

MAX_GATHER_BYTES = 64 << 20
MAX_MASK = 16 << 20
"""Elements: query tokens times context of one call."""
QUERY_STEP = 512
"""Query tokens of one call over earlier context; less of the masked part is computed than with one call for all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SliceSpan:
    """Tokens start .. start + count of the step are tokens first .. first + count of one sequence."""

    start: int
    first: int
    count: int
    blocks: npt.NDArray[np.int64]
    """Its whole block table."""

    @property
    def context(self) -> int:
        """Tokens its last token sees."""
        return self.first + self.count


@dataclass(frozen=True, slots=True)
class _DecodeGroup:
    start: int
    stop: int
    pages_nP: Tensor
    """Keys of layer 0."""
    mask_n1C: Tensor
    """True where the context holds a token."""


class PagedAttention:
    """One step's attention; implements ``actors.ernie.attention.Attention``."""

    def __init__(
        self,
        cache: KvCache,
        spans: Sequence[SliceSpan],
        decode_count: int,
        *,
        batched: bool = True,
        max_gather_bytes: int = MAX_GATHER_BYTES,
    ) -> None:
        """``spans`` cover the step's tokens in order; the first ``decode_count`` have one token each.

        ``batched=False`` runs every slice by itself: the plain form.
        """
        self.cache = cache
        self.block_size = cache.layout.block_size
        device = cache.device
        tokens = [np.arange(span.first, span.context) for span in spans]
        blocks = [span.blocks[token // self.block_size] for span, token in zip(spans, tokens, strict=True)]
        offsets = np.concatenate(tokens) % self.block_size
        self._rows_T = cache.rows_of(
            torch.from_numpy(np.concatenate(blocks)).to(device), torch.from_numpy(offsets).to(device)
        )
        alone = spans[decode_count:] if batched else spans
        self._groups = self._group(spans[:decode_count], max_gather_bytes) if batched else []
        self._alone = [(span, self._pages(span.blocks[: self._page_count(span)])) for span in alone]

    def attend(self, layer: int, q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor) -> Tensor:
        rows_T = self._rows_T + layer * 2 * self.block_size
        self.cache.rows.index_copy_(0, rows_T, k_TKd.flatten(1))
        self.cache.rows.index_copy_(0, rows_T + self.block_size, v_TKd.flatten(1))
        out_THd = torch.empty_like(q_THd, memory_format=torch.contiguous_format)
        for group in self._groups:
            out_THd[group.start : group.stop] = self._attend_group(layer, group, q_THd[group.start : group.stop])
        for span, pages_P in self._alone:
            at = slice(span.start, span.start + span.count)
            out_THd[at] = self._attend_alone(layer, span, pages_P, q_THd[at])
        return out_THd

    def _attend_group(self, layer: int, group: _DecodeGroup, q_nHd: Tensor) -> Tensor:
        """Query heads of one key head become query positions: no key is repeated."""
        n, heads, width = q_nHd.shape
        kv_heads = self.cache.layout.num_kv_heads
        shape = (n, -1, kv_heads, width)
        pages_nP = group.pages_nP + 2 * layer
        k_nCKd = self.cache.pages.index_select(0, pages_nP.flatten()).view(shape)
        v_nCKd = self.cache.pages.index_select(0, (pages_nP + 1).flatten()).view(shape)
        q_nKGd = q_nHd.view(n, kv_heads, heads // kv_heads, width)
        mask = group.mask_n1C[:, None]
        out_nKGd = F.scaled_dot_product_attention(
            q_nKGd, k_nCKd.transpose(1, 2), v_nCKd.transpose(1, 2), attn_mask=mask
        )
        return out_nKGd.reshape(n, heads, width)

    def _attend_alone(self, layer: int, span: SliceSpan, pages_P: Tensor, q_nHd: Tensor) -> Tensor:
        kv_heads = self.cache.layout.num_kv_heads
        shape = (1, -1, kv_heads, q_nHd.shape[-1])
        k_1KCd = self.cache.pages.index_select(0, pages_P + 2 * layer).view(shape).transpose(1, 2)
        v_1KCd = self.cache.pages.index_select(0, pages_P + 2 * layer + 1).view(shape).transpose(1, 2)
        q_1Hnd = q_nHd.transpose(0, 1)[None]
        step = span.count if span.first == 0 else max(1, min(QUERY_STEP, MAX_MASK // span.context))
        parts = []
        for begin in range(0, span.count, step):
            end = min(begin + step, span.count)
            seen = span.first + end
            # Without earlier context the square causal mask is the kernel's own; one token sees everything.
            mask = None
            if span.first and end - begin > 1:
                query = torch.arange(span.first + begin, seen, device=q_nHd.device)
                mask = torch.arange(seen, device=q_nHd.device)[None] <= query[:, None]
            parts.append(
                F.scaled_dot_product_attention(
                    q_1Hnd[:, :, begin:end],
                    k_1KCd[:, :, :seen],
                    v_1KCd[:, :, :seen],
                    attn_mask=mask,
                    is_causal=span.first == 0 and span.count > 1,
                    enable_gqa=True,
                )
            )
        return torch.cat(parts, dim=2)[0].transpose(0, 1)

    def _group(self, spans: Sequence[SliceSpan], max_gather_bytes: int) -> list[_DecodeGroup]:
        """Runs of neighbours that share a padded gather; callers sort by context, so that little of it is padding."""
        page_bytes = self.cache.pages.shape[1] * self.cache.pages.element_size()
        groups = []
        start = 0
        while start < len(spans):
            stop = start + 1
            low = high = self._page_count(spans[start])
            while stop < len(spans):
                pages = self._page_count(spans[stop])
                low, high = min(low, pages), max(high, pages)
                if (stop + 1 - start) * high * page_bytes > max_gather_bytes or high > 2 * low + 2:
                    break
                stop += 1
            groups.append(self._decode_group(start, spans[start:stop]))
            start = stop
        return groups

    def _decode_group(self, start: int, spans: Sequence[SliceSpan]) -> _DecodeGroup:
        pages = max(self._page_count(span) for span in spans)
        table = np.zeros((len(spans), pages), dtype=np.int64)
        for row, span in enumerate(spans):
            count = self._page_count(span)
            table[row, :count] = span.blocks[:count]
        contexts = np.array([span.context for span in spans])
        mask = np.arange(pages * self.block_size)[None] < contexts[:, None]
        mask_n1C = torch.from_numpy(mask[:, None]).to(self.cache.device)
        return _DecodeGroup(start, start + len(spans), self._pages(table), mask_n1C)

    def _pages(self, blocks: npt.NDArray[np.int64]) -> Tensor:
        return self.cache.pages_of(torch.from_numpy(blocks).to(self.cache.device))

    def _page_count(self, span: SliceSpan) -> int:
        return -(-span.context // self.block_size)
