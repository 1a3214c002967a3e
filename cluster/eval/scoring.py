"""How an answer is scored: by its words, or by how well its box lies."""

from __future__ import annotations

import json

from cluster.boxes import read_box
from cluster.eval.world.questions import BOX_SCALE
from cluster.eval.world.things import Box

BOX_TASKS = frozenset({"grounding"})


def metric(task: str) -> str:
    """What the mean over a task's samples is called."""
    return "iou" if task in BOX_TASKS else "accuracy"


def score(task: str, answer: str, truth: str) -> float:
    """From 0 to 1. Words must be those of ``truth``, apart from space around them; a box counts its intersection over
    union with the true one, and nothing if it cannot be read."""
    if task in BOX_TASKS:
        given, true = _box(answer), _box(truth)
        return given.iou(true) if given is not None and true is not None else 0.0
    return float(answer.strip() == truth)


def _box(text: str) -> Box | None:
    try:
        corners = read_box(json.loads(text))
    except (ValueError, RecursionError):
        return None
    return None if corners is None else Box(*(corner / BOX_SCALE for corner in corners))
