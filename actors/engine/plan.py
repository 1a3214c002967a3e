"""What all ranks of an engine do in one step: plain values that travel to other processes.

The leader's scheduler makes a ``StepPlan`` with one part per rank; every rank's runner executes its part and returns
the tokens it sampled. Sequences are named by the small number the scheduler gave them, unique over all ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain

from actors.types import Grid, SamplingParams, TokenLogprobs


@dataclass(frozen=True, slots=True)
class LayerPart:
    """One of ``count`` runs of a model's layers, as equal as can be. Part 0 is computed first."""

    index: int
    count: int

    @property
    def is_last(self) -> bool:
        return self.index == self.count - 1

    def layers(self, total: int) -> range:
        """Its layers, of a model of ``total``: at least one where there are as many as parts."""
        return range(self.index * total // self.count, (self.index + 1) * total // self.count)


ALL_LAYERS = LayerPart(0, 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class NewSequence:
    """Everything a runner needs of a sequence, told once, before its first slice."""

    id: int
    token_ids: tuple[int, ...]
    """Prompt, then what is known of the output."""
    prompt_length: int
    spans: tuple[tuple[int, Grid], ...]
    """(index of the first placeholder token, grid) of each media item: the source of positions and embeddings."""
    sampling: SamplingParams
    seed: int
    choice: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Slice:
    """Tokens first .. first + count of a sequence are computed in this step."""

    id: int
    first: int
    count: int
    new_blocks: tuple[int, ...]
    """Appended to the sequence's block table before the step."""
    sample: bool
    """The slice ends with the last known token: draw the next one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepShape:
    """What all ranks must agree on before they meet in a collective."""

    step: int
    max_tokens: int
    """The most tokens that any rank computes. 0: the step only tells news, and no model runs anywhere."""
    decodes: bool
    """Every slice of every rank is the last token of a reply that goes on."""
    vision: bool
    """Some token of some rank may go to the vision experts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RankPlan:
    """One rank's part of a step. Ended sequences are forgotten before new ones are added.

    A part without slices still takes part in the step, with no tokens, when another rank has some.
    """

    shape: StepShape
    ended: tuple[int, ...]
    new: tuple[NewSequence, ...]
    slices: tuple[Slice, ...]

    @property
    def token_count(self) -> int:
        return sum(part.count for part in self.slices)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepPlan:
    """One step of all ranks."""

    shape: StepShape
    parts: tuple[RankPlan, ...]
    """By rank."""

    @property
    def slices(self) -> tuple[Slice, ...]:
        """Of all ranks, in their order."""
        return tuple(chain.from_iterable(part.slices for part in self.parts))

    @property
    def token_count(self) -> int:
        """Of all ranks."""
        return sum(part.token_count for part in self.parts)

    @property
    def prompt_share(self) -> float:
        """Share of its tokens that are not the next one of a reply."""
        return sum(part.count for part in self.slices if part.count > 1) / max(1, self.token_count)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """What one rank, or all of them, return of a step, by sequence number."""

    tokens: Mapping[int, int]
    """The new token of each slice that samples."""
    logprobs: Mapping[int, TokenLogprobs] = field(default_factory=dict)
    """Of those tokens, where asked for."""
    prompt_logprobs: Mapping[int, tuple[TokenLogprobs | None, ...]] = field(default_factory=dict)
    """Where asked for: of the prompt tokens that follow each token of the slice; one that begins the prompt puts None
    for token 0 first.
    """

    @classmethod
    def gathered(cls, results: Iterable[StepResult]) -> StepResult:
        """Of all ranks together. Raises ValueError if two ranks sampled for one sequence."""
        tokens: dict[int, int] = {}
        logprobs: dict[int, TokenLogprobs] = {}
        prompt_logprobs: dict[int, tuple[TokenLogprobs | None, ...]] = {}
        for result in results:
            if not tokens.keys().isdisjoint(result.tokens):
                raise ValueError(f"two ranks sampled for {sorted(tokens.keys() & result.tokens.keys())}")
            tokens |= result.tokens
            logprobs |= result.logprobs
            prompt_logprobs |= result.prompt_logprobs
        return cls(tokens=tokens, logprobs=logprobs, prompt_logprobs=prompt_logprobs)
