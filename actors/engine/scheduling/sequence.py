"""The scheduler's view of one attempt.

    COLOCATED  WAITING ------------------------------> RUNNING -> ENDED
    PREFILL    WAITING -> RESERVING -----------------> RUNNING -> HANDED_OVER -> ENDED
                                                          |           |
                                                          +-> PINNED <+   ended, but a transfer may still read: -> ENDED
    DECODE     EXPECTED -> WAITING -> RECEIVING -----> RUNNING -> ENDED

From every state an attempt may end at once (cancel, deadline, failure). WAITING and EXPECTED hold no blocks, all others
but ENDED do. RESERVING waits for the decode engine's answer, HANDED_OVER for its transfer's end.

Preemption leads from RUNNING and RESERVING back to WAITING: the blocks are gone, everything known is computed anew. A
DECODE attempt that comes this way goes on as a COLOCATED one, for nothing is received again.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from actors.engine.plan import NewSequence
from actors.engine.scheduling.block_hash import BlockHasher
from actors.types import AttemptMode, EngineRequest, FinishReason, SequenceKey


class SequenceState(enum.Enum):
    """See the module's drawing."""

    WAITING = "waiting"
    EXPECTED = "expected"
    RESERVING = "reserving"
    RECEIVING = "receiving"
    RUNNING = "running"
    HANDED_OVER = "handed_over"
    PINNED = "pinned"
    ENDED = "ended"

    @property
    def holds_blocks(self) -> bool:
        return self not in (SequenceState.WAITING, SequenceState.EXPECTED, SequenceState.ENDED)

    @property
    def takes_part(self) -> bool:
        """Has tokens to compute now or later."""
        return self in (SequenceState.RESERVING, SequenceState.RECEIVING, SequenceState.RUNNING)


class Unit(NamedTuple):
    """Placeholder tokens start .. end of one image or frame pair."""

    start: int
    end: int
    media_index: int
    unit_index: int


@dataclass(kw_only=True, slots=True, eq=False)
class Sequence:
    """One attempt. Only the scheduler and the roster change it."""

    key: SequenceKey
    request: EngineRequest
    mode: AttemptMode
    deadline: float
    """On the engine's monotonic clock."""
    hasher: BlockHasher | None = None
    """Names its blocks; reads ``tokens`` as far as needed. None: nothing of it is shared or found."""
    needs_constraint: bool = False
    """Its tokens are bound by a constraint, which the runner must have before the first draw."""
    least_cached: int = 0
    """Leading tokens that cannot be computed here: they must be in the cache when it is admitted."""
    id: int = -1
    """Its number for the runner, given by the roster: a new one after each preemption."""
    order: tuple[float, int] = (0.0, 0)
    """Sorts by who goes first, and is the last to be preempted. Set by the roster, for good."""
    rank: int | None = None
    """Where its blocks are, while it holds any."""
    state: SequenceState = SequenceState.WAITING
    tokens: list[int] = field(init=False)
    """Prompt, earlier outputs, and what was generated here."""
    initial_count: int = field(init=False)
    """Tokens known at the start: prompt and earlier outputs."""
    prefill_count: int = field(init=False)
    """Tokens to be computed before it decodes: all that were known when it last began to wait."""
    computed: int = 0
    """Leading tokens whose keys and values are in the blocks."""
    blocks: list[int] = field(default_factory=list)
    published: int = 0
    """Leading blocks whose content was found under its name or given one."""
    cached_tokens: int = 0
    """Of the computed tokens, those found in the prefix cache at admission."""
    units: tuple[Unit, ...] = field(init=False)
    _unit_numbers: dict[tuple[int, int], int] = field(init=False)
    _present: set[int] = field(default_factory=set)
    _first_missing: int = 0
    _first_unconsumed: int = 0
    _last_awaited: int = -1
    introduced: bool = False
    """A plan has told the runner of it."""
    told_blocks: int = 0
    """Leading blocks the runner knows."""
    constraint_pending: bool = field(init=False)
    """The runner does not have the constraint yet: nothing is drawn."""
    prompt_logprobs_told: int = field(init=False)
    """Leading prompt tokens whose log-probabilities went out or are not wanted."""
    reservation_asked: bool = False
    """PREFILL: the decode engine was asked for blocks."""
    reservation_granted: bool = False
    """PREFILL: and has them."""
    sent_tokens: int = 0
    """PREFILL: leading tokens that the decode engine held, or that were handed to the transfer."""
    sent_parts: int = 0
    """PREFILL: parts of the layers of the tokens behind those that were handed over likewise."""
    chunk_count: int = 0
    """PREFILL: chunks handed to the transfer."""
    reserve_expiry: float | None = None
    """DECODE in the queue: when its reservation gives up."""
    preemptions: int = 0
    started: bool = field(init=False)
    """PREFILL_STARTED was told, or never will be."""
    finished: bool = False
    """Its last token went out."""
    busy_s: float = 0.0
    """Share of step time since the last milestone."""

    def __post_init__(self) -> None:
        self.tokens = [*self.request.prompt_ids, *self.request.output_ids]
        self.initial_count = self.prefill_count = len(self.tokens)
        self.constraint_pending = self.needs_constraint
        self.started = self.mode is AttemptMode.DECODE
        # They leave before the first output, by the engine that computes it.
        wanted = self.request.sampling.prompt_logprobs is not None
        told = self.mode is AttemptMode.DECODE or bool(self.request.output_ids) or not wanted
        self.prompt_logprobs_told = len(self.request.prompt_ids) if told else 0
        media = self.request.media if self.mode is not AttemptMode.DECODE else ()
        self.units = tuple(
            Unit(start, start + span.grid.tokens_per_unit, media_index, unit_index)
            for media_index, span in enumerate(media)
            for unit_index in range(span.grid.units)
            for start in (span.offset + unit_index * span.grid.tokens_per_unit,)
        )
        self._unit_numbers = {unit[2:]: number for number, unit in enumerate(self.units)}

    @property
    def decodes(self) -> bool:
        """Every known token but the last is computed: it needs one token a step."""
        return self.computed >= self.prefill_count

    @property
    def ready_tokens(self) -> int:
        """Leading tokens whose embeddings are on hand or not needed."""
        if self._first_missing < len(self.units):
            return self.units[self._first_missing].start
        return len(self.tokens)

    @property
    def plannable_tokens(self) -> int:
        """Leading tokens that may be computed now: the last one draws, which waits for a constraint."""
        return min(self.ready_tokens, len(self.tokens) - self.constraint_pending)

    @property
    def prompt_logprobs_due(self) -> bool:
        """Every token of the prompt has to be computed, whatever is cached."""
        return self.prompt_logprobs_told < len(self.request.prompt_ids)

    @property
    def known_to_runner(self) -> bool:
        """The runner may hold something of it."""
        constrained = self.needs_constraint and not self.constraint_pending
        return self.introduced or constrained or bool(self._present)

    @property
    def needs_embeddings(self) -> bool:
        """Some unit is not computed yet."""
        return self._first_unconsumed < len(self.units)

    def begin(self, rank: int, blocks: list[int], cached_tokens: int) -> None:
        """It was given blocks on a rank, the first of which hold the KV of ``cached_tokens`` (whole blocks)."""
        self.rank = rank
        self.blocks = blocks
        self.computed = self.cached_tokens = cached_tokens
        while self._first_unconsumed < len(self.units) and self.units[self._first_unconsumed].end <= cached_tokens:
            self._first_unconsumed += 1
        self._first_missing = self._first_unconsumed

    def restart(self) -> None:
        """It lost its blocks and waits to be computed anew, under a new number."""
        self.preemptions += 1
        if self.mode is AttemptMode.DECODE:
            self.mode = AttemptMode.COLOCATED
        self.prefill_count = len(self.tokens)
        self.rank = None
        self.blocks = []
        self.computed = self.cached_tokens = self.published = self.told_blocks = 0
        self._present.clear()
        self._first_missing = self._first_unconsumed = 0
        self._last_awaited = -1
        self.introduced = False
        self.constraint_pending = self.needs_constraint
        self.reserve_expiry = None

    def unit(self, media_index: int, unit_index: int) -> Unit | None:
        """The unit of that name, if the prompt has it."""
        number = self._unit_numbers.get((media_index, unit_index))
        return None if number is None else self.units[number]

    def add_embedding(self, media_index: int, unit_index: int) -> bool:
        """A unit's embedding is on hand. False if it already was, or is not needed."""
        number = self._unit_numbers.get((media_index, unit_index))
        if number is None or number in self._present or number < self._first_unconsumed:
            return False
        self._present.add(number)
        while self._first_missing < len(self.units) and self._first_missing in self._present:
            self._first_missing += 1
        return True

    def begins_to_await_media(self) -> bool:
        """Everything is computed up to a unit whose embedding is not on hand. True once for each such unit."""
        missing = self._first_missing
        if missing in (len(self.units), self._last_awaited) or self.computed < self.units[missing].start:
            return False
        self._last_awaited = missing
        return True

    def consume_units(self) -> Iterator[Unit]:
        """Units that became wholly computed since the last call."""
        while self._first_unconsumed < len(self.units) and self.units[self._first_unconsumed].end <= self.computed:
            yield self.units[self._first_unconsumed]
            self._first_unconsumed += 1

    def finish_reason(self, token: int, eos_ids: frozenset[int], max_model_len: int) -> FinishReason | None:
        """Why generation ends with ``token``, which is not yet in ``tokens``; None when it goes on."""
        sampling = self.request.sampling
        if token in sampling.stop_token_ids or (token in eos_ids and not sampling.ignore_eos):
            return FinishReason.STOP
        output_count = len(self.tokens) - len(self.request.prompt_ids) + 1
        if output_count >= sampling.max_tokens or len(self.tokens) + 1 >= max_model_len:
            return FinishReason.LENGTH
        return None

    def introduction(self) -> NewSequence:
        """What a runner must know before the first slice."""
        self.introduced = True
        sampling = self.request.sampling
        if sampling.prompt_logprobs is not None and not self.prompt_logprobs_due:
            sampling = replace(sampling, prompt_logprobs=None)
        return NewSequence(
            id=self.id,
            token_ids=tuple(self.tokens),
            prompt_length=len(self.request.prompt_ids),
            spans=tuple((span.offset, span.grid) for span in self.request.media),
            sampling=sampling,
            seed=self.request.seed,
            choice=self.key.choice,
        )

    def take_busy(self) -> float:
        """Busy time since the last call."""
        busy, self.busy_s = self.busy_s, 0.0
        return busy
