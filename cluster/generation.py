"""What a facade asks of the router and what it gets back, whatever the transport."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

from actors.types import FinishReason, Message, ThinkingMode, Timings


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateCall:
    """One request. ``None`` takes the model's default. Facades check types and bounds, the router what needs state."""

    messages: tuple[Message, ...]
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
    thinking: ThinkingMode = ThinkingMode.AUTO
    timeout_s: float | None = None
    return_token_ids: bool = False
    return_timings: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """Token accounting of one request."""

    prompt_tokens: int
    media_tokens: int
    cached_tokens: int
    output_tokens: int
    reasoning_tokens: int
    time_to_first_token_s: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Started:
    """First event: the prompt is known and admitted."""

    request_id: str
    model: str
    prompt_tokens: int
    prompt_token_ids: tuple[int, ...] | None = None
    """Only when token ids were asked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Delta:
    """New text. ``token_ids`` are the tokens taken up since the last delta, only when asked for."""

    text: str = ""
    reasoning: str = ""
    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    """Last event."""

    reason: FinishReason
    usage: Usage
    stop_reason: str | int | None = None
    """The stop string or stop token id that ended the reply, as in vLLM."""
    timings: Timings | None = None


Event = Started | Delta | Finished


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelCard:
    """A served model."""

    name: str
    source: str
    max_model_len: int
    created: int


class GenerationService(Protocol):
    """The router as facades see it. Everything raises ``ServingError`` only."""

    def generate(self, call: GenerateCall) -> AsyncIterator[Event]:
        """Yields Started, Deltas and Finished; closing the iterator cancels the request everywhere."""

    async def cancel(self, request_id: str) -> None:
        """Ends a request by assigned id or alias; no effect when already over; NotFound when never seen."""

    async def count_tokens(
        self, model: str | None, messages: tuple[Message, ...], thinking: ThinkingMode
    ) -> tuple[int, int]:
        """Returns (all tokens, media tokens)."""

    def models(self) -> tuple[ModelCard, ...]: ...

    async def not_ready(self) -> str | None:
        """None when a warmed-up prefill and decode path exists, else what is missing."""
