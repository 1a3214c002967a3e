"""What a facade asks of the router and what it gets back, whatever the transport."""

from __future__ import annotations

import enum
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from actors.errors import ServingError
from actors.types import FinishReason, MediaOptions, Message, Structure, ThinkingMode, Timings, ToolCallDelta


@dataclass(frozen=True, kw_only=True, slots=True)
class Tool:
    """A function the model may call. ``parameters`` is the JSON schema of its arguments; None: it takes none."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None


class ToolMode(enum.StrEnum):
    """Whether the model calls tools."""

    AUTO = "auto"
    """As it sees fit."""
    NONE = "none"
    """Never: it does not see them, and what looks like a call is text."""
    REQUIRED = "required"
    """In every reply."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolChoice:
    """``function`` goes with REQUIRED: the reply is one call of that function."""

    mode: ToolMode = ToolMode.AUTO
    function: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateCall:
    """One request. ``None`` takes the model's default. Facades check types and bounds, the router what needs state."""

    messages: tuple[Message, ...] = ()
    prompt: str | tuple[int, ...] | None = None
    """In place of messages: a prompt as it stands, text or token ids. The reply is then text as the model writes it,
    thinking and calls not told apart."""
    add_special_tokens: bool = True
    """Adds what the tokenizer puts around a ``prompt`` that is text; nothing with ERNIE's."""
    model: str | None = None
    request_id: str | None = None
    """The caller's alias, unique while active."""
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    n: int = 1
    """Independent choices, each with the whole of ``max_tokens``."""
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, added to its logit)."""
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[str, ...] = ()
    min_tokens: int = 0
    logprobs: int | None = None
    """Report the drawn tokens' log-probabilities and those of so many most likely tokens; None reports nothing."""
    prompt_logprobs: int | None = None
    """The same for the prompt, in one ``PromptScored``."""
    structure: Structure | None = None
    tools: tuple[Tool, ...] = ()
    tool_choice: ToolChoice = ToolChoice()
    parallel_tool_calls: bool = True
    """A reply may make several calls; otherwise it ends behind the first."""
    reasoning_max_tokens: int | None = None
    """Thinking is closed after so many tokens."""
    priority: int = 0
    """Lower is served first, as in vLLM; ``EngineRequest.priority`` counts the other way."""
    cache_salt: str | None = None
    """Prefixes are shared only among requests of the same salt."""
    thinking: ThinkingMode = ThinkingMode.AUTO
    media_options: MediaOptions = field(default_factory=MediaOptions)
    """Of pictures and videos whose parts do not say."""
    timeout_s: float | None = None
    return_token_ids: bool = False
    return_timings: bool = False

    @property
    def offered_tools(self) -> tuple[Tool, ...]:
        """Those the model sees."""
        return () if self.tool_choice.mode is ToolMode.NONE else self.tools

    @property
    def salt(self) -> bytes:
        """What separates its prefixes from those of other salts."""
        return b"" if self.cache_salt is None else self.cache_salt.encode()

    @property
    def forces_call(self) -> bool:
        return self.tool_choice.mode is ToolMode.REQUIRED


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """Token accounting of one request."""

    prompt_tokens: int
    media_tokens: int
    cached_tokens: int
    output_tokens: int
    reasoning_tokens: int
    time_to_first_token_s: float | None
    video_tokens: int = 0
    """Of the media tokens; the others are of pictures."""

    @property
    def image_tokens(self) -> int:
        return self.media_tokens - self.video_tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class Started:
    """First event: the prompt is known and admitted."""

    request_id: str
    model: str
    prompt_tokens: int
    prompt_token_ids: tuple[int, ...] | None = None
    """Only when token ids were asked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenScore:
    """One token and its log-probability, as ``actors.types.TokenLogprobs`` defines it."""

    token_id: int
    token: bytes
    """What the token adds to the text, which may be part of a character; a special token's own spelling."""
    logprob: float
    rank: int
    """1 for the most likely token."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PositionScores:
    """Scores at one position: the token that stands there, and the most likely ones, descending."""

    chosen: TokenScore
    top: tuple[TokenScore, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptScored:
    """Scores of the whole prompt, once, after Started and before the first Delta; only when asked for.

    One entry per prompt token, None where it cannot be generated (media placeholders) or has no predecessor (token 0).
    """

    entries: tuple[PositionScores | None, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Delta:
    """New text of one choice, and more of its tool calls, one entry per call. ``token_ids`` are the tokens taken up
    since its last delta, only when asked for, and ``logprobs`` their scores, one per token, only when asked for."""

    choice: int = 0
    text: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[PositionScores, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class ChoiceFinished:
    """Last event of one choice."""

    choice: int = 0
    reason: FinishReason
    stop_reason: str | int | None = None
    """The stop string or stop token id that ended the choice, as in vLLM."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    """Last event, after every choice's ChoiceFinished. ``usage`` sums over choices."""

    usage: Usage
    timings: Timings | None = None


Event = Started | PromptScored | Delta | ChoiceFinished | Finished


def is_last(event: Event) -> bool:
    """Whether the request is over with it."""
    return isinstance(event, Finished)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelCard:
    """A served model."""

    name: str
    source: str
    max_model_len: int
    created: int


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptTokens:
    """A prompt as engines take it: placeholders of media repeated once per token of theirs."""

    ids: tuple[int, ...]
    media_tokens: int


class Vocabulary(Protocol):
    """Token ids to text. Safe for use from many threads."""

    def spell(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens spelled out."""

    def token_text(self, token_id: int) -> str | None:
        """A token as the vocabulary writes it; None for an id that is not used."""

    def token_bytes(self, token_id: int) -> bytes:
        """What a token adds to a text, which may be part of a character; a special token's own spelling."""

    def is_hidden(self, token_id: int) -> bool:
        """Whether a reply's text leaves the token out."""


class GenerationService(Protocol):
    """The router as facades see it. Everything raises ``ServingError`` only."""

    def generate(self, call: GenerateCall) -> AsyncIterator[Event]:
        """Yields Started, PromptScored if asked for, per choice Deltas and ChoiceFinished, and Finished. Closing the
        iterator cancels the request everywhere.
        """

    def note_refused(self, error: ServingError) -> None:
        """A request that its facade refuses: it counts like one that ``generate`` refuses."""

    async def cancel(self, request_id: str) -> None:
        """Ends a request by assigned id or alias; no effect when already over; NotFound when never seen."""

    async def tokenize(self, call: GenerateCall) -> PromptTokens:
        """The prompt a request would have; nothing is generated or kept."""

    @property
    def vocabulary(self) -> Vocabulary: ...

    def models(self) -> tuple[ModelCard, ...]: ...

    async def not_ready(self) -> str | None:
        """None when a warmed-up prefill and decode path exists, else what is missing."""
