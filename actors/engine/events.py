"""What an engine tells its surroundings. The scheduler lists events; the engine calls its ``EngineSink`` for each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from actors.engine.plan import ALL_LAYERS, LayerPart
from actors.errors import ServingError
from actors.types import MilestoneKind, PromptLogprobs, SequenceKey, TokenEvent


@dataclass(frozen=True, slots=True)
class Admitted:
    """A sequence with media holds its blocks: embeddings may be pulled now, but of units that end by ``cached_tokens``,
    whose KV was found in the prefix cache. Told again after ``Preempted``.
    """

    key: SequenceKey
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class MediaConsumed:
    """All tokens of a unit are computed and its embedding is dropped."""

    key: SequenceKey
    media_index: int
    unit_index: int


@dataclass(frozen=True, slots=True)
class Preempted:
    """A sequence lost its blocks to another and waits again; the embeddings it was given are dropped."""

    key: SequenceKey


@dataclass(frozen=True, slots=True)
class ConstraintNeeded:
    """After ``Preempted``: the runner forgot the constraint. A new one must be made and ``constraint_ready`` told."""

    key: SequenceKey


@dataclass(frozen=True, slots=True)
class ReserveNeeded:
    """Prefill: blocks are held here; the decode engine must reserve as many tokens before any compute."""

    key: SequenceKey
    token_count: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ComputedChunk:
    """Prefill: KV of tokens first_token .. first_token + token_count, in a part of the layers, is in the blocks and
    ready to be sent.
    """

    key: SequenceKey
    rank: int
    """Whose blocks they are."""
    index: int
    """Counts from 0."""
    first_token: int
    token_count: int
    part: LayerPart = ALL_LAYERS
    block_table: tuple[int, ...]
    """Of the whole prompt, for ``KvCache.read_tokens``."""
    last: bool
    """It may have no tokens then: they were handed over before the step that computed them ended."""
    first_output_id: int | None = None
    """With the last chunk: the token sampled here."""
    finished: bool = False
    """With the last chunk: that token ended the reply; there is nothing to decode."""


@dataclass(frozen=True, slots=True)
class TransferCancelled:
    """Prefill: an attempt ended after its reservation was asked for.

    If chunks were handed out, their blocks stay as they are until ``Engine.transferred``.
    """

    key: SequenceKey


@dataclass(frozen=True, slots=True)
class ReservationGranted:
    """Decode: blocks are held for a transfer; the first ``held_tokens`` are in them already and must not be written."""

    key: SequenceKey
    rank: int
    block_table: tuple[int, ...]
    held_tokens: int


@dataclass(frozen=True, slots=True)
class ReservationFailed:
    """Decode: no blocks for a transfer: NO_BLOCKS, ENDED, UNKNOWN, DUPLICATE, MISMATCH."""

    key: SequenceKey
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class ReservationDropped:
    """Decode: a granted reservation ended before its KV was complete."""

    key: SequenceKey


@dataclass(frozen=True, slots=True)
class Ended:
    """An attempt ended without a last token."""

    key: SequenceKey
    error: ServingError


@dataclass(frozen=True, slots=True)
class Milestone:
    """An attempt passed a point; ``busy_s`` is its share of step time since the last one."""

    key: SequenceKey
    kind: MilestoneKind
    busy_s: float
    token_count: int = 0
    """With PREFILL_STARTED: leading prompt tokens found in the prefix cache. With MEDIA_AWAITED: those computed."""


Event = (
    Admitted
    | MediaConsumed
    | Preempted
    | ConstraintNeeded
    | ReserveNeeded
    | ComputedChunk
    | TransferCancelled
    | ReservationGranted
    | ReservationFailed
    | ReservationDropped
    | Ended
    | Milestone
)


class EngineSink(Protocol):
    """Called on the step thread, in the order things happened. Must not block; may call any method of the engine."""

    def on_tokens(self, tokens: list[TokenEvent]) -> None:
        """New tokens of one step, at most one per sequence. A ``finish`` ends the attempt."""

    def on_ended(self, key: SequenceKey, error: ServingError) -> None:
        """The attempt ended without a last token; also for ``cancel`` (RequestCancelled)."""

    def on_prompt_logprobs(self, piece: PromptLogprobs) -> None:
        """Of prompt tokens computed in one step. Pieces come in order and before token 0."""

    def on_milestone(self, key: SequenceKey, kind: MilestoneKind, busy_s: float, token_count: int) -> None:
        """See ``Milestone``. RELEASED comes last for every submitted key, once: nothing of it is held any more."""

    def on_admitted(self, key: SequenceKey, cached_tokens: int) -> None:
        """See ``Admitted``."""

    def on_media_consumed(self, key: SequenceKey, media_index: int, unit_index: int) -> None:
        """See ``MediaConsumed``."""

    def on_preempted(self, key: SequenceKey) -> None:
        """See ``Preempted``."""

    def on_reserve_needed(self, key: SequenceKey, token_count: int) -> None:
        """See ``ReserveNeeded``; answer with ``Engine.reserved`` or ``Engine.refused``."""

    def on_chunk(self, chunk: ComputedChunk) -> None:
        """See ``ComputedChunk``; after the last one is verified over there, call ``Engine.transferred``."""

    def on_transfer_cancelled(self, key: SequenceKey) -> None:
        """See ``TransferCancelled``."""

    def on_reservation_dropped(self, key: SequenceKey) -> None:
        """See ``ReservationDropped``. Once this returns, nothing may write to the reservation's blocks any more, or, on
        another rank, no later than that rank begins its next part of a step.
        """

    def on_blocks_changed(self, stored: tuple[bytes, ...], removed: tuple[bytes, ...]) -> None:
        """Hashes of blocks that the prefix cache can find from now on, and of those that it cannot any more."""

    def on_fatal(self, error: BaseException) -> None:
        """A step failed or a rank is lost: ours, not a request's. The engine has stopped for good; the process must
        end. Told once, on any thread.
        """
