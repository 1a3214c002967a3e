"""Scenes that suit each task."""

from __future__ import annotations

import random

from cluster.eval.world.things import (
    COLOURS,
    SHAPES,
    Scene,
    Thing,
    names,
    random_ground,
    random_number,
    random_shapes,
    random_size,
)

LARGE_DIGITS = (0.17, 0.42)
"""Heights, in shares of the side, at which a number can be read at first sight."""
SMALL_DIGITS = (0.035, 0.06)
"""Heights at which it cannot, until one looks closer."""
SHARPEST = 300
"""Least width and height of a picture in which small digits can be told at all."""


def scene(rng: random.Random, task: str) -> Scene:
    """A scene in which at least one question of ``task`` has an answer."""
    while True:
        size = random_size(rng)
        things = _things(rng, task, size)
        if things is not None:
            return Scene(*size, random_ground(rng), things)


def _things(rng: random.Random, task: str, size: tuple[int, int]) -> tuple[Thing, ...] | None:
    if task == "odd":
        return _odd(rng, size)
    if task == "count":
        return _many(rng, size)
    if task == "digits":
        return _with_number(rng, size, rng.choice((0, 0, 1, 2)))
    if task == "region":
        return random_shapes(rng, size, names(rng, rng.choice((1, 2, 2, 3)), distinct=True), clear=True)
    if task in ("colour", "shape", "describe", "exist", "grounding"):
        return random_shapes(rng, size, names(rng, rng.choice((1, 2, 2, 3)), distinct=True))
    if task == "position":
        return random_shapes(rng, size, names(rng, rng.choice((2, 2, 3)), distinct=True))
    raise ValueError(f"no scenes for {task!r}")


def _odd(rng: random.Random, size: tuple[int, int]) -> tuple[Thing, ...] | None:
    kind, colour = names(rng, 1)[0]
    other_kind = rng.choice([k for k in SHAPES if k != kind])
    other_colour = rng.choice([c for c in COLOURS if c != colour])
    odd = rng.choice(((other_kind, colour), (kind, other_colour), (other_kind, other_colour)))
    return random_shapes(rng, size, [odd] + [(kind, colour)] * rng.choice((2, 2, 3)))


def _many(rng: random.Random, size: tuple[int, int]) -> tuple[Thing, ...] | None:
    """One to five shapes, often several of a kind or of a colour."""
    total = rng.choice((1, 2, 3, 3, 4, 4, 5))
    kinds, colours = rng.sample(SHAPES, 2), rng.sample(list(COLOURS), 2)
    chosen = []
    for _ in range(total):
        kind = rng.choice(kinds) if rng.random() < 0.85 else rng.choice(SHAPES)
        colour = rng.choice(colours) if rng.random() < 0.7 else rng.choice(list(COLOURS))
        chosen.append((kind, colour))
    return random_shapes(rng, size, chosen)


def _with_number(rng: random.Random, size: tuple[int, int], shapes: int) -> tuple[Thing, ...] | None:
    number = random_number(rng, size, rng.choice((1, 2, 2)), LARGE_DIGITS)
    if number is None:
        return None
    others = random_shapes(rng, size, names(rng, shapes, distinct=True), taken=[number.box])
    return None if others is None else (number, *others)


def small_number(rng: random.Random) -> Scene:
    """A picture with a number too small to read at first sight."""
    while True:
        size = random_size(rng)
        if min(size) < SHARPEST:
            continue
        number = random_number(rng, size, rng.choice((1, 2, 2)), SMALL_DIGITS)
        if number is None:
            continue
        others = random_shapes(rng, size, names(rng, rng.choice((0, 1, 2)), distinct=True), taken=[number.box])
        if others is not None:
            return Scene(*size, random_ground(rng), (number, *others))


def dense(rng: random.Random) -> Scene:
    """As many shapes and numbers as one can learn to see at a time."""
    while True:
        size = random_size(rng)
        things: tuple[Thing, ...] = ()
        for _ in range(rng.choice((0, 1, 1, 2, 2, 3))):
            number = random_number(rng, size, rng.choice((1, 2, 2)), (0.13, 0.34), taken=[t.box for t in things])
            things += () if number is None else (number,)
        for _ in range(3):
            count = rng.choice((0, 1, 2, 3, 4, 5, 6)) if things else rng.choice((2, 3, 4, 5, 6))
            others = random_shapes(rng, size, names(rng, count), taken=[t.box for t in things])
            if others is not None:
                return Scene(*size, random_ground(rng), (*things, *others))
