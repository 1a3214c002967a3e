"""What all ranks of an engine do in one step: plain values that could travel to another process.

The leader's scheduler makes a ``StepPlan``; every rank's runner executes its part and returns the tokens it sampled.
Sequences are named by the small number the scheduler gave them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from actors.types import Grid, SamplingParams, TokenLogprobs


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
class StepPlan:
    """One step. Ended sequences are forgotten before new ones are added; a plan may have no slices."""

    step: int
    ended: tuple[int, ...]
    new: tuple[NewSequence, ...]
    slices: tuple[Slice, ...]

    @property
    def token_count(self) -> int:
        return sum(part.count for part in self.slices)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """What a rank returns of a step, by sequence number."""

    tokens: Mapping[int, int]
    """The new token of each slice that samples."""
    logprobs: Mapping[int, TokenLogprobs] = field(default_factory=dict)
    """Of those tokens, where asked for."""
    prompt_logprobs: Mapping[int, tuple[TokenLogprobs | None, ...]] = field(default_factory=dict)
    """Where asked for: of the prompt tokens that follow each token of the slice; one that begins the prompt puts None
    for token 0 first.
    """
