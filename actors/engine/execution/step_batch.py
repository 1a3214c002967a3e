"""A step's slices as flat arrays: decoding rows first, sorted by context, then the chunks of prompts.

T tokens of the step, n decoding rows, P pages of the longest of their contexts, N slices that sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from actors.engine.execution.residents import Known, Residents
from actors.engine.plan import Slice

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """Tokens start .. start + count of the step are tokens first .. first + count of one sequence."""

    start: int
    first: int
    count: int
    blocks: Ints
    """Its block table, as far as the last of these tokens or further."""

    @property
    def context(self) -> int:
        """Tokens its last token sees."""
        return self.first + self.count


@dataclass(frozen=True, kw_only=True, slots=True)
class StepLayout:
    """Which tokens of a step belong to which sequence: n decoding rows, one token each, then the chunks in order."""

    contexts_n: Ints
    """Tokens each decoding row sees, itself included; ascending."""
    tables_nP: Ints
    """Their block tables; what lies beyond a row's context is any block."""
    chunks: tuple[Chunk, ...]

    @property
    def decode_count(self) -> int:
        return len(self.contexts_n)

    @property
    def token_count(self) -> int:
        return self.decode_count + sum(chunk.count for chunk in self.chunks)

    def places(self, block_size: int) -> tuple[Ints, Ints]:
        """Block and offset in it of every token of the step: two arrays [T]."""
        last_n = self.contexts_n - 1
        blocks = [self.tables_nP[np.arange(len(last_n)), last_n // block_size]]
        offsets = [last_n % block_size]
        for chunk in self.chunks:
            tokens = np.arange(chunk.first, chunk.context)
            blocks.append(chunk.blocks[tokens // block_size])
            offsets.append(tokens % block_size)
        return np.concatenate(blocks), np.concatenate(offsets)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepBatch:
    """Everything of a step but the weights."""

    ids_T: Ints
    positions_3T: npt.NDArray[np.int32]
    vision_T: npt.NDArray[np.bool_] | None
    """True routes to the vision experts; None when no token does."""
    layout: StepLayout
    known: tuple[Known, ...]
    """Of each chunk."""
    parts: tuple[Slice, ...]
    """In the order of the batch."""
    ends: Ints
    """Row behind the last token of each part."""
    slots: Ints
    """Of each part."""

    @property
    def sampling(self) -> Ints:
        """Indices of the parts that sample."""
        return np.flatnonzero([part.sample for part in self.parts])


def build_batch(residents: Residents, slices: Sequence[Slice], block_size: int) -> StepBatch:
    """A slice decodes if it is the last known token alone and lies behind the prompt; any other is a chunk.

    Raises ValueError for a chunk that reaches beyond the tokens its sequence arrived with.
    """
    slots = residents.slots(part.id for part in slices)
    first = np.array([part.first for part in slices], dtype=np.int64)
    count = np.array([part.count for part in slices], dtype=np.int64)
    decoding = (count == 1) & (first == residents.length[slots] - 1) & (first >= residents.prompt_length[slots])
    rows = np.flatnonzero(decoding)
    rows = rows[np.argsort(first[rows], kind="stable")]
    order = np.concatenate((rows, np.flatnonzero(~decoding)))
    decode_slots, decode_first = slots[rows], first[rows]
    pages = int(decode_first[-1]) // block_size + 1 if len(rows) else 0
    ends = np.cumsum(count[order])
    starts = ends - count[order]

    ids = [residents.last_token[decode_slots]]
    positions = [np.broadcast_to(decode_first + residents.position_offset[decode_slots], (3, len(rows)))]
    chunks: list[Chunk] = []
    owners: list[Known] = []
    vision: npt.NDArray[np.bool_] | None = None
    for start, index in zip(starts[len(rows) :].tolist(), order[len(rows) :], strict=True):
        slot, at = slots[index], slice(int(first[index]), int(first[index] + count[index]))
        known = residents.known[slot]
        assert known is not None, "a slot in use has no sequence"
        if at.stop > len(known.tokens):
            raise ValueError(f"tokens {at.start} .. {at.stop} of sequence {known.new.id} of {len(known.tokens)}")
        table = residents.blocks[slot, : residents.block_count[slot]]
        chunks.append(Chunk(start=start, first=at.start, count=at.stop - at.start, blocks=table))
        ids.append(known.tokens[at])
        positions.append(known.positions_3n[:, at])
        owners.append(known)
        if known.vision is not None and known.vision[at].any():
            if vision is None:
                vision = np.zeros(int(ends[-1]), dtype=np.bool_)
            vision[start : start + chunks[-1].count] = known.vision[at]
    return StepBatch(
        ids_T=np.concatenate(ids),
        positions_3T=np.concatenate(positions, axis=1).astype(np.int32),
        vision_T=vision,
        layout=StepLayout(
            contexts_n=decode_first + 1, tables_nP=residents.blocks[decode_slots, :pages], chunks=tuple(chunks)
        ),
        known=tuple(owners),
        parts=tuple(slices[index] for index in order),
        ends=ends,
        slots=slots[order],
    )
