"""The sequences a rank knows, one slot each: what a decode step needs lies in arrays indexed by slot.

S slots, P pages (blocks) of the longest block table so far. Both grow by doubling; freed slots are used again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from actors.engine.plan import NewSequence, Slice
from actors.ernie.config import ErnieConfig, Rules
from actors.ernie.positions import prompt_positions

FIRST_SLOTS = 16
FIRST_PAGES = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Known:
    """Of the tokens a sequence arrived with: prompt and earlier outputs."""

    new: NewSequence
    tokens: npt.NDArray[np.int64]
    positions_3n: npt.NDArray[np.int32]
    vision: npt.NDArray[np.bool_] | None
    """Which go to the vision experts; None when none does."""


class Residents:
    """Owns the slots. Arrays are public: read them, and never keep them across ``add`` and ``append_blocks``."""

    def __init__(self, config: ErnieConfig, rules: Rules) -> None:
        self._config = config
        self._rules = rules
        self._slots: dict[int, int] = {}
        self._free = list(range(FIRST_SLOTS - 1, -1, -1))
        self.known: list[Known | None] = [None] * FIRST_SLOTS
        self.prompt_length = np.zeros(FIRST_SLOTS, dtype=np.int64)
        self.length = np.zeros(FIRST_SLOTS, dtype=np.int64)
        """Tokens known now, generated ones included."""
        self.last_token = np.zeros(FIRST_SLOTS, dtype=np.int64)
        self.position_offset = np.zeros(FIRST_SLOTS, dtype=np.int64)
        """Token i behind the prompt has position i + this on all three rows."""
        self.block_count = np.zeros(FIRST_SLOTS, dtype=np.int64)
        self.blocks = np.zeros((FIRST_SLOTS, FIRST_PAGES), dtype=np.int64)

    def __len__(self) -> int:
        return len(self._slots)

    @property
    def ids(self) -> Iterable[int]:
        return self._slots.keys()

    def slots(self, ids: Iterable[int]) -> npt.NDArray[np.int64]:
        """Raises KeyError for a sequence that is not here."""
        return np.array([self._slots[id] for id in ids], dtype=np.int64)

    def add(self, new: NewSequence) -> None:
        """Raises ValueError for a sequence that is here already."""
        if new.id in self._slots:
            raise ValueError(f"sequence {new.id} is here already")
        if not self._free:
            self._grow_slots()
        slot = self._free.pop()
        self._slots[new.id] = slot
        tokens = np.array(new.token_ids, dtype=np.int64)
        positions, next_position = prompt_positions(new.prompt_length, new.spans, self._rules.positions)
        tail = np.arange(next_position, next_position + len(tokens) - new.prompt_length, dtype=np.int32)
        vision = self._rules.vision_tokens(tokens, self._config).astype(np.bool_)
        self.known[slot] = Known(
            new=new,
            tokens=tokens,
            positions_3n=np.concatenate((positions, np.broadcast_to(tail, (3, len(tail)))), axis=1),
            vision=vision if vision.any() else None,
        )
        self.prompt_length[slot] = new.prompt_length
        self.length[slot] = len(tokens)
        self.last_token[slot] = tokens[-1]
        self.position_offset[slot] = next_position - new.prompt_length
        self.block_count[slot] = 0

    def remove(self, id: int) -> None:
        """Idempotent."""
        slot = self._slots.pop(id, None)
        if slot is not None:
            self.known[slot] = None
            self._free.append(slot)

    def append_blocks(self, slices: Iterable[Slice]) -> None:
        """Takes the new blocks of a step's slices."""
        for part in slices:
            if part.new_blocks:
                slot = self._slots[part.id]
                start = int(self.block_count[slot])
                stop = start + len(part.new_blocks)
                if stop > self.blocks.shape[1]:
                    self._grow_pages(stop)
                self.blocks[slot, start:stop] = part.new_blocks
                self.block_count[slot] = stop

    def append_tokens(self, slots: npt.NDArray[np.int64], tokens: npt.ArrayLike) -> None:
        """One new token for each slot."""
        self.last_token[slots] = tokens
        self.length[slots] += 1

    def _grow_slots(self) -> None:
        count = len(self.known)
        self.known += [None] * count
        self._free += range(2 * count - 1, count - 1, -1)
        for name in ("prompt_length", "length", "last_token", "position_offset", "block_count", "blocks"):
            array = getattr(self, name)
            setattr(self, name, np.concatenate((array, np.zeros_like(array))))

    def _grow_pages(self, need: int) -> None:
        pages = self.blocks.shape[1]
        wider = np.zeros((len(self.blocks), max(need, 2 * pages)), dtype=np.int64)
        wider[:, :pages] = self.blocks
        self.blocks = wider
