"""Paged attention, in all the ways a sequence can be cut into steps, against attention without a cache."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch

from actors.engine.execution import attention
from actors.engine.execution.attention import PagedAttention, PlainAttention, group_rows
from actors.engine.execution.attention_split import attend_earlier, attend_square, merge
from actors.engine.execution.kv_cache import KvCache, KvLayout
from actors.engine.execution.step_batch import Chunk, StepLayout
from actors.ernie.attention import Attention, PackedAttention

HEADS, KV_HEADS, WIDTH, LAYERS = 6, 2, 8, 2
Make = Callable[[KvCache, StepLayout], Attention]


def tensors(count: int, seed: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(count, heads, WIDTH, generator=generator, dtype=torch.float64).to(dtype)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    ]


def run_in_steps(
    lengths: list[int],
    steps: list[list[tuple[int, int]]],
    block_size: int,
    layer: int,
    make: Make = PagedAttention,
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attends sequences of ``lengths`` in ``steps`` of (sequence, count); also all at once without a cache."""
    layout = KvLayout(num_layers=LAYERS, block_size=block_size, num_kv_heads=KV_HEADS, head_dim=WIDTH, dtype=dtype)
    pages = [-(-length // block_size) for length in lengths]
    cache = KvCache.allocate(layout, sum(pages) + 3)
    order = np.random.default_rng(0).permutation(sum(pages) + 3)
    bounds = [0, *itertools.accumulate(pages)]
    tables = [order[a:b].astype(np.int64) for a, b in itertools.pairwise(bounds)]
    starts = [0, *itertools.accumulate(lengths)]
    q, k, v = tensors(starts[-1], sum(lengths), dtype)
    done = [0] * len(lengths)
    result = torch.zeros_like(q)
    for step in steps:
        decoding = sorted((s for s, count in step if count == 1), key=lambda s: done[s])
        rows = [starts[s] + done[s] for s in decoding]
        contexts = np.array([done[s] + 1 for s in decoding], dtype=np.int64)
        table = np.zeros((len(decoding), max(pages)), dtype=np.int64)
        for row, s in enumerate(decoding):
            table[row, : pages[s]] = tables[s]
        chunks = []
        for s, count in step:
            if count > 1:
                chunks.append(Chunk(start=len(rows), first=done[s], count=count, blocks=tables[s]))
                rows += range(starts[s] + done[s], starts[s] + done[s] + count)
        for s, count in step:
            done[s] += count
        paged = make(cache, StepLayout(contexts_n=contexts, tables_nP=table, chunks=tuple(chunks)))
        result[rows] = paged.attend(layer, q[rows], k[rows], v[rows])
    assert done == lengths
    return result, PackedAttention(starts).attend(layer, *tensors(starts[-1], sum(lengths)))


CASES = [
    ([7], [[(0, 7)]]),
    ([7], [[(0, 3)], [(0, 4)]]),
    ([9], [[(0, 1)]] * 9),
    ([5, 12, 1], [[(0, 4), (1, 10), (2, 1)], [(0, 1), (1, 1)], [(1, 1)]]),
    ([33, 4, 20], [[(0, 31), (1, 2), (2, 18)], [(0, 1), (1, 1), (2, 1)], [(0, 1), (1, 1), (2, 1)]]),
    ([6, 40], [[(1, 16)], [(0, 5), (1, 16)], [(0, 1), (1, 8)]]),
]


def narrow(cache: KvCache, layout: StepLayout) -> Attention:
    """Gathers three pages at once: long contexts come in segments, and long decoding rows run alone."""
    return PagedAttention(
        cache, layout, max_gather_bytes=3 * cache.layout.block_size * KV_HEADS * WIDTH * cache.layout.dtype.itemsize
    )


def unsplit(cache: KvCache, layout: StepLayout) -> Attention:
    """As on a device whose kernels give no log-sum-exps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "can_split", lambda device, dtype: False)
        return PagedAttention(cache, layout)


@pytest.mark.parametrize("make", [PagedAttention, PlainAttention, narrow, unsplit])
@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize(("lengths", "steps"), CASES)
def test_steps_equal_attention_without_a_cache(
    lengths: list[int], steps: list[list[tuple[int, int]]], block_size: int, make: Make
) -> None:
    for layer in range(LAYERS):
        got, want = run_in_steps(lengths, steps, block_size, layer, make)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("make", [PagedAttention, PlainAttention, narrow, unsplit])
@pytest.mark.parametrize(("lengths", "steps"), CASES)
def test_bfloat16_is_near_float64(lengths: list[int], steps: list[list[tuple[int, int]]], make: Make) -> None:
    got, want = run_in_steps(lengths, steps, 4, 1, make, torch.bfloat16)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=0.04)


def test_masked_calls_are_split_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "MAX_MASK", 64)
    got, want = run_in_steps(*CASES[5], 4, 0, unsplit)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_parts_merge_in_any_order() -> None:
    q, k, v = tensors(10, seed=1)
    want = PackedAttention([0, 10]).attend(0, q, k, v)[6:]
    square = attend_square(q[6:], k[6:], v[6:])
    early, late = (attend_earlier(q[6:], k[at], v[at]) for at in (slice(0, 2), slice(2, 6)))
    for merged in (merge(merge(square, early), late), merge(square, merge(late, early))):
        torch.testing.assert_close(merged.heads_last(torch.float64), want, rtol=0, atol=1e-14)


def test_parts_of_very_different_weight_merge_without_overflow() -> None:
    q, k, v = tensors(4, seed=2)
    k[:2] *= 300
    want = PackedAttention([0, 4]).attend(0, q, k, v)[2:]
    merged = merge(attend_square(q[2:], k[2:], v[2:]), attend_earlier(q[2:], k[:2], v[:2]))
    torch.testing.assert_close(merged.heads_last(torch.float64), want, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("pages", "limit", "runs"),
    [
        ([1, 1, 1, 8, 8, 23, 25], 30, [(0, 3), (3, 5), (5, 6), (6, 7)]),
        ([1, 4, 5], 100, [(0, 2), (2, 3)]),
        ([5, 5, 5, 5], 10, [(0, 2), (2, 4)]),
        ([40, 50], 10, [(0, 1), (1, 2)]),
        ([], 10, []),
    ],
)
def test_groups_respect_the_bound_and_pad_little(pages: list[int], limit: int, runs: list[tuple[int, int]]) -> None:
    assert group_rows(np.array(pages, dtype=np.int64), limit) == runs


def test_no_gather_of_a_long_context_exceeds_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk at the end of 131072 tokens, and a decoding row behind it."""
    block, context = 16, 131072
    layout = KvLayout(num_layers=1, block_size=block, num_kv_heads=1, head_dim=8, dtype=torch.float32)
    pages = context // block
    cache = KvCache.allocate(layout, pages)
    generator = torch.Generator().manual_seed(0)
    k, v = torch.randn(2, context, 1, 8, generator=generator)
    q = torch.randn(context, 2, 8, generator=generator)
    table = np.random.default_rng(1).permutation(pages).astype(np.int64)
    cache.write_tokens(0, table.tolist(), 0, torch.stack((k, v), dim=1))
    gathered: list[int] = []
    gather = attention._gather

    def counted(cache: KvCache, layer: int, at: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gathered.append(at.numel())
        return gather(cache, layer, at)

    monkeypatch.setattr(attention, "_gather", counted)
    limit = 1 << 20
    for first, count in ((context - 9, 8), (context - 1, 1)):
        at = slice(first, first + count)
        one = np.array([context] if count == 1 else [], dtype=np.int64)
        chunks = (Chunk(start=0, first=first, count=count, blocks=table),) if count > 1 else ()
        step = StepLayout(contexts_n=one, tables_nP=table[None, :][: len(one)], chunks=chunks)
        got = PagedAttention(cache, step, max_gather_bytes=limit).attend(0, q[at], k[at], v[at])
        want = PlainAttention(cache, step).attend(0, q[at], k[at], v[at])
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    assert max(gathered) * block * 8 * 4 <= limit
    assert len(gathered) == 2 * 4
