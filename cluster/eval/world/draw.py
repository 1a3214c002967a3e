"""Draws scenes with pillow."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from importlib import resources

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from cluster.eval.world.things import COLOURS, NUMBER, Ground, Scene, Thing

_GRAIN_UNIT = 112


def draw_scene(scene: Scene) -> Image.Image:
    """The RGB picture of a scene."""
    image = draw_ground(scene.ground, scene.width, scene.height)
    draw_things(image, scene.things)
    return image


def draw_ground(ground: Ground, width: int, height: int) -> Image.Image:
    if not ground.noise and not ground.fade:
        return Image.new("RGB", (width, height), ground.colour)
    rng = np.random.default_rng(ground.seed)
    pixels = np.empty((height, width, 3), dtype=np.float32)
    pixels[:] = ground.colour
    if ground.fade:
        across = np.linspace(0, 1, width, dtype=np.float32)[None, :] * math.cos(ground.angle)
        down = np.linspace(0, 1, height, dtype=np.float32)[:, None] * math.sin(ground.angle)
        slope = across + down
        span = float(np.ptp(slope)) or 1.0
        pixels *= (1 - ground.fade * (slope - slope.min()) / span)[:, :, None]
    if ground.noise:
        grain = max(1, round(ground.grain * max(width, height) / _GRAIN_UNIT))
        rows, columns = -(-height // grain), -(-width // grain)
        noise = rng.standard_normal((rows, columns, 1), dtype=np.float32) * ground.noise
        if grain > 1:
            noise = noise.repeat(grain, 0).repeat(grain, 1)[:height, :width]
        pixels += noise
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def draw_things(image: Image.Image, things: Sequence[Thing]) -> None:
    draw = ImageDraw.Draw(image)
    width, height = image.size
    for thing in things:
        box = thing.box
        corners = (box.x1 * width, box.y1 * height, box.x2 * width, box.y2 * height)
        if thing.kind == NUMBER:
            _draw_number(draw, thing, corners)
        else:
            _draw_shape(draw, thing.kind, fill(thing), corners)


def fill(thing: Thing) -> tuple[int, int, int]:
    """The colour a thing is drawn in."""
    red, green, blue = (max(0, min(255, c + t)) for c, t in zip(COLOURS[thing.colour], thing.tint, strict=True))
    return red, green, blue


def _draw_shape(
    draw: ImageDraw.ImageDraw, kind: str, fill: tuple[int, int, int], corners: tuple[float, float, float, float]
) -> None:
    x1, y1, x2, y2 = corners
    if kind == "circle":
        draw.ellipse(corners, fill=fill)
    elif kind == "square":
        draw.rectangle(corners, fill=fill)
    elif kind == "ring":
        draw.ellipse(corners, outline=fill, width=max(2, round(0.2 * min(x2 - x1, y2 - y1))))
    else:
        draw.polygon([(x1 + x * (x2 - x1), y1 + y * (y2 - y1)) for x, y in _POLYGONS[kind]], fill=fill)


def _star() -> tuple[tuple[float, float], ...]:
    points = []
    for i in range(10):
        reach = 0.5 if i % 2 == 0 else 0.2
        angle = math.tau * i / 10
        points.append((0.5 + reach * math.sin(angle), 0.5 - reach * math.cos(angle)))
    low_x, high_x = min(x for x, _ in points), max(x for x, _ in points)
    low_y, high_y = min(y for _, y in points), max(y for _, y in points)
    return tuple(((x - low_x) / (high_x - low_x), (y - low_y) / (high_y - low_y)) for x, y in points)


_A, _B = 0.34, 0.66
_POLYGONS: dict[str, tuple[tuple[float, float], ...]] = {
    "triangle": ((0.5, 0), (1, 1), (0, 1)),
    "diamond": ((0.5, 0), (1, 0.5), (0.5, 1), (0, 0.5)),
    "star": _star(),
    "cross": (
        (_A, 0),
        (_B, 0),
        (_B, _A),
        (1, _A),
        (1, _B),
        (_B, _B),
        (_B, 1),
        (_A, 1),
        (_A, _B),
        (0, _B),
        (0, _A),
        (_A, _A),
    ),
}


def _draw_number(draw: ImageDraw.ImageDraw, thing: Thing, corners: tuple[float, float, float, float]) -> None:
    """Digits fill the box: the font's capital height is the box's height."""
    x1, y1, _, y2 = corners
    font = number_font(max(4, round((y2 - y1) * _EM_OVER_CAP)))
    draw.text((x1, y2), thing.text, font=font, fill=fill(thing), anchor="ls")


_EM_OVER_CAP = 1.406
"""Roboto's digits are 0.711 em high and 0.562 em wide."""


@functools.lru_cache(maxsize=512)
def number_font(size: int) -> ImageFont.FreeTypeFont:
    with resources.as_file(resources.files("actors.processing") / "assets" / "Roboto-Regular.ttf") as path:
        return ImageFont.truetype(str(path), size)
