"""Media embeddings of a rank's sequences, from their arrival until their last token is computed.

T tokens of the step, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from actors.engine.execution.residents import Known
from actors.engine.execution.step_batch import Chunk


class EmbeddingStore:
    """Keyed by sequence, medium and unit."""

    def __init__(self) -> None:
        self._units: dict[int, dict[tuple[int, int], Tensor]] = {}

    @property
    def ids(self) -> Iterable[int]:
        """Sequences with embeddings here."""
        return self._units.keys()

    def supply(self, id: int, media_index: int, unit_index: int, embedding: Tensor) -> None:
        """``embedding``: [tokens of the unit, D], of the model's dtype and device."""
        self._units.setdefault(id, {})[(media_index, unit_index)] = embedding

    def forget(self, id: int) -> None:
        """Idempotent."""
        self._units.pop(id, None)

    def place(self, x_TD: Tensor, known: Known, chunk: Chunk) -> None:
        """Overwrites the placeholder rows of a chunk; drops each embedding with the last token of its unit.

        Raises KeyError if one is missing.
        """
        first, stop = chunk.first, chunk.context
        for media_index, (offset, grid) in enumerate(known.new.spans):
            size = grid.tokens_per_unit
            if offset >= stop or offset + grid.tokens <= first:
                continue
            units = self._units[known.new.id]
            first_unit = max(0, first - offset) // size
            last_unit = (min(stop, offset + grid.tokens) - 1 - offset) // size
            for unit_index in range(first_unit, last_unit + 1):
                begin = offset + unit_index * size
                low, high = max(begin, first), min(begin + size, stop)
                embedding = units[(media_index, unit_index)]
                at = chunk.start - first
                x_TD[at + low : at + high] = embedding[low - begin : high - begin]
                if high == begin + size:
                    del units[(media_index, unit_index)]
