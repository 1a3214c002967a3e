"""In float64 a seed gives the same tokens whatever else is in the batch and wherever sampling was taken up again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.engine.sampling.sampler import Sampler
from tests.unit.engine.sampling.sampling_cases import LIMIT, RuleConstraint, V, new, sampler

STEPS = 12

WISHES = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0.0, 0.3, 1.0, 2.5]),
        "top_k": st.sampled_from([1, 3, 10, LIMIT, 500]),
        "top_p": st.sampled_from([0.1, 0.6, 0.95]),
        "min_p": st.sampled_from([0.01, 0.2]),
        "repetition_penalty": st.sampled_from([0.5, 1.3]),
        "presence_penalty": st.sampled_from([-1.0, 0.7]),
        "frequency_penalty": st.sampled_from([-0.5, 0.9]),
        "logit_bias": st.sampled_from([((3, 2.0), (4, -3.0)), ((5, -np.inf),)]),
        "allowed_token_ids": st.sampled_from([(1, 2, 3, 4, 5, 6, 7, 8), tuple(range(0, LIMIT, 3))]),
        "bad_words_ids": st.sampled_from([((3,), (4, 5)), ((6, 6), (1, 2, 3), (9, 9, 9))]),
        "min_tokens": st.sampled_from([2, 7, 50]),
        "logprobs": st.sampled_from([0, 3]),
    },
)
SEQUENCES = st.fixed_dictionaries(
    {
        "wishes": WISHES,
        "seed": st.integers(0, 2**64 - 1),
        "choice": st.integers(0, 3),
        "prompt": st.lists(st.integers(0, V - 1), min_size=1, max_size=6),
        "constrained": st.booleans(),
    }
)


def rule(outputs: list[int]) -> set[int] | None:
    """Free at times, narrow at times; depends on all outputs."""
    return None if len(outputs) % 3 == 1 else {t for t in range(LIMIT) if (t * 7 + sum(outputs)) % 4 == 0}


def row(tokens: Sequence[int]) -> torch.Tensor:
    """What a model would say after these tokens."""
    generator = torch.Generator().manual_seed(hash(tuple(tokens)) % 2**31)
    return 2 * torch.randn(V, dtype=torch.float64, generator=generator)


class Live:
    """A sequence, the sampler it is in, and its tokens so far."""

    def __init__(self, id: int, fields: dict[str, Any]) -> None:
        self.id = id
        self.fields = fields
        self.outputs: list[int] = []
        self.told: list[Any] = []

    @property
    def tokens(self) -> list[int]:
        return [*self.fields["prompt"], *self.outputs]

    def enter(self, made: Sampler) -> None:
        fields = self.fields
        if fields["constrained"]:
            made.constrain(self.id, RuleConstraint(rule))
        made.admit(
            new(
                self.id,
                prompt=fields["prompt"],
                outputs=self.outputs,
                seed=fields["seed"],
                choice=fields["choice"],
                **fields["wishes"],
            )
        )

    def alone(self) -> Live:
        twin, made = Live(0, self.fields), sampler()
        twin.enter(made)
        while len(twin.outputs) < STEPS:
            step(made, [twin])
        return twin


def step(made: Sampler, live: Sequence[Live]) -> None:
    samples = made.sample(torch.stack([row(one.tokens) for one in live]), [one.id for one in live])
    for one, token, entry in zip(live, samples.tokens, samples.logprobs, strict=True):
        one.outputs.append(token)
        one.told.append(entry)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), wanted=st.lists(SEQUENCES, min_size=1, max_size=6))
def test_batch_composition_and_restarts_change_nothing(data: st.DataObject, wanted: list[dict[str, Any]]) -> None:
    live = [Live(i, fields) for i, fields in enumerate(wanted)]
    made = sampler()
    for one in live:
        one.enter(made)
    while unfinished := [one for one in live if len(one.outputs) < STEPS]:
        chosen = data.draw(st.lists(st.sampled_from(unfinished), min_size=1, unique_by=id))
        for one in data.draw(st.lists(st.sampled_from(unfinished), max_size=2, unique_by=id)):
            made.forget(one.id)
            one.enter(made)
        for _ in range(data.draw(st.integers(1, 4))):
            ready = [one for one in chosen if len(one.outputs) < STEPS]
            if ready:
                step(made, ready)
    for one in live:
        twin = one.alone()
        assert one.outputs == twin.outputs
        assert one.told == twin.told
        made.forget(one.id)
    assert not made.sequence_ids
