"""Looking closer: the tool, and where to look."""

from __future__ import annotations

import json
from typing import Any

from cluster.eval.world.things import Box

NAME = "image_zoom_in_tool"
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": NAME,
        "description": "Zooms into a part of a picture.",
        "parameters": {
            "type": "object",
            "properties": {"bbox_2d": {"type": "array", "items": {"type": "number"}}},
            "required": ["bbox_2d"],
        },
    },
}
"""As a client declares it. Coordinates are in thousandths of the sides: x1, y1, x2, y2."""
OFFER = f"\n<tool_list>\n{json.dumps([TOOL])}\n</tool_list>\n"
"""The tool on offer, as the chat template writes it into a prompt."""
SIDE, STEP, SCALE = 240, 20, 1000


def where(box: Box) -> list[int]:
    """The part to look at for a small thing in ``box``."""
    corners = [min(SCALE - SIDE, max(0, STEP * round((c * SCALE - SIDE / 2) / STEP))) for c in box.centre]
    return [*corners, corners[0] + SIDE, corners[1] + SIDE]


def call(corners: list[int]) -> str:
    """What the model writes to look there."""
    return f"<tool_call>\n{json.dumps({'name': NAME, 'arguments': {'bbox_2d': corners}})}\n</tool_call>"
