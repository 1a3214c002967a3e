"""Constraints of sequences on other ranks. The leader keeps and advances them; a rank is sent the ids that may come.

What bounds a sequence cannot travel: it is compiled, and shared by requests. What it allows next is 13 kB of bits, and
the tokens it must hear of come back to the leader anyway.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from actors.engine.constraints.constraint import PackedMask, TokenConstraint
from actors.engine.plan import Slice


class RemoteConstraints:
    """The leader's, by sequence."""

    def __init__(self, words: int) -> None:
        """``words``: of a packed row of the vocabulary."""
        self._words = words
        self._constraints: dict[int, TokenConstraint] = {}

    def keep(self, id: int, constraint: TokenConstraint, outputs: Sequence[int]) -> None:
        """``constraint`` is at its start and is told the earlier outputs here."""
        for token in outputs:
            constraint.accept(token)
        self._constraints[id] = constraint

    def forget(self, id: int) -> None:
        """Idempotent."""
        self._constraints.pop(id, None)

    def masks(self, slices: Iterable[Slice]) -> dict[int, bytes | None]:
        """Of the bound sequences that sample: packed rows, None where all ids may come."""
        masks: dict[int, bytes | None] = {}
        for part in slices:
            constraint = self._constraints.get(part.id) if part.sample else None
            if constraint is not None:
                row_W = np.zeros(self._words, dtype=np.int32)
                masks[part.id] = row_W.tobytes() if constraint.fill(row_W) else None
        return masks

    def accept(self, tokens: Mapping[int, int]) -> None:
        """The tokens of a step."""
        for id in self._constraints.keys() & tokens.keys():
            self._constraints[id].accept(tokens[id])


class SentConstraint:
    """A rank's stand-in: allows what the leader sent with the present step. Implements ``TokenConstraint``."""

    def __init__(self) -> None:
        self.row: bytes | None = None

    def fill(self, mask_W: PackedMask) -> bool:
        if self.row is None:
            return False
        mask_W[:] = np.frombuffer(self.row, dtype=np.int32)
        return True

    def accept(self, token: int) -> None:
        """The leader's own hears of it."""
