"""Boxes as the model writes them."""

from __future__ import annotations

LARGEST = 1e6
"""No reading of a picture has coordinates beyond it, in thousandths of the sides."""


def read_box(value: object) -> list[float] | None:
    """The four numbers of ``{"bbox_2d": [x1, y1, x2, y2]}`` as parsed from JSON; None for anything else."""
    box = value.get("bbox_2d") if isinstance(value, dict) else None
    if not isinstance(box, list) or len(box) != 4:
        return None
    numbers = [n for n in box if isinstance(n, int | float) and not isinstance(n, bool) and abs(n) <= LARGEST]
    return numbers if len(numbers) == 4 else None
