"""Decode steps as recorded graphs: one per batch size, replayed on inputs that always lie at the same addresses.

N rows of a graph, n rows of a step (n <= N), P pages of the longest possible block table.

A step of n rows runs in the smallest graph of N >= n rows. The rows left over repeat the last real one: they compute
and store what it stores at the same place, route to experts that are read anyway, and nobody reads their result.

What has run where: padding, buffers and tables are tested on a CPU with a recorder that calls again instead of
replaying. ``CudaRecorder`` and graphs of the varlen kernel have not run on any device yet; ``tests/gpu`` compares them
with the same steps run eagerly.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from actors.engine.execution.attention_varlen import VarlenAttention, VarlenKernel, decode_call
from actors.engine.execution.kv_cache import KvCache
from actors.engine.execution.step_batch import StepBatch, StepLayout
from actors.ernie.text import LanguageModel

Replay = Callable[[], Tensor]
"""Runs what was recorded; the result is the same tensor each time, overwritten."""


class Recorder(Protocol):
    """Turns work on fixed inputs into something that repeats it."""

    def __call__(self, work: Callable[[], Tensor]) -> Replay: ...


class CudaRecorder:
    """Records CUDA graphs. They share one memory pool: only one runs at a time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Callable[[], Tensor]) -> Replay:
        # Kernels choose and allocate on their first calls, which must not be recorded, on a stream of their own.
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                work()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            out = work()

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay


def graph_sizes(max_num_seqs: int) -> tuple[int, ...]:
    """1, 2, 4, 8 and then every multiple of 8 below 64, of 32 from there, up to ``max_num_seqs``, which is the last."""
    sizes = {1, 2, 4, *range(8, 64, 8), *range(64, max_num_seqs, 32)}
    return tuple(sorted({size for size in sizes if size < max_num_seqs} | {max_num_seqs}))


class DecodeGraphs:
    """Owns the graphs and their inputs. Used on the step thread only; runs in ``torch.inference_mode``."""

    def __init__(
        self,
        model: LanguageModel,
        cache: KvCache,
        *,
        sizes: Sequence[int],
        max_context: int,
        recorder: Recorder,
        kernel: VarlenKernel | None = None,
    ) -> None:
        """Records at once, the largest first, so that the smaller ones fit the memory it took.

        Recording writes to blocks 0 and up: nobody may use them yet.
        """
        self._model = model
        self._cache = cache
        self._max_context = max_context
        self._kernel = kernel
        self.sizes = tuple(sorted(sizes))
        pages = -(-max_context // cache.layout.block_size)
        largest = self.sizes[-1]
        pinned = cache.device.type == "cuda"
        # Per row: id, position, cache row, context.
        self._host_numbers_N4 = torch.zeros((largest, 4), dtype=torch.int64, pin_memory=pinned)
        self._host_tables_NP = torch.zeros((largest, pages), dtype=torch.int32, pin_memory=pinned)
        self._host_numbers_N4[:, 3] = 1
        self._numbers_N4 = self._host_numbers_N4.to(cache.device, copy=True)
        self._tables_NP = self._host_tables_NP.to(cache.device, copy=True)
        started = time.monotonic()
        # Streams are made on the current device, and a capture on another device would record nothing.
        with torch.inference_mode(), torch.cuda.device_of(self._numbers_N4):  # type: ignore[no-untyped-call]
            self._replays = {size: recorder(self._work(size)) for size in reversed(self.sizes)}
        self.seconds = time.monotonic() - started
        """Time to record."""

    def fits(self, layout: StepLayout) -> bool:
        """Whether a step only decodes, few enough rows of bounded context."""
        count = layout.decode_count
        return not layout.chunks and 0 < count <= self.sizes[-1] and int(layout.contexts_n[-1]) <= self._max_context

    def run(self, batch: StepBatch) -> Tensor:
        """Hidden states [n, D] of a step that fits, valid until the next one."""
        layout = batch.layout
        count = layout.decode_count
        size = next(size for size in self.sizes if size >= count)
        blocks_n, offsets_n = layout.places(self._cache.layout.block_size)
        rows_n = self._cache.rows_of(torch.from_numpy(blocks_n), torch.from_numpy(offsets_n)).numpy()
        numbers_n4 = np.stack((batch.ids_T, batch.positions_3T[0], rows_n, layout.contexts_n), axis=1)
        pad = np.minimum(np.arange(size), count - 1)
        if self._cache.device.type == "cuda":
            # The copies of the step before must have left the host buffers.
            torch.cuda.current_stream(self._cache.device).synchronize()
        self._host_numbers_N4.numpy()[:size] = numbers_n4[pad]
        self._host_tables_NP.numpy()[:size, : layout.tables_nP.shape[1]] = layout.tables_nP[pad]
        # Whole rows, so that a copy is one run of bytes.
        self._numbers_N4[:size].copy_(self._host_numbers_N4[:size], non_blocking=True)
        self._tables_NP[:size].copy_(self._host_tables_NP[:size], non_blocking=True)
        return self._replays[size]()[:count]

    def _work(self, size: int) -> Callable[[], Tensor]:
        def work() -> Tensor:
            ids_N, positions_N, rows_N, contexts_N = self._numbers_N4[:size].unbind(1)
            call = decode_call(contexts_N.to(torch.int32), self._tables_NP[:size], max_context=self._max_context)
            attention = VarlenAttention(self._cache, rows_N, [call], kernel=self._kernel)
            x_ND = self._model.embed(ids_N)
            return self._model.forward(x_ND, positions_N.expand(3, -1), None, attention)

        return work
