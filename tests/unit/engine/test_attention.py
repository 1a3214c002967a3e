from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from actors.engine import attention
from actors.engine.attention import PagedAttention, SliceSpan
from actors.engine.kv_cache import KvCache, KvLayout
from actors.ernie.attention import PackedAttention

HEADS, KV_HEADS, WIDTH, LAYERS = 6, 2, 8, 2


def tensors(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(count, heads, WIDTH, generator=generator, dtype=torch.float64)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )  # type: ignore[return-value]


def run_in_steps(
    lengths: list[int], steps: list[list[tuple[int, int]]], block_size: int, layer: int, **options: object
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attends sequences of ``lengths`` in ``steps`` of (sequence, count); also all at once without a cache."""
    layout = KvLayout(
        num_layers=LAYERS, block_size=block_size, num_kv_heads=KV_HEADS, head_dim=WIDTH, dtype=torch.float64
    )
    pages = [-(-length // block_size) for length in lengths]
    cache = KvCache.allocate(layout, sum(pages) + 3)
    order = np.random.default_rng(0).permutation(sum(pages) + 3)
    bounds = [0, *itertools.accumulate(pages)]
    tables = [order[a:b].astype(np.int64) for a, b in itertools.pairwise(bounds)]
    starts = [0, *itertools.accumulate(lengths)]
    q, k, v = tensors(starts[-1], seed=sum(lengths))
    done = [0] * len(lengths)
    result = torch.zeros_like(q)
    for step in steps:
        ordered = sorted(step, key=lambda part: part[1] > 1)
        spans: list[SliceSpan] = []
        rows: list[int] = []
        at = 0
        for sequence, count in ordered:
            spans.append(SliceSpan(start=at, first=done[sequence], count=count, blocks=tables[sequence]))
            rows += range(starts[sequence] + done[sequence], starts[sequence] + done[sequence] + count)
            done[sequence] += count
            at += count
        paged = PagedAttention(cache, spans, sum(count == 1 for _, count in ordered), **options)  # type: ignore[arg-type]
        result[rows] = paged.attend(layer, q[rows], k[rows], v[rows])
    assert done == lengths
    return result, PackedAttention(starts).attend(layer, q, k, v)


CASES = [
    ([7], [[(0, 7)]]),
    ([7], [[(0, 3)], [(0, 4)]]),
    ([9], [[(0, 1)]] * 9),
    ([5, 12, 1], [[(0, 4), (1, 10), (2, 1)], [(0, 1), (1, 1)], [(1, 1)]]),
    ([33, 4, 20], [[(0, 31), (1, 2), (2, 18)], [(0, 1), (1, 1), (2, 1)], [(0, 1), (1, 1), (2, 1)]]),
    ([6, 40], [[(1, 16)], [(0, 5), (1, 16)], [(0, 1), (1, 8)]]),
]


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize(("lengths", "steps"), CASES)
def test_steps_equal_packed_attention(
    lengths: list[int], steps: list[list[tuple[int, int]]], block_size: int, layer: int
) -> None:
    got, want = run_in_steps(lengths, steps, block_size, layer)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-13)


@pytest.mark.parametrize(("lengths", "steps"), CASES)
def test_plain_form_equals_batched_form(lengths: list[int], steps: list[list[tuple[int, int]]]) -> None:
    plain, want = run_in_steps(lengths, steps, 4, 1, batched=False)
    batched, _ = run_in_steps(lengths, steps, 4, 1, batched=True)
    torch.testing.assert_close(plain, want, rtol=0, atol=1e-13)
    torch.testing.assert_close(batched, plain, rtol=0, atol=1e-13)


def test_bounds_split_the_work_but_not_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths, steps = CASES[4]
    monkeypatch.setattr(attention, "MAX_MASK", 64)
    got, want = run_in_steps(lengths, steps, 4, 0, max_gather_bytes=1)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-13)
    got, want = run_in_steps(*CASES[5], 4, 0)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-13)


def test_decode_groups_respect_the_bound_and_waste_little() -> None:
    layout = KvLayout(num_layers=1, block_size=4, num_kv_heads=1, head_dim=2, dtype=torch.float64)
    cache = KvCache.allocate(layout, 200)
    contexts = [1, 2, 3, 30, 31, 90, 100]
    table = np.arange(100, dtype=np.int64)
    spans = [SliceSpan(start=i, first=c - 1, count=1, blocks=table) for i, c in enumerate(contexts)]
    page_bytes = 4 * 2 * 8
    groups = PagedAttention(cache, spans, len(spans), max_gather_bytes=30 * page_bytes)._groups
    assert [(group.start, group.stop) for group in groups] == [(0, 3), (3, 5), (5, 6), (6, 7)]
    for group in groups[:2]:
        assert group.pages_nP.numel() <= 30
