from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from actors.engine.sampling import batch as sampling_batch
from actors.engine.sampling.drawing import (
    BLOCK,
    UNSETTLED,
    Cuts,
    draw_cut,
    draw_sorted,
    draw_whole,
    stream_keys,
    uniforms,
)
from tests.unit.engine.sampling.sampling_cases import (
    LIMIT,
    RuleConstraint,
    V,
    logits,
    naive_distribution,
    naive_logits,
    new,
    sample,
    sampler,
)

CUTS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.5},
    {"temperature": 2.0, "top_k": 5},
    {"top_p": 0.7},
    {"top_p": 0.05},
    {"temperature": 0.8, "top_k": 12, "top_p": 0.9},
    {"top_k": 1},
    {"top_k": LIMIT, "top_p": 0.999},
    {"top_k": 1000},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"min_p": 0.02, "temperature": 1.7},
    {"min_p": 0.2, "top_k": 10},
    {"min_p": 0.05, "top_p": 0.8},
    {"min_p": 1.0, "top_p": 0.9},
    {"min_p": 0.03, "top_p": 0.9, "top_k": 7, "temperature": 1.3},
]
OTHERS: list[dict[str, Any]] = [
    {"repetition_penalty": 1.4},
    {"repetition_penalty": 0.6, "temperature": 0.7},
    {"presence_penalty": 1.1},
    {"frequency_penalty": 0.7},
    {"frequency_penalty": -1.5, "presence_penalty": -0.5},
    {"repetition_penalty": 1.2, "presence_penalty": 0.4, "frequency_penalty": 0.3, "min_p": 0.05},
    {"logit_bias": ((3, 2.0), (9, -1.5), (4, -math.inf))},
    {"allowed_token_ids": (3, 5, 8, 30, 31)},
    {"allowed_token_ids": tuple(range(0, LIMIT, 2)), "top_k": 6, "repetition_penalty": 1.3},
    {"bad_words_ids": ((4,), (5, 6), (9, 5, 8), (1, 5, 9), (5,))},
    {"min_tokens": 4, "stop_token_ids": (11,)},
    {
        "min_tokens": 9,
        "bad_words_ids": ((9, 5, 12),),
        "logit_bias": ((12, 4.0), (13, 1.0)),
        "frequency_penalty": 0.5,
        "temperature": 0.9,
        "top_p": 0.95,
    },
]
PROMPT, OUTPUTS = (1, 2, 3, 3, 35), (5, 9, 5)
STRUCTURE = {1, 4, 5, 9, 12, 30, 38}


def assert_chi_square(ids: list[int], expected: list[float]) -> None:
    count, seen = len(ids), Counter(ids)
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


@pytest.mark.parametrize(("head", "dtype"), [(1024, torch.float32), (4, torch.float64)])
@pytest.mark.parametrize("fields", CUTS)
def test_chi_square_of_cuts(
    fields: dict[str, Any], dtype: torch.dtype, head: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling_batch, "HEAD", head)
    row = logits(dtype=dtype)
    draws = [new(i, seed=i, **fields) for i in range(2500)]
    expected = naive_distribution(row[0, :LIMIT].double().numpy(), draws[0].sampling)
    assert_chi_square(sample(row.expand(2500, V), draws).tokens, expected)


@pytest.mark.parametrize("constrained", [False, True])
@pytest.mark.parametrize("fields", OTHERS)
def test_chi_square_of_penalties_and_masks(fields: dict[str, Any], constrained: bool) -> None:
    row = logits()
    draws = [new(i, seed=i, prompt=PROMPT, outputs=OUTPUTS, **fields) for i in range(2000)]
    made = sampler(*draws)
    if constrained:
        for one in draws:
            made.constrain(one.id, RuleConstraint(lambda outputs: STRUCTURE if outputs == list(OUTPUTS) else None))
    allowed = STRUCTURE if constrained else None
    x = naive_logits(row[0].numpy(), draws[0].sampling, PROMPT, OUTPUTS, allowed)
    ids = made.sample(row.repeat(2000, 1), range(2000)).tokens
    assert_chi_square(ids, naive_distribution(x, draws[0].sampling))


@pytest.mark.parametrize("head", [1024, 8, 3])
def test_inverse_of_the_cumulative_distribution_at_its_uniform(head: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut rows walk from the most likely token down, others by id; compared exactly for many keys."""
    monkeypatch.setattr(sampling_batch, "HEAD", head)
    for case, fields in enumerate(CUTS):
        rows = logits(200, seed=case)
        draws = [new(i, seed=case, choice=i, **fields) for i in range(200)]
        got = sample(rows, draws).tokens
        u = uniforms(stream_keys([case] * 200, range(200)), [0] * 200)
        wanted = draws[0].sampling
        for row, token, at in zip(rows, got, u, strict=True):
            distribution = naive_distribution(row[:LIMIT].numpy(), wanted)
            cut = wanted.top_p < 1 or 0 < wanted.top_k < LIMIT
            order = sorted(range(LIMIT), key=lambda t: -row[t]) if cut else range(LIMIT)
            cumulative = np.cumsum([distribution[t] for t in order])
            assert token == list(order)[int(np.searchsorted(cumulative, at * cumulative[-1], side="right"))]


def test_head_and_full_sort_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    for scale in (1.5, 0.0):
        rows = logits(90, seed=3, scale=scale).round(decimals=1)  # many equal logits
        draws = [new(i, seed=i, **CUTS[i % len(CUTS)]) for i in range(90)]
        want = sample(rows, draws).tokens
        for head in (1, 2, 7, 31):
            monkeypatch.setattr(sampling_batch, "HEAD", head)
            assert sample(rows, draws).tokens == want
        monkeypatch.undo()


def test_equal_logits_at_the_end_of_the_head_are_left_to_the_full_sort() -> None:
    rows = torch.zeros(2, 50, dtype=torch.float64)
    rows[0, 40] = 1.0
    rows[1, [30, 41]] = 1.0
    cuts = Cuts(
        temperature_S=torch.ones(2, dtype=torch.float64),
        min_p_S=torch.zeros(2, dtype=torch.float64),
        top_k_S=torch.tensor([2, 2]),
        top_p_S=torch.ones(2, dtype=torch.float64),
        head=4,
        needs_total=False,
    )
    best, u = torch.ones(2, dtype=torch.float64), torch.full((2,), 0.99, dtype=torch.float64)
    assert draw_cut(rows, best, cuts, u).tolist() == [UNSETTLED, 41]
    assert draw_sorted(rows, best, cuts, u).tolist() == [0, 41]


@pytest.mark.parametrize("vocabulary", [BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK + 17])
def test_whole_rows_are_inverted_across_blocks(vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    rows = torch.randn(300, vocabulary, dtype=torch.float64, generator=generator)
    rows[::3, : vocabulary // 2] = -math.inf
    u = torch.rand(300, dtype=torch.float64, generator=generator)
    u[:6] = torch.tensor([0.0, 0.0, 1 - 2**-53, 1 - 2**-53, 0.5, 0.5])
    temperature = torch.full((300,), 0.8, dtype=torch.float64)
    got = draw_whole(rows, rows.amax(dim=1), temperature, None, u)
    cumulative = (rows / 0.8).softmax(dim=1).cumsum(dim=1)
    want = torch.searchsorted(cumulative, torch.minimum(u, cumulative[:, -1] - 1e-16)[:, None], right=True).squeeze(1)
    # Sums in another order differ by rounding: where they disagree, u lies on a border.
    border = (cumulative.gather(1, torch.minimum(got, want)[:, None]).squeeze(1) - u).abs() < 1e-12
    assert bool(((got == want) | border).all())
    assert int((got != want).sum()) <= 4
    assert bool(torch.isfinite(rows.gather(1, got[:, None])).all())


def test_greedy_and_sampled_rows_mix() -> None:
    rows = logits(5)
    made = [new(0, temperature=0.0), new(1), new(2, temperature=9e-6), new(3, top_k=1), new(4, top_p=0.5, min_p=0.9)]
    got = sample(rows, made).tokens
    best = rows[:, :LIMIT].argmax(dim=1).tolist()
    assert (got[0], got[2], got[3]) == (best[0], best[2], best[3])


def test_media_ids_are_never_drawn() -> None:
    rows = logits(8)
    rows[:, LIMIT:] = 1e6
    draws = [
        new(8 * i + j, seed=i, temperature=t, top_p=p, logprobs=20)
        for i in range(4)
        for j, (t, p) in enumerate(((0.0, 1.0), (5.0, 0.99)))
    ]
    found = sample(rows, draws)
    assert max(found.tokens) < LIMIT
    assert all(entry is not None and max(id for id, _ in entry.top) < LIMIT for entry in found.logprobs)


def test_extreme_temperatures_neither_overflow_nor_fail() -> None:
    rows = logits(3, scale=30, dtype=torch.float32)
    got = sample(rows, [new(0, temperature=1e-4), new(1, temperature=1e-30), new(2)]).tokens
    assert got[:2] == rows[:2, :LIMIT].argmax(dim=1).tolist()
    for temperature in (1e30, 1e300):
        assert 0 <= sample(rows[:1], [new(temperature=temperature)]).tokens[0] < LIMIT


def test_ties_go_to_the_lowest_id() -> None:
    rows = torch.zeros(60, V, dtype=torch.float32)
    for top_k in (1, 3):
        assert set(sample(rows, [new(i, seed=i, top_k=top_k) for i in range(60)]).tokens) == set(range(top_k))
    assert sample(rows[:1], [new(temperature=0.0)]).tokens == [0]


@pytest.mark.parametrize("fields", [{}, {"temperature": 0.0}, {"min_tokens": 5}, {"top_p": 0.5, "logprobs": 2}])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_broken_logits_raise(bad: float, fields: dict[str, Any]) -> None:
    rows = logits(2)
    rows[1, 3] = bad
    with pytest.raises(FloatingPointError):
        sample(rows, [new(0, **fields), new(1, **fields)])


def test_a_token_that_alone_is_left_must_have_a_finite_logit() -> None:
    rows = logits(1)
    rows[0, 3] = -math.inf
    for temperature in (0.0, 1.0):
        with pytest.raises(FloatingPointError):
            sample(rows, [new(0, allowed_token_ids=(3,), temperature=temperature)])


def test_uniforms_are_fixed_uniform_and_sensitive_to_every_part_of_the_key() -> None:
    # Fixed for ever: a resumed reply must draw the same numbers.
    drawn = uniforms(stream_keys([0, 1, 2**64 - 1], [0, 2, 0]), [0, 3, 2**40])
    assert drawn.tolist() == pytest.approx(REFERENCE, abs=0)
    keys = stream_keys(np.arange(20_000) % 20, np.arange(20_000) // 20 % 2)
    u = uniforms(keys, np.arange(20_000) // 40)
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
