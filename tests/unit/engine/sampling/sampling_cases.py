"""Sequences to sample, a constraint by rule, and what sampling must do to one row: plain numpy, one step at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from actors.engine.constraints.constraint import PackedMask
from actors.engine.plan import NewSequence
from actors.engine.sampling.sampler import Sampler, Samples
from actors.types import SamplingParams

V, LIMIT = 40, 32
EOS = (2, 7)

Row = NDArray[np.float64]


def params(**fields: Any) -> SamplingParams:
    return SamplingParams(**({"max_tokens": 99} | fields))


def new(
    id: int = 0,
    *,
    prompt: Sequence[int] = (1, 2, 3),
    outputs: Sequence[int] = (),
    seed: int = 1,
    choice: int = 0,
    **fields: Any,
) -> NewSequence:
    return NewSequence(
        id=id,
        token_ids=(*prompt, *outputs),
        prompt_length=len(prompt),
        spans=(),
        sampling=params(**fields),
        seed=seed,
        choice=choice,
    )


def sampler(*sequences: NewSequence) -> Sampler:
    made = Sampler(LIMIT, vocab_size=V, eos_token_ids=EOS)
    for one in sequences:
        made.admit(one)
    return made


def sample(logits: torch.Tensor, sequences: Sequence[NewSequence]) -> Samples:
    """One step of a new sampler; the logits stay as they are. Ids must differ."""
    return sampler(*sequences).sample(logits.clone(), [one.id for one in sequences])


def logits(rows: int = 1, seed: int = 0, dtype: torch.dtype = torch.float64, scale: float = 1.5) -> torch.Tensor:
    return (scale * torch.randn(rows, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)


class RuleConstraint:
    """Allows what ``rule(outputs)`` gives; None constrains nothing."""

    def __init__(self, rule: Callable[[list[int]], set[int] | None]) -> None:
        self.rule = rule
        self.outputs: list[int] = []

    def fill(self, mask_W: PackedMask) -> bool:
        allowed = self.rule(self.outputs)
        if allowed is None:
            return False
        mask_W[:] = 0
        bits = mask_W.view(np.uint32)
        for token in allowed:
            bits[token // 32] |= np.uint32(1 << token % 32)
        return True

    def accept(self, token: int) -> None:
        self.outputs.append(token)


def naive_logits(
    row: Row, wanted: SamplingParams, prompt: Sequence[int], outputs: Sequence[int], structure: set[int] | None = None
) -> Row:
    """Bias, penalties and masks, id by id."""
    x = [float(value) for value in row[:LIMIT]]
    banned = {word[0] for word in wanted.bad_words_ids if len(word) == 1}
    for token, bias in wanted.logit_bias:
        if bias == -math.inf:
            banned.add(token)
        else:
            x[token] += bias
    for token in range(LIMIT):
        if token in prompt or token in outputs:
            x[token] = x[token] / wanted.repetition_penalty if x[token] > 0 else x[token] * wanted.repetition_penalty
        x[token] -= wanted.frequency_penalty * list(outputs).count(token)
        if token in outputs:
            x[token] -= wanted.presence_penalty
    if len(outputs) < wanted.min_tokens:
        banned |= {*EOS, *wanted.stop_token_ids}
    for word in wanted.bad_words_ids:
        if len(word) > 1 and tuple(outputs[-(len(word) - 1) :]) == word[:-1]:
            banned.add(word[-1])
    everything = set(range(LIMIT))
    named = everything if wanted.allowed_token_ids is None else set(wanted.allowed_token_ids) & everything
    if structure is None:
        left = named - banned or named
    else:
        possible = structure & everything or set(EOS)
        left = possible & named - banned or possible
    return np.array([value if token in left else -math.inf for token, value in enumerate(x)])


def naive_distribution(x: Row, wanted: SamplingParams) -> list[float]:
    """Temperature; min-p; top-k; then the smallest prefix of sorted tokens whose mass reaches top-p."""
    order = sorted((token for token in range(LIMIT) if x[token] > -math.inf), key=lambda token: (-x[token], token))
    if wanted.temperature < 1e-5:
        return [float(token == order[0]) for token in range(LIMIT)]
    weights = {token: math.exp((x[token] - x[order[0]]) / wanted.temperature) for token in order}
    order = [token for token in order if weights[token] >= wanted.min_p][: wanted.top_k or LIMIT]
    total = math.fsum(weights[token] for token in order)
    kept, mass = [], 0.0
    for token in order:
        kept.append(token)
        mass += weights[token] / total
        if mass >= wanted.top_p:
            break
    total = math.fsum(weights[token] for token in kept)
    return [weights[token] / total if token in kept else 0.0 for token in range(LIMIT)]
