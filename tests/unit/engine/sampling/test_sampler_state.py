"""Penalties, masks and log-probabilities against the plain form, and what is kept of a sequence."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from actors.engine.plan import NewSequence
from actors.engine.sampling.sampler import Sampler
from actors.engine.sampling.state import packed
from tests.unit.engine.sampling.sampling_cases import (
    EOS,
    LIMIT,
    RuleConstraint,
    V,
    logits,
    naive_logits,
    new,
    sample,
    sampler,
)

PROMPT = (1, 2, 3, 3, 35, 20)


def processed(row: torch.Tensor, one: NewSequence, rule: set[int] | None = None) -> np.ndarray[Any, Any]:
    """The logits as sampling leaves them, with another row of no such wishes beside."""
    made = sampler(new(50), one)
    if rule is not None:
        made.constrain(one.id, RuleConstraint(lambda _: rule))
    rows = torch.stack((row, row))
    made.sample(rows, [50, one.id])
    assert torch.equal(rows[0], row)
    assert torch.equal(rows[1, LIMIT:], row[LIMIT:])
    left: np.ndarray[Any, Any] = rows[1, :LIMIT].numpy()
    return left


WISHES: list[dict[str, Any]] = [
    {"repetition_penalty": 1.7},
    {"repetition_penalty": 0.3},
    {"presence_penalty": 2.0},
    {"frequency_penalty": -2.0},
    {"repetition_penalty": 1.2, "presence_penalty": -0.4, "frequency_penalty": 0.3},
    {"logit_bias": ((3, 2.5), (31, -100.0), (0, 100.0), (3, 1.0))},
    {"logit_bias": ((3, -math.inf), (4, 1.0))},
    {"allowed_token_ids": (3, 4, 31)},
    {"bad_words_ids": ((8,), (9, 10), (8, 9, 11), (7, 9, 12), (20, 8, 9, 13))},
    {"min_tokens": 3, "stop_token_ids": (30, 33)},
    {"min_tokens": 2, "stop_token_ids": (30,)},
    {
        "repetition_penalty": 1.5,
        "frequency_penalty": 0.5,
        "logit_bias": ((9, 3.0), (5, -math.inf)),
        "allowed_token_ids": tuple(range(25)),
        "bad_words_ids": ((9, 1), (6,)),
        "min_tokens": 99,
    },
]


@pytest.mark.parametrize("rule", [None, {0, 3, 9, 10, 24, 31, 39}])
@pytest.mark.parametrize("fields", WISHES)
def test_logits_equal_the_plain_form(fields: dict[str, Any], rule: set[int] | None) -> None:
    for case, outputs in enumerate([(), (8,), (8, 9), (8, 8, 8, 9, 30, 8, 9)]):
        row = logits(seed=case)[0]
        one = new(prompt=PROMPT, outputs=outputs, **fields)
        want = naive_logits(row.numpy(), one.sampling, PROMPT, outputs, rule)
        np.testing.assert_array_equal(processed(row, one, rule), want)


def test_state_follows_the_drawn_tokens() -> None:
    """Many steps with one sampler, whose penalties grow past what they were laid out for."""
    fields: dict[str, Any] = {"repetition_penalty": 1.1, "frequency_penalty": 0.05, "presence_penalty": 0.1}
    made = Sampler(300, vocab_size=310, eos_token_ids=EOS)
    starts = {
        0: new(0, prompt=(), **fields),
        1: new(1),
        2: new(2, outputs=(5, 5), bad_words_ids=((5, 5, 6),), **fields),
    }
    for one in starts.values():
        made.admit(one)
    outputs: dict[int, list[int]] = {id: list(one.token_ids[one.prompt_length :]) for id, one in starts.items()}
    generator = torch.Generator().manual_seed(5)
    for _ in range(140):
        rows = torch.randn(3, 310, dtype=torch.float64, generator=generator)
        before = rows.clone()
        for id, token in enumerate(made.sample(rows, [0, 1, 2]).tokens):
            one = starts[id]
            prompt = one.token_ids[: one.prompt_length]
            fresh = Sampler(300, vocab_size=310, eos_token_ids=EOS)
            fresh.admit(new(id, prompt=prompt, outputs=outputs[id], **({} if id == 1 else fields)))
            alone = before[id : id + 1].clone()
            if id == 2 and outputs[2][-2:] == [5, 5]:
                alone[0, 6] = -math.inf
            assert fresh.sample(alone, [id]).tokens == [token]
            torch.testing.assert_close(rows[id], alone[0], rtol=0, atol=0)
            outputs[id].append(token)
    assert len(set(outputs[0])) > 64


@pytest.mark.parametrize(
    ("fields", "rule", "left"),
    [
        # A constraint and the request's own masks with nothing in common: structure wins.
        ({"allowed_token_ids": (5, 6)}, {8, 9}, {8, 9}),
        ({"min_tokens": 5}, {*EOS}, {*EOS}),
        ({"bad_words_ids": ((8,), (9,))}, {8, 9}, {8, 9}),
        ({"logit_bias": ((8, -math.inf),)}, {8}, {8}),
        ({"allowed_token_ids": (5, 6), "bad_words_ids": ((5,),)}, {5, 9}, {5, 9}),
        # Something in common: both hold.
        ({"allowed_token_ids": (5, 6), "bad_words_ids": ((5,),)}, {5, 6, 9}, {6}),
        # A constraint that allows nothing that can be generated ends the sequence.
        ({}, set(), {*EOS}),
        ({"min_tokens": 5, "allowed_token_ids": (4,)}, {35}, {*EOS}),
        # No constraint: allowed ids stay.
        ({"allowed_token_ids": (5, 6), "bad_words_ids": ((5,), (6,))}, None, {5, 6}),
        ({"allowed_token_ids": (2,), "min_tokens": 5}, None, {2}),
        ({"allowed_token_ids": (5,), "logit_bias": ((5, -math.inf),)}, None, {5}),
        ({"bad_words_ids": tuple((token,) for token in range(LIMIT))}, None, {*range(LIMIT)}),
        ({"bad_words_ids": tuple((token,) for token in range(1, LIMIT)), "min_tokens": 5}, None, {0}),
    ],
)
def test_masks_never_leave_a_row_without_a_token(fields: dict[str, Any], rule: set[int] | None, left: set[int]) -> None:
    row = processed(logits()[0], new(**fields), rule)
    assert set(np.flatnonzero(row > -math.inf).tolist()) == left


def test_allowed_ids_follow_bans_that_come_and_go() -> None:
    fields: dict[str, Any] = {"allowed_token_ids": (2, 3, 8, 9), "bad_words_ids": ((8, 8), (9, 8)), "temperature": 0.0}
    starts = [new(0), new(1, min_tokens=6, **fields), new(2, min_tokens=3, **fields)]
    made = sampler(*starts)
    outputs: list[list[int]] = [[], [], []]
    for step in range(9):
        rows = logits(3, seed=step)
        rows[1:, 8] += 3.0
        before = rows.clone().numpy()
        drawn = made.sample(rows, [0, 1, 2]).tokens
        for one, row, left, so_far, token in zip(starts, before, rows.numpy(), outputs, drawn, strict=True):
            np.testing.assert_array_equal(left[:LIMIT], naive_logits(row, one.sampling, (1, 2, 3), so_far))
            so_far.append(token)
    assert 8 in outputs[1] and 2 in outputs[2]


def test_infinite_penalties_change_the_order_but_break_nothing() -> None:
    row = logits(dtype=torch.float32)[0]
    for penalty in (1e-38, 1e38, 1e-300, 1e300):
        one = new(prompt=tuple(range(LIMIT)), repetition_penalty=penalty, temperature=0.7)
        assert np.isfinite(processed(row, one)).all()


def test_a_plain_row_is_untouched_and_its_logits_too() -> None:
    rows = logits(3)
    before = rows.clone()
    sampler(new(0, top_p=0.5), new(1), new(2, temperature=0.0, logprobs=3)).sample(rows, [0, 1, 2])
    assert torch.equal(rows, before)


# Log-probabilities


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logprobs_are_raw_ranked_and_sorted_with_ties_by_id(dtype: torch.dtype) -> None:
    rows = logits(24, seed=4, dtype=dtype).round(decimals=1)  # many equal logits
    rows[5] = 0.0
    rows[:, LIMIT:] = 50.0
    sequences = [
        new(
            i,
            seed=i,
            temperature=(0.0, 1.3)[i % 2],
            logprobs=(None, 0, 1, 5, 20)[i % 5],
            logit_bias=((3, 4.0),) if i % 3 == 0 else (),
            repetition_penalty=1.5 if i % 4 == 0 else 1.0,
        )
        for i in range(24)
    ]
    found = sample(rows, sequences)
    for row, one, token, entry in zip(rows.numpy(), sequences, found.tokens, found.logprobs, strict=True):
        if one.sampling.logprobs is None:
            assert entry is None
            continue
        assert entry is not None
        assert entry.token_id == token
        values = [float(value) for value in row[:LIMIT]]
        norm = math.log(math.fsum(math.exp(value) for value in values))
        order = sorted(range(LIMIT), key=lambda id: (-values[id], id))
        close = {"rel": 0, "abs": 1e-12 if dtype is torch.float64 else 1e-5}
        assert entry.logprob == pytest.approx(values[token] - norm, **close)
        assert entry.rank == order.index(token) + 1
        assert [id for id, _ in entry.top] == order[: one.sampling.logprobs]
        assert [value for _, value in entry.top] == pytest.approx(
            [values[id] - norm for id in order[: len(entry.top)]], **close
        )


def test_all_rows_processed_and_with_logprobs_still_tell_raw_ones() -> None:
    rows = logits(2)
    fields: dict[str, Any] = {"logprobs": 1, "logit_bias": ((9, 50.0),), "temperature": 0.0}
    entries = sample(rows, [new(0, **fields), new(1, **fields)]).logprobs
    want = rows[:, :LIMIT].log_softmax(dim=1)
    assert [entry and (entry.token_id, entry.top[0][0]) for entry in entries] == [
        (9, int(best)) for best in want.argmax(dim=1)
    ]
    assert [entry and entry.logprob for entry in entries] == pytest.approx(want[:, 9].tolist(), abs=1e-12)


def test_logprobs_of_rows_the_head_could_not_settle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.engine.sampling.batch.HEAD", 2)
    rows = logits(40)
    found = sample(rows, [new(i, seed=i, top_p=0.99, logprobs=1) for i in range(40)])
    want = rows[:, :LIMIT].log_softmax(dim=1)
    for row, token, entry in zip(want, found.tokens, found.logprobs, strict=True):
        assert entry is not None
        assert (entry.token_id, entry.logprob) == (token, pytest.approx(float(row[token])))


def test_prompt_logprobs() -> None:
    rows, tokens = logits(4), [0, 31, 5, 5]
    found = sampler().prompt_logprobs(rows, tokens, 2)
    want = rows[:, :LIMIT].log_softmax(dim=1)
    assert [entry.token_id for entry in found] == tokens
    assert [entry.logprob for entry in found] == pytest.approx([float(want[i, t]) for i, t in enumerate(tokens)])
    assert [entry.top[0][0] for entry in found] == want.argmax(dim=1).tolist()
    assert {len(entry.top) for entry in found} == {2}
    assert sampler().prompt_logprobs(rows[:0], [], 2) == []
    assert sampler().prompt_logprobs(rows[:1], [3], 0)[0].top == ()
    with pytest.raises(ValueError, match="can be generated"):
        sampler().prompt_logprobs(rows[:1], [LIMIT], 1)


# What is kept


def test_forget_frees_everything() -> None:
    made = sampler(new(1, repetition_penalty=2.0), new(2))
    made.constrain(2, RuleConstraint(lambda _: {5}))
    made.constrain(3, RuleConstraint(lambda _: {6}))
    assert made.sequence_ids == {1, 2, 3}
    made.sample(logits(2), [1, 2])
    for id in (1, 2, 3, 99):
        made.forget(id)
    assert made.sequence_ids == frozenset()
    assert made._batch is None
    with pytest.raises(KeyError):
        made.sample(logits(1), [1])


def test_a_sequence_that_returns_under_its_number_starts_from_its_tokens() -> None:
    made = sampler(new(1, bad_words_ids=((5, 6),), logit_bias=((6, 90.0),)))
    assert made.sample(logits(), [1]).tokens == [6]
    made.forget(1)
    made.admit(new(1, outputs=(6, 5), bad_words_ids=((5, 6),), logit_bias=((6, 90.0),)))
    assert made.sample(logits(), [1]).tokens != [6]
    with pytest.raises(ValueError, match="before"):
        made.admit(new(1))


@pytest.mark.parametrize("early", [True, False])
def test_a_constraint_is_told_earlier_outputs_and_every_drawn_token(early: bool) -> None:
    made, constraint = sampler(), RuleConstraint(lambda outputs: {len(outputs)})
    if early:
        made.constrain(4, constraint)
    made.admit(new(4, outputs=(9, 8)))
    if not early:
        made.sample(logits(), [4])
        made.forget(4)
        made.admit(new(4, outputs=(9, 8)))
        made.constrain(4, constraint)
    assert [made.sample(logits(seed=i), [4]).tokens for i in range(3)] == [[2], [3], [4]]
    assert constraint.outputs == [9, 8, 2, 3, 4]


def test_rows_must_match_sequences() -> None:
    with pytest.raises(ValueError, match="2 rows of logits for 1"):
        sampler(new(0)).sample(logits(2), [0])


def test_packed_masks() -> None:
    words = packed({0, 31, 33, 39}, 39, 2).view(np.uint32)
    assert words.tolist() == [1 | 1 << 31, 1 << 1]
    assert packed(range(V), LIMIT, 2).view(np.uint32).tolist() == [2**32 - 1, 0]
