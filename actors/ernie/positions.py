"""Position ids of a prompt, a pure function of its length and the grids of its media."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from actors.types import SPATIAL_MERGE, Grid


def prompt_positions(
    length: int, spans: Sequence[tuple[int, Grid]], rule: Literal["original", "transformers"]
) -> tuple[npt.NDArray[np.int32], int]:
    """int32 [3, length] positions in the rows t, h, w, and the position of the first generated token.

    ``spans``: (index of the first placeholder token, grid in patches) of each whole image or video, in order. Generated
    token k has all three rows equal to ``next + k``: generated text goes on like the prompt's.

    Text counts up by one on all rows. A medium of T x H x W tokens that begins at position p takes p + (t, h, w); text
    goes on at p + max(T, H, W) under "original", at p + max(H, W) under "transformers" (which lets positions overlap
    when a video has more frame pairs than rows and columns). Under "original" next is one past the largest position;
    under "transformers" it may lie below that, as in ``generate``, which counts on from the last token (a cached
    ``forward`` of its model, which counts on from the largest position, would differ).

    Raises ValueError if spans overlap, are out of order or reach past ``length``.
    """
    positions = np.empty((3, length), dtype=np.int32)
    done = current = 0
    for offset, grid in spans:
        end = offset + grid.tokens
        if offset < done or end > length:
            raise ValueError(f"media tokens {offset}..{end} do not fit between {done} and {length}")
        current = _count(positions, done, offset, current)
        t, h, w = grid.units, grid.height // SPATIAL_MERGE, grid.width // SPATIAL_MERGE
        positions[:, offset:end] = np.indices((t, h, w), dtype=np.int32).reshape(3, -1) + current
        current += max(t, h, w) if rule == "original" else max(h, w)
        done = end
    return positions, _count(positions, done, length, current)


def _count(positions: npt.NDArray[np.int32], start: int, end: int, current: int) -> int:
    """Text positions for tokens start .. end; returns the position after them."""
    positions[:, start:end] = np.arange(current, current + end - start, dtype=np.int32)
    return current + end - start
