from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from actors.engine import sampler as module
from actors.engine.sampler import Draw, Sampler, uniforms
from actors.types import SamplingParams

V, LIMIT = 40, 32


def draw(index: int = 0, *, seed: int = 1, choice: int = 0, **params: Any) -> Draw:
    return Draw(params=SamplingParams(max_tokens=9, **params), seed=seed, choice=choice, index=index)


def logits(rows: int = 1, seed: int = 0, dtype: torch.dtype = torch.float64, scale: float = 1.5) -> torch.Tensor:
    return (scale * torch.randn(rows, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)


def naive_distribution(row: torch.Tensor, params: SamplingParams) -> list[float]:
    """Plain Python: temperature, then top-k, then the smallest prefix of sorted tokens whose mass reaches top-p."""
    scaled = [float(x) / params.temperature for x in row[:LIMIT]]
    order = sorted(range(LIMIT), key=lambda token: (-scaled[token], token))[: params.top_k or LIMIT]
    weights = [math.exp(scaled[token] - scaled[order[0]]) for token in order]
    total = math.fsum(weights)
    kept, mass = [], 0.0
    for token, weight in zip(order, weights, strict=True):
        kept.append((token, weight))
        mass += weight / total
        if mass >= params.top_p:
            break
    total = math.fsum(weight for _, weight in kept)
    distribution = [0.0] * LIMIT
    for token, weight in kept:
        distribution[token] = weight / total
    return distribution


PARAMS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.5},
    {"temperature": 2.0, "top_k": 5},
    {"top_p": 0.7},
    {"top_p": 0.05},
    {"temperature": 0.8, "top_k": 12, "top_p": 0.9},
    {"top_k": 1},
    {"top_k": LIMIT, "top_p": 0.999},
    {"top_k": 1000},
]


@pytest.mark.parametrize("head", [1024, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("params", PARAMS)
def test_chi_square_against_naive_distribution(
    params: dict[str, Any], dtype: torch.dtype, head: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "HEAD", head)
    count = 4000
    row = logits(dtype=dtype)
    expected = naive_distribution(row[0], SamplingParams(max_tokens=1, **params))
    ids = Sampler(LIMIT).sample(row.expand(count, V), [draw(i, **params) for i in range(count)])
    seen = Counter(ids)
    assert set(seen) <= {token for token, p in enumerate(expected) if p > 0}
    # Tokens expected less than 5 times are counted together, as the test's approximation needs.
    rare = [token for token, p in enumerate(expected) if 0 < p * count < 5]
    cells = [(seen[token], p * count) for token, p in enumerate(expected) if p * count >= 5]
    if rare:
        cells.append((sum(seen[token] for token in rare), sum(expected[token] for token in rare) * count))
    statistic = sum((got - want) ** 2 / want for got, want in cells if want > 0)
    freedom = len(cells) - 1
    # Wilson-Hilferty: the 99.99 % point of chi-square.
    limit = freedom * (1 - 2 / (9 * freedom) + 3.72 * math.sqrt(2 / (9 * freedom))) ** 3 if freedom else 1e-9
    assert statistic <= limit


@pytest.mark.parametrize("head", [1024, 8, 3])
def test_inverse_of_the_cumulative_distribution_at_its_uniform(head: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut rows walk from the most likely token down, whole rows by id; compared exactly for many keys."""
    monkeypatch.setattr(module, "HEAD", head)
    for case, params in enumerate(PARAMS):
        rows = logits(200, seed=case)
        draws = [draw(i, seed=case, **params) for i in range(200)]
        got = Sampler(LIMIT).sample(rows, draws)
        u = uniforms([case] * 200, [0] * 200, range(200))
        for row, token, at in zip(rows, got, u, strict=True):
            distribution = naive_distribution(row, draws[0].params)
            cut = draws[0].params.top_p < 1 or 0 < draws[0].params.top_k < LIMIT
            order = sorted(range(LIMIT), key=lambda t: -distribution[t]) if cut else range(LIMIT)
            cumulative = np.cumsum([distribution[t] for t in order])
            assert token == list(order)[int(np.searchsorted(cumulative, at * cumulative[-1], side="right"))]


def test_head_and_full_sort_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = logits(60, seed=3)
    draws = [draw(i, **PARAMS[i % len(PARAMS)]) for i in range(60)]
    want = Sampler(LIMIT).sample(rows, draws)
    for head in (1, 2, 7, 31):
        monkeypatch.setattr(module, "HEAD", head)
        assert Sampler(LIMIT).sample(rows, draws) == want


def test_greedy_and_sampled_rows_mix() -> None:
    rows = logits(4)
    got = Sampler(LIMIT).sample(rows, [draw(temperature=0.0), draw(5), draw(temperature=0.0), draw(6, top_k=1)])
    best = rows[:, :LIMIT].argmax(dim=1).tolist()
    assert (got[0], got[2], got[3]) == (best[0], best[2], best[3])


def test_media_ids_are_never_drawn() -> None:
    rows = logits(8)
    rows[:, LIMIT:] = 1e6
    draws = [draw(i, temperature=t, top_p=p) for i in range(4) for t, p in ((0.0, 1.0), (5.0, 0.99))]
    assert max(Sampler(LIMIT).sample(rows, draws)) < LIMIT
    assert float(rows[0, LIMIT]) == 1e6


@pytest.mark.parametrize("params", PARAMS)
def test_a_row_depends_on_nothing_else_in_the_batch(params: dict[str, Any]) -> None:
    rows = logits(50, seed=9, dtype=torch.float32)
    mixed = [draw(i, seed=i * 77, **(params if i % 2 else PARAMS[i % len(PARAMS)])) for i in range(50)]
    together = Sampler(LIMIT).sample(rows, mixed)
    alone = [Sampler(LIMIT).sample(rows[i : i + 1], [mixed[i]])[0] for i in range(50)]
    backwards = Sampler(LIMIT).sample(rows.flip(0), mixed[::-1])[::-1]
    assert together == alone == backwards


def test_extreme_temperatures_neither_overflow_nor_fail() -> None:
    rows = logits(3, scale=30, dtype=torch.float32)
    got = Sampler(LIMIT).sample(rows, [draw(temperature=1e-30), draw(temperature=1e-30, top_p=0.5), draw()])
    assert got[:2] == rows[:2, :LIMIT].argmax(dim=1).tolist()
    assert 0 <= Sampler(LIMIT).sample(rows[:1], [draw(temperature=1e30)])[0] < LIMIT


def test_ties_go_to_the_lowest_id() -> None:
    rows = torch.zeros(1, V, dtype=torch.float32)
    for top_k in (1, 3):
        ids = {Sampler(LIMIT).sample(rows, [draw(i, top_k=top_k)])[0] for i in range(60)}
        assert ids == set(range(top_k))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_broken_logits_raise(bad: float) -> None:
    rows = logits(2)
    rows[1, 3] = bad
    with pytest.raises(FloatingPointError):
        Sampler(LIMIT).sample(rows, [draw(), draw()])


def test_uniforms_are_fixed_uniform_and_sensitive_to_every_part_of_the_key() -> None:
    # Fixed for ever: a resumed reply must draw the same numbers.
    assert uniforms([0, 1, 2**64 - 1], [0, 2, 0], [0, 3, 2**40]).tolist() == pytest.approx(REFERENCE, abs=0)
    u = uniforms(np.arange(20_000) % 20, np.arange(20_000) // 20 % 2, np.arange(20_000) // 40)
    assert len(set(u.tolist())) == 20_000
    assert 0 <= u.min() and u.max() < 1
    counts = np.histogram(u, bins=50, range=(0, 1))[0]
    assert float(((counts - 400) ** 2 / 400).sum()) < 100


def python_uniform(seed: int, choice: int, index: int) -> float:
    """The documented formula in plain integers."""
    mask, golden = 2**64 - 1, 0x9E3779B97F4A7C15

    def mix(x: int) -> int:
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & mask
        x = (x ^ x >> 27) * 0x94D049BB133111EB & mask
        return x ^ x >> 31

    return (mix((mix(mix(seed + golden & mask) ^ choice) + golden & mask) ^ index) >> 11) / 2**53


REFERENCE = [python_uniform(0, 0, 0), python_uniform(1, 2, 3), python_uniform(2**64 - 1, 0, 2**40)]


def test_reference_values_have_not_moved() -> None:
    assert REFERENCE == [0.33805245419550545, 0.14994242581329653, 0.15575636225257716]
