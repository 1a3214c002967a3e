"""What an engine is told at start. Sizes that depend on memory are resolved elsewhere (``execution.memory``)."""

from __future__ import annotations

from dataclasses import dataclass

from actors.types import PRIORITY_STEP_S, EngineRole


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """Raises ValueError naming the field for values that cannot work."""

    role: EngineRole
    max_model_len: int
    """Longest prompt and reply together; the memory may bound it further (``Engine.max_model_len``)."""
    block_size: int = 16
    """Tokens per KV block."""
    max_num_seqs: int = 64
    """Sequences that may take part in steps at once."""
    max_batched_tokens: int = 2048
    """Tokens per step. At least ``max_num_seqs``, so that decoding never stops a prompt from advancing."""
    max_waiting: int = 1024
    """Attempts without blocks; one more is refused as Overloaded. Preempted ones wait beside them."""
    priority_step_s: float = PRIORITY_STEP_S
    """Each level of priority is worth so many seconds of waiting: urgent requests go first, but nobody starves."""
    prefix_caching: bool = True
    """Blocks are found again by what they hold."""
    reserve_margin_tokens: int = 64
    """Decode: room a reservation holds beyond the prompt."""
    reserve_wait_s: float = 30.0
    """Decode: how long a reservation may wait for blocks before it is refused with NO_BLOCKS."""
    submit_wait_s: float = 1.0
    """Decode: how long a reservation that overtook its Submit waits for it."""
    parted_tokens: int = 512
    """Prefill: chunks of so many tokens are handed over in parts of the layers while the rest is computed."""
    ended_memory_s: float = 30.0
    """How long keys of ended and cancelled attempts are remembered and refused."""
    retry_after_s: float = 1.0
    """Delay told to callers who found the engine full."""

    def __post_init__(self) -> None:
        for name in (
            "max_model_len",
            "block_size",
            "max_num_seqs",
            "max_batched_tokens",
            "max_waiting",
            "parted_tokens",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} must be at least 1")
        for name in (
            "priority_step_s",
            "reserve_margin_tokens",
            "reserve_wait_s",
            "submit_wait_s",
            "ended_memory_s",
            "retry_after_s",
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} = {getattr(self, name)} must not be negative")
        if self.max_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_batched_tokens = {self.max_batched_tokens} is less than max_num_seqs = {self.max_num_seqs}: "
                "prompts could wait for ever behind decoding"
            )
