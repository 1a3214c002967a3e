"""Thinking, then structure: the ``TokenConstraint`` of one sequence."""

from __future__ import annotations

from actors.engine.constraints.constraint import PackedMask
from actors.engine.constraints.structure import StructureState
from actors.engine.constraints.thinking import Phase, Thinking


class SequenceConstraint:
    """Either part may be absent. ``thinking`` knows whether a structure follows."""

    def __init__(self, thinking: Thinking | None, structure: StructureState | None) -> None:
        self._thinking = thinking
        self._structure = structure

    def fill(self, mask_W: PackedMask) -> bool:
        row_W = self._allowed()
        if row_W is None:
            return False
        count = min(len(mask_W), len(row_W))
        mask_W[:count] = row_W[:count]
        mask_W[count:] = 0
        return True

    def accept(self, token: int) -> None:
        if (self._thinking is None or self._thinking.accept(token)) and self._structure is not None:
            self._structure.accept(token)

    def _allowed(self) -> PackedMask | None:
        thinking, structure = self._thinking, self._structure
        if thinking is None or thinking.phase is Phase.ANSWER:
            return None if structure is None else structure.allowed()
        if thinking.phase is Phase.SEPARATORS and structure is not None:
            return thinking.with_separators(structure.allowed())
        return thinking.allowed()
