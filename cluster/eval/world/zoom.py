"""Looking closer: the tool, where to look, and what is seen then."""

from __future__ import annotations

import json
from typing import Any

from PIL import Image

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


def crop(image: Image.Image, corners: list[float] | list[int]) -> Image.Image:
    """That part of a picture, in its own pixels. Raises ValueError for a box without area inside."""
    x1, y1, x2, y2 = (min(SCALE, max(0, c)) / SCALE for c in corners)
    width, height = image.size
    box = (round(x1 * width), round(y1 * height), round(x2 * width), round(y2 * height))
    if box[0] >= box[2] or box[1] >= box[3]:
        raise ValueError(f"{corners} holds no pixel of a {width} x {height} picture")
    return image.crop(box)
