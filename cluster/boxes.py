"""Boxes as models write them, in thousandths of a picture's sides: x1, y1, x2, y2."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

SCALE = 1000
LARGEST = 1e6
"""No reading of a picture has coordinates beyond it."""
MAX_UNREADABLE = 500
"""Brackets of an answer that begin nothing readable; it is read no further, since each may be looked for to its end."""
BOX_KEYS = ("bbox_2d", "bbox", "box_2d", "box")
LABEL_KEYS = ("label", "name", "text", "text_content", "class", "category", "object", "description")
_MAX_DEPTH = 20


@dataclass(frozen=True, slots=True)
class LabelledBox:
    """``corners`` are x1 <= x2 and y1 <= y2, within 0 to SCALE."""

    corners: tuple[float, float, float, float]
    label: str = ""


def read_box(value: object) -> list[float] | None:
    """The four numbers of ``{"bbox_2d": [x1, y1, x2, y2]}`` as parsed from JSON; None for anything else."""
    return _four(value.get("bbox_2d")) if isinstance(value, dict) else None


def find_boxes(text: str) -> list[LabelledBox]:
    """All boxes in an answer, in their order, whatever is around them.

    Understood are JSON objects with a box under one of BOX_KEYS and perhaps a label under one of LABEL_KEYS, objects of
    boxes by label, and bare lists of four numbers, in lists, in fences or between words. What is cut off or is no box
    is passed over.
    """
    found = []
    for value in _json_values(text):
        found += [_shaped(box, label) for box, label in _boxes_in(value, "", 0)]
    return [box for box in found if box is not None]


def _json_values(text: str) -> Iterator[object]:
    """Every outermost JSON object or list that can be read. One that cannot be is entered, for what it holds."""
    decoder = json.JSONDecoder()
    at = unreadable = 0
    while unreadable < MAX_UNREADABLE and (at := _next_bracket(text, at)) >= 0:
        try:
            value, at = decoder.raw_decode(text, at)
            yield value
        except (ValueError, RecursionError):
            at += 1
            unreadable += 1


def _next_bracket(text: str, at: int) -> int:
    places = [place for place in (text.find("{", at), text.find("[", at)) if place >= 0]
    return min(places, default=-1)


def _boxes_in(value: object, label: str, depth: int) -> Iterator[tuple[list[float], str]]:
    if depth > _MAX_DEPTH:
        return
    four = _four(value)
    if four is not None:
        yield four, label
    elif isinstance(value, list):
        for item in value:
            yield from _boxes_in(item, label, depth + 1)
    elif isinstance(value, dict):
        own = next((value[key] for key in LABEL_KEYS if isinstance(value.get(key), str)), None)
        boxes = [key for key in BOX_KEYS if key in value]
        if boxes:
            for key in boxes[:1]:
                yield from _boxes_in(value[key], label if own is None else own, depth + 1)
        else:
            for key, item in value.items():
                yield from _boxes_in(item, key if own is None else own, depth + 1)


def _four(value: object) -> list[float] | None:
    if not isinstance(value, list) or len(value) != 4:
        return None
    numbers = [n for n in value if isinstance(n, int | float) and not isinstance(n, bool) and abs(n) <= LARGEST]
    return numbers if len(numbers) == 4 else None


def _shaped(numbers: list[float], label: str) -> LabelledBox | None:
    """In order and inside; None where nothing is left."""
    x1, y1, x2, y2 = (min(float(SCALE), max(0.0, float(n))) for n in numbers)
    corners = (min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2))
    return LabelledBox(corners, label) if corners[0] < corners[2] and corners[1] < corners[3] else None
