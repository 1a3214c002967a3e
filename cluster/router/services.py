"""What all requests of a router share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from actors.types import PreprocessReply, SamplingParams, TokenLogprobs
from cluster.generation import GenerateCall, PositionScores, Vocabulary
from cluster.router.encoders import EncoderBook
from cluster.router.fleet import Fleet
from cluster.router.leases import LeaseKeeper
from cluster.router.output import OutputAssembler
from cluster.router.records import Recorder
from cluster.router.retry_budget import RetryBudget
from cluster.router.stages import EncodeStage, PreprocessStage
from cluster.router.suspects import Suspects


@dataclass(frozen=True, kw_only=True, slots=True)
class Services:
    """Parts and pure functions; one per router."""

    fleet: Fleet
    leases: LeaseKeeper
    preprocess: PreprocessStage
    encode: EncodeStage
    encoders: EncoderBook
    budget: RetryBudget
    suspects: Suspects
    recorder: Recorder
    model_name: str
    context_limit: Callable[[], int]
    """Longest prompt and reply together the engines at hand can hold."""
    vocab_size: int
    im_patch_id: int
    """Ids from here up may need the vision experts."""
    alone_tokens: int
    """The most that an engine which only decodes computes of a prompt."""
    vocabulary: Vocabulary
    resolve_sampling: Callable[[GenerateCall, PreprocessReply], SamplingParams]
    """What a call leaves open, for the prompt it gave."""
    make_output: Callable[[GenerateCall, bool], OutputAssembler]
    """From the call and whether the prompt ends inside a think block; one per choice."""
    score: Callable[[TokenLogprobs], PositionScores]
    """As clients see log-probabilities: with what each token adds to the text."""
    clock: Callable[[], float]
    wall_clock: Callable[[], float]
