"""What sampling does to logits, against the processors of transformers that do the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from actors.engine.sampling import batch as sampling_batch
from tests.unit.engine.sampling.sampling_cases import EOS, LIMIT, RuleConstraint, V, logits, new, sampler

PROMPT = (1, 2, 3, 3, 20)
OUTPUTS: list[tuple[int, ...]] = [(), (8,), (8, 9), (5, 8, 9), (8, 8, 9, 30, 8, 9)]


def min_new_tokens(count: int, eos: Sequence[int] = EOS) -> MinNewTokensLengthLogitsProcessor:
    return MinNewTokensLengthLogitsProcessor(len(PROMPT), count, list(eos), device="cpu")


def bad_words(*words: list[int]) -> NoBadWordsLogitsProcessor:
    return NoBadWordsLogitsProcessor(list(words), eos_token_id=None)


def bias(values: dict[int, float]) -> SequenceBiasLogitsProcessor:
    return SequenceBiasLogitsProcessor({(token,): value for token, value in values.items()})


ALLOWED = [3, 8, 9, 10, 31]
BAD_WORDS = [[4], [8, 9], [8, 9, 10], [30, 8, 9, 12]]

PROCESSORS: list[tuple[dict[str, Any], list[Any]]] = [
    ({"repetition_penalty": 1.8}, [RepetitionPenaltyLogitsProcessor(1.8)]),
    ({"repetition_penalty": 0.4}, [RepetitionPenaltyLogitsProcessor(0.4)]),
    ({"min_tokens": 3}, [min_new_tokens(3)]),
    ({"min_tokens": 2, "stop_token_ids": (11,)}, [min_new_tokens(2, (*EOS, 11))]),
    (
        {"bad_words_ids": ((4,), (8, 9), (8, 9, 10), (30, 8, 9, 12))},
        [bad_words([4], [8, 9], [8, 9, 10], [30, 8, 9, 12])],
    ),
    ({"logit_bias": ((3, 1.5), (8, -2.0))}, [bias({3: 1.5, 8: -2.0})]),
    ({"logit_bias": ((3, -np.inf), (6, -np.inf))}, [SuppressTokensLogitsProcessor([3, 6], device="cpu")]),
    ({"allowed_token_ids": tuple(ALLOWED)}, [PrefixConstrainedLogitsProcessor(lambda *_: ALLOWED, 1)]),
    (
        {"min_tokens": 5, "logit_bias": ((3, 1.5), (20, -0.5)), "repetition_penalty": 1.3, "bad_words_ids": ((9, 3),)},
        [bad_words([9, 3]), min_new_tokens(5), bias({3: 1.5, 20: -0.5}), RepetitionPenaltyLogitsProcessor(1.3)],
    ),
]


@pytest.mark.parametrize(("fields", "processors"), PROCESSORS)
def test_processed_logits_are_equal(fields: dict[str, Any], processors: list[Any]) -> None:
    sequences = [new(i, prompt=PROMPT, outputs=outputs, **fields) for i, outputs in enumerate(OUTPUTS)]
    ours = logits(len(OUTPUTS))
    theirs = ours[:, :LIMIT].clone()
    sampler(*sequences).sample(ours, range(len(OUTPUTS)))
    for row, outputs in enumerate(OUTPUTS):
        ids = torch.tensor([[*PROMPT, *outputs]])
        want = LogitsProcessorList(processors)(ids, theirs[row : row + 1].clone())
        torch.testing.assert_close(ours[row, :LIMIT], want[0], rtol=0, atol=0)


def test_a_constraint_masks_as_a_prefix_function_does() -> None:
    def allowed(tokens: Sequence[int]) -> list[int]:
        return [token for token in range(LIMIT) if (token + sum(tokens)) % 3 == 0]

    theirs = PrefixConstrainedLogitsProcessor(lambda _, ids: allowed(ids.tolist()[len(PROMPT) :]), 1)
    made = sampler(new(prompt=PROMPT))
    made.constrain(0, RuleConstraint(lambda outputs: set(allowed(outputs))))
    outputs: list[int] = []
    for step in range(6):
        ours = logits(seed=step)
        ids = torch.tensor([[*PROMPT, *outputs]])
        want = theirs(ids, ours[:, :LIMIT].clone())
        outputs += made.sample(ours, [0]).tokens
        torch.testing.assert_close(ours[:, :LIMIT], want, rtol=0, atol=0)


WARPERS: list[dict[str, Any]] = [
    {"temperature": 0.4},
    {"temperature": 3.0},
    {"top_k": 6},
    {"top_k": 1},
    {"top_p": 0.85},
    {"top_p": 0.02},
    {"min_p": 0.08},
    {"min_p": 1.0},
    {"temperature": 1.6, "min_p": 0.05, "top_k": 12, "top_p": 0.8},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.95},
    {"temperature": 1.2, "min_p": 0.1, "top_p": 0.6},
]


@pytest.mark.parametrize("head", [1024, 5])
@pytest.mark.parametrize("fields", WARPERS)
def test_distributions_are_equal(fields: dict[str, Any], head: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At 2000 evenly spaced uniform numbers each token comes as often as its probability says, within one."""
    count = 2000
    monkeypatch.setattr(sampling_batch, "HEAD", head)
    monkeypatch.setattr(sampling_batch, "uniforms", lambda keys, indices: (np.arange(count) + 0.5) / count)
    warpers: list[Any] = [
        TemperatureLogitsWarper(fields.get("temperature", 1.0)),
        MinPLogitsWarper(fields.get("min_p", 0.0)),
        TopKLogitsWarper(fields.get("top_k", LIMIT)),
        TopPLogitsWarper(fields.get("top_p", 1.0)),
    ]
    row = logits(seed=8)
    want = LogitsProcessorList(warpers)(torch.tensor([PROMPT]), row[:, :LIMIT].clone()).softmax(dim=1)[0]
    drawn = sampler(*(new(i, **fields) for i in range(count))).sample(row.expand(count, V), range(count)).tokens
    found = np.bincount(drawn, minlength=LIMIT)
    assert set(np.flatnonzero(found)) <= set(np.flatnonzero(want.numpy()))
    assert float(np.abs(found - count * want.numpy()).max()) < 1
