"""The scheduler's view of one attempt.

    COLOCATED  WAITING ------------------------------> RUNNING -> ENDED
    PREFILL    WAITING -> RESERVING -----------------> RUNNING -> HANDED_OVER -> ENDED
                                                          |           |
                                                          +-> PINNED <+   ended, but a transfer may still read: -> ENDED
    DECODE     EXPECTED -> WAITING -> RECEIVING -----> RUNNING -> ENDED

From every state an attempt may end at once (cancel, deadline, failure, preemption). WAITING and EXPECTED hold no
blocks, all others but ENDED do. RESERVING waits for the decode engine's answer, HANDED_OVER for its transfer's end.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from actors.engine.plan import NewSequence
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
    """One attempt. Only the scheduler changes it."""

    id: int
    """Grows with every submit."""
    key: SequenceKey
    request: EngineRequest
    mode: AttemptMode
    deadline: float
    """On the engine's monotonic clock."""
    state: SequenceState = SequenceState.WAITING
    tokens: list[int] = field(init=False)
    """Prompt, earlier outputs, and what was generated here."""
    initial_count: int = field(init=False)
    """Tokens known at the start: prompt and earlier outputs."""
    computed: int = 0
    """Tokens whose keys and values are in the blocks."""
    blocks: list[int] = field(default_factory=list)
    units: tuple[Unit, ...] = field(init=False)
    _present: set[tuple[int, int]] = field(default_factory=set)
    _first_missing: int = 0
    _first_unconsumed: int = 0
    introduced: bool = False
    """A plan has told the runner of it."""
    told_blocks: int = 0
    """Leading blocks the runner knows."""
    chunk_count: int = 0
    """Chunks handed to a transfer."""
    held_tokens: int = 0
    """Leading tokens the decode engine already has; they are not sent."""
    finished: bool = False
    """Its last token went out."""
    reserve_expiry: float | None = None
    """DECODE in the queue: when its reservation gives up."""
    busy_s: float = 0.0
    """Share of step time since the last milestone."""

    def __post_init__(self) -> None:
        self.tokens = [*self.request.prompt_ids, *self.request.output_ids]
        self.initial_count = len(self.tokens)
        media = self.request.media if self.mode is not AttemptMode.DECODE else ()
        self.units = tuple(
            Unit(start, start + span.grid.tokens_per_unit, media_index, unit_index)
            for media_index, span in enumerate(media)
            for unit_index in range(span.grid.units)
            for start in (span.offset + unit_index * span.grid.tokens_per_unit,)
        )

    @property
    def rank(self) -> tuple[int, float, int]:
        """Sorts by who goes first: priority, then arrival, then order of submission."""
        return (-self.request.priority, self.request.arrival_s, self.id)

    @property
    def ready_tokens(self) -> int:
        """Leading tokens whose embeddings are on hand."""
        if self._first_missing < len(self.units):
            return self.units[self._first_missing].start
        return len(self.tokens)

    @property
    def media_on_hand(self) -> bool:
        """The runner may hold embeddings of it."""
        return bool(self._present)

    def unit(self, media_index: int, unit_index: int) -> Unit | None:
        """The unit of that name, if the prompt has it."""
        for unit in self.units:
            if (unit.media_index, unit.unit_index) == (media_index, unit_index):
                return unit
        return None

    def add_embedding(self, media_index: int, unit_index: int) -> bool:
        """A unit's embedding is on hand. False if it already was."""
        name = (media_index, unit_index)
        if name in self._present:
            return False
        self._present.add(name)
        while self._first_missing < len(self.units) and self.units[self._first_missing][2:] in self._present:
            self._first_missing += 1
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
        return NewSequence(
            id=self.id,
            token_ids=tuple(self.tokens),
            prompt_length=len(self.request.prompt_ids),
            spans=tuple((span.offset, span.grid) for span in self.request.media),
            sampling=self.request.sampling,
            seed=self.request.seed,
            choice=self.key.choice,
        )

    def take_busy(self) -> float:
        """Busy time since the last call."""
        busy, self.busy_s = self.busy_s, 0.0
        return busy
