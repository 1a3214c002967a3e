"""What the tower is first taught: for every patch, what lies there.

A patch holds the colour, kind and box of the shape whose centre is in it, and a digit in each of its halves.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from actors.processing.sampling import timestamp_text
from actors.processing.video import draw_timestamp
from cluster.eval.world.clips import clip
from cluster.eval.world.draw import draw_scene, number_font
from cluster.eval.world.questions import BUILDERS
from cluster.eval.world.scenes import dense, scene
from cluster.eval.world.things import COLOURS, NUMBER, SHAPES, Scene, Thing
from nano.files import FONT_PATH
from nano.frames import Frame, FrameBatch, Ints, batch_frames, frame, smaller, spoil

COLOUR_INDEX = {name: i + 1 for i, name in enumerate(COLOURS)}
SHAPE_INDEX = {name: i + 1 for i, name in enumerate(SHAPES)}
CLASSES = (len(COLOURS) + 1, len(SHAPES) + 1, 11, 11)
"""Classes of each patch: colour, shape, digit in the left half, digit in the right half; 0 is nothing."""
OUTPUTS = sum(CLASSES) + 4
DIGITS = 3
"""Digits of one frame in one token that are told apart; there is hardly ever room for more."""
Floats = npt.NDArray[np.float32]


@dataclass(slots=True)
class Targets:
    classes: Ints
    """int [4, P]."""
    boxes: Floats
    """[P, 4]: centre from the patch's, width and height, in tokens; NaN where there is no shape."""


def targets(scene: Scene, grid: tuple[int, int], stamp: float | None = None) -> Targets:
    rows, columns = grid
    high, wide = 2 * rows, 2 * columns
    classes = np.zeros((4, high * wide), dtype=np.int64)
    boxes = np.full((high * wide, 4), np.nan, dtype=np.float32)

    def patch(x: float, y: float) -> tuple[int, int, int]:
        r, c = min(high - 1, int(y * high)), min(wide - 1, int(x * wide))
        return ((r // 2) * columns + c // 2) * 4 + (r % 2) * 2 + c % 2, r, c

    def digit(x: float, y: float, value: int) -> int:
        i, _, c = patch(x, y)
        classes[2 + int(x * wide - c >= 0.5), i] = value + 1
        return i

    for thing in scene.things:
        x, y = thing.box.centre
        if thing.kind == NUMBER:
            width = (thing.box.x2 - thing.box.x1) / len(thing.text)
            for k, char in enumerate(thing.text):
                i = digit(thing.box.x1 + (k + 0.5) * width, y, int(char))
                classes[0, i] = COLOUR_INDEX[thing.colour]
            continue
        i, r, c = patch(x, y)
        classes[0, i], classes[1, i] = COLOUR_INDEX[thing.colour], SHAPE_INDEX[thing.kind]
        boxes[i] = (
            (x * wide - c - 0.5) / 2,
            (y * high - r - 0.5) / 2,
            (thing.box.x2 - thing.box.x1) * columns,
            (thing.box.y2 - thing.box.y1) * rows,
        )
    if stamp is not None:
        size = max(1, int(min(scene.width, scene.height) * 0.1))
        font, text = number_font(size), timestamp_text(stamp)
        for k in (-5, -4, -2):
            left, right = font.getlength(text[:k]), font.getlength(text[: k + 1])
            x = (left + right) / 2 / scene.width
            if x < 1:
                digit(x, 0.6 * size / scene.height, int(text[k]))
    return Targets(classes, boxes)


THING_INDEX = {**SHAPE_INDEX, NUMBER: len(SHAPE_INDEX) + 1}
CORNER_BINS, ORDINALS = 40, 8
ABOUT_THING = 9
"""Numbers told about the thing in a token: see ``things_of_tokens``."""


def things_of_tokens(scene: Scene, grid: tuple[int, int]) -> Ints:
    """What has its centre in each token, int [rows * columns, ABOUT_THING].

    Its kind and colour (0 for none); its box's x1, y1, x2, y2 in CORNER_BINS parts of the sides; and, of a shape, how
    many of its kind, of its colour and of all shapes there are up to this token (-1 where there is none).
    """
    rows, columns = grid
    found = np.full((rows * columns, ABOUT_THING), (0, 0, *[-1] * 7), dtype=np.int64)
    placed: list[tuple[int, Thing]] = []
    for thing in scene.things:
        x, y = thing.box.centre
        corners = (thing.box.x1, thing.box.y1, thing.box.x2, thing.box.y2)
        token = min(rows - 1, int(y * rows)) * columns + min(columns - 1, int(x * columns))
        found[token, :6] = (
            THING_INDEX[thing.kind],
            COLOUR_INDEX[thing.colour],
            *(min(CORNER_BINS - 1, max(0, int(c * CORNER_BINS))) for c in corners),
        )
        if thing.kind != NUMBER:
            placed.append((token, thing))
    for token, thing in placed:
        before = [other for at, other in placed if at <= token]
        same = (sum(t.kind == thing.kind for t in before), sum(t.colour == thing.colour for t in before), len(before))
        found[token, 6:] = [min(n, ORDINALS) - 1 for n in same]
    return found


@dataclass(frozen=True, slots=True)
class VisionBatch:
    frames: FrameBatch
    classes: Ints
    """int [U, 2, 4, P]."""
    boxes: Floats
    """[U, 2, P, 4]."""


def vision_batch(rng: random.Random, pictures: int, clips: int) -> VisionBatch:
    frames: list[Frame] = []
    pairs: list[tuple[int, int]] = []
    found: list[tuple[Targets, Targets] | None] = []
    for _ in range(pictures):
        made = dense(rng) if rng.random() < 0.7 else scene(rng, rng.choice(list(BUILDERS)))
        item = frame(spoil(draw_scene(smaller(made, rng)), rng))
        seen = targets(made, item.grid)
        pairs.append((len(frames), len(frames)))
        frames.append(item)
        found.append((seen, seen))
    for _ in range(clips):
        film = smaller(clip(rng, rng.choice(("moving", "event_time", "timestamp"))), rng)
        times = film.sampled()
        first = 2 * rng.randrange(max(1, len(times) // 2))
        both = times[first : first + 2] if first + 1 < len(times) else (times[first], times[first])
        pairs.append((len(frames), len(frames) + 1))
        both_targets = []
        for index, image in zip(both, film.draw(both), strict=True):
            draw_timestamp(image, index / film.rate, FONT_PATH)
            item = frame(spoil(image, rng))
            frames.append(item)
            both_targets.append(targets(film.at(index), item.grid, index / film.rate))
        found.append((both_targets[0], both_targets[1]))
    padded = batch_frames(frames, pairs)
    return VisionBatch(padded, *stack(found, padded))


def stack(found: Sequence[tuple[Targets, Targets] | None], frames: FrameBatch) -> tuple[Ints, Floats]:
    """Targets of units, padded like their frames; a unit without any has class -1 everywhere."""
    most = frames.valid.shape[1]
    classes = np.zeros((len(found), 2, 4, most), dtype=np.int64)
    boxes = np.full((len(found), 2, most, 4), np.nan, dtype=np.float32)
    for u, sides in enumerate(found):
        if sides is None:
            classes[u] = -1
            continue
        for k, side in enumerate(sides):
            classes[u, k, :, : side.classes.shape[1]] = side.classes
            boxes[u, k, : len(side.boxes)] = side.boxes
    return classes, boxes


def digits_of_tokens(classes: Ints) -> Ints:
    """Digits of each token from left to right, int [U, P / 4, 2 * DIGITS]: of the first frame, then of the second.

    0 where there is none, digit + 1, or -1 where nothing is known. ``classes`` as in VisionBatch.
    """
    units, frames, _, patches = classes.shape
    # Patches of a token are row by row; from left to right is by column, then by half, then by row.
    cells = classes[:, :, 2:].reshape(units, frames, 2, patches // 4, 2, 2).transpose(0, 3, 1, 5, 2, 4)
    cells = cells.reshape(units, patches // 4, frames, 8)
    order = np.argsort(cells == 0, axis=-1, kind="stable")[..., :DIGITS]
    return np.take_along_axis(cells, order, axis=-1).reshape(units, patches // 4, frames * DIGITS)
