"""Attention of one step by torch's varlen kernel with block tables: keys and values are read where they lie.

T tokens of the step, n sequences of one call, P pages of their block tables, B blocks, b block size, H query heads,
K key / value heads, d head width.

The kernel takes pages [B, b, K, d]; those of one layer are a strided view of the block-major cache (rows K * d apart,
blocks L * 2 * b * K * d apart). FlashAttention goes by the strides of the view, so nothing is copied and a block stays
one run of bytes. That is read from its source: nothing here has run on a GPU yet, and ``forms.try_varlen`` tries it on
the device at hand before this form is chosen. FlashAttention 2, which comes with torch, wants a block size that is a
multiple of 256; FlashAttention 3 takes any.

``num_splits`` is 1: splitting a sequence's keys over thread blocks leaves rows of paged batches unwritten in
FlashAttention 2 (pytorch/pytorch#194167), and without it a sequence's result does not depend on what else is in the
batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from actors.engine.execution.attention import cache_rows, store
from actors.engine.execution.kv_cache import KvCache
from actors.engine.execution.step_batch import StepLayout

VarlenKernel = Callable[..., Tensor]
"""``torch.nn.attention.varlen.varlen_attn``, or what stands in for it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VarlenCall:
    """Sequences whose queries are rows start .. stop of the step. Tensors are int32, on the device."""

    start: int
    stop: int
    cu_queries: Tensor
    """[n + 1]: query i's rows are start + cu[i] .. start + cu[i + 1]."""
    contexts_n: Tensor
    """Tokens the last query of each sequence sees."""
    cu_contexts: Tensor
    """[n + 1], their sums; the kernel wants it and reads ``contexts_n``."""
    tables_nP: Tensor
    max_query: int
    max_context: int

    @property
    def window(self) -> tuple[int, int]:
        """Keys that a query sees before and after itself, -1 for all. A single query is a last token and sees all:
        without a causal bound FlashAttention 2 reads keys once for all query heads that share them.
        """
        return (-1, -1) if self.max_query == 1 else (-1, 0)


class VarlenAttention:
    """One step's attention; implements ``actors.ernie.attention.Attention``. bfloat16 or float16 on CUDA."""

    def __init__(
        self, cache: KvCache, rows_T: Tensor, calls: Sequence[VarlenCall], *, kernel: VarlenKernel | None = None
    ) -> None:
        """``rows_T``: as ``cache_rows`` gives them; ``calls`` cover them. ``kernel`` is torch's when None."""
        self.cache = cache
        self.rows_T = rows_T
        self.calls = tuple(calls)
        self._kernel = kernel or torch_kernel()

    @classmethod
    def of_layout(cls, cache: KvCache, layout: StepLayout, *, kernel: VarlenKernel | None = None) -> VarlenAttention:
        """One call for the decoding rows (see ``VarlenCall.window``), one for the chunks."""
        return cls(cache, cache_rows(cache, layout), varlen_calls(cache, layout), kernel=kernel)

    def attend(self, layer: int, q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor) -> Tensor:
        store(self.cache, layer, self.rows_T, k_TKd, v_TKd)
        keys, values = self.cache.layer_pages(layer)
        outs = [
            self._kernel(
                q_THd[call.start : call.stop],
                keys,
                values,
                call.cu_queries,
                call.cu_contexts,
                call.max_query,
                call.max_context,
                window_size=call.window,
                enable_gqa=True,
                seqused_k=call.contexts_n,
                block_table=call.tables_nP,
                num_splits=1,
            )
            for call in self.calls
        ]
        if not outs:
            return q_THd
        return outs[0] if len(outs) == 1 else torch.cat(outs)


def varlen_calls(cache: KvCache, layout: StepLayout) -> list[VarlenCall]:
    """The calls of one step."""
    calls = []
    count, block_size = layout.decode_count, cache.layout.block_size
    if count:
        contexts_n = _int32(layout.contexts_n, cache)
        tables_nP = _int32(layout.tables_nP, cache)
        calls.append(decode_call(contexts_n, tables_nP, max_context=int(layout.contexts_n[-1])))
    if layout.chunks:
        contexts = [chunk.context for chunk in layout.chunks]
        tables = np.zeros((len(contexts), -(-max(contexts) // block_size)), dtype=np.int64)
        for table_P, chunk in zip(tables, layout.chunks, strict=True):
            pages = -(-chunk.context // block_size)
            table_P[:pages] = chunk.blocks[:pages]
        calls.append(
            VarlenCall(
                start=count,
                stop=layout.token_count,
                cu_queries=_int32(np.cumsum([0, *(chunk.count for chunk in layout.chunks)]), cache),
                contexts_n=_int32(np.array(contexts), cache),
                cu_contexts=_int32(np.cumsum([0, *contexts]), cache),
                tables_nP=_int32(tables, cache),
                max_query=max(chunk.count for chunk in layout.chunks),
                max_context=max(contexts),
            )
        )
    return calls


def decode_call(contexts_n: Tensor, tables_nP: Tensor, *, max_context: int) -> VarlenCall:
    """One query for each of the first n rows. int32 tensors; runs inside a graph capture."""
    count = len(contexts_n)
    return VarlenCall(
        start=0,
        stop=count,
        cu_queries=torch.arange(count + 1, dtype=torch.int32, device=contexts_n.device),
        contexts_n=contexts_n,
        cu_contexts=F.pad(contexts_n.cumsum(0, dtype=torch.int32), (1, 0)),
        tables_nP=tables_nP,
        max_query=1,
        max_context=max_context,
    )


def torch_kernel() -> VarlenKernel:
    """Raises ImportError where torch has no such module."""
    from torch.nn.attention.varlen import varlen_attn

    return cast(VarlenKernel, varlen_attn)


def _int32(array: npt.NDArray[np.int64], cache: KvCache) -> Tensor:
    return torch.from_numpy(array.astype(np.int32)).to(cache.device)
