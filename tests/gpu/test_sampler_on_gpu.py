"""Sampling on a CUDA device equals sampling on the CPU, token for token, given the same float64 logits."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from actors.engine.sampling.sampler import Sampler
from tests.unit.engine.sampling.sampling_cases import EOS, RuleConstraint, new

VOCABULARY, LIMIT, STEPS = 5000, 4800, 40

WISHES: list[dict[str, Any]] = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.0, "repetition_penalty": 1.3, "logprobs": 5},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.8},
    {"top_p": 0.999, "logprobs": 20},
    {"top_p": 0.3, "min_p": 0.02, "frequency_penalty": 0.5, "presence_penalty": 0.3},
    {"min_p": 0.1, "logit_bias": ((5, 3.0), (9, -np.inf))},
    {"allowed_token_ids": tuple(range(0, LIMIT, 7)), "logprobs": 0},
    {"bad_words_ids": ((1,), (2, 3), (4, 5, 6)), "min_tokens": 30},
    {"top_k": 3000, "temperature": 2.0},
]


def rule(outputs: list[int]) -> set[int] | None:
    return None if len(outputs) % 2 else set(range(sum(outputs) % 10, LIMIT, 10))


def run(device: str) -> list[Any]:
    made = Sampler(LIMIT, vocab_size=VOCABULARY, eos_token_ids=EOS)
    for id, wishes in enumerate(WISHES):
        made.admit(new(id, seed=id, **wishes))
        if id % 3 == 0:
            made.constrain(id, RuleConstraint(rule))
    told: list[Any] = []
    for step in range(STEPS):
        ids = [id for id in range(len(WISHES)) if (id + step) % 4]
        generator = torch.Generator().manual_seed(step)
        rows = 2 * torch.randn(len(ids), VOCABULARY, dtype=torch.float64, generator=generator)
        samples = made.sample(rows.round(decimals=1).to(device), ids)
        told.append(
            (samples.tokens, [entry and (entry.rank, [id for id, _ in entry.top]) for entry in samples.logprobs])
        )
    return told


def test_tokens_ranks_and_most_likely_ids_equal_those_of_the_cpu() -> None:
    assert run("cuda") == run("cpu")
