"""Scenes: coloured shapes and numbers on a ground, placed so that none touches another."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 32, 38),
    "orange": (244, 138, 28),
    "yellow": (242, 216, 30),
    "green": (44, 150, 62),
    "blue": (38, 82, 212),
    "purple": (128, 46, 160),
    "pink": (246, 142, 190),
    "black": (22, 22, 24),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond", "ring")
NUMBER = "number"

SIZES = (
    (640, 480),
    (480, 640),
    (448, 448),
    (320, 240),
    (336, 336),
    (512, 384),
    (600, 400),
    (400, 600),
    (640, 360),
    (360, 640),
    (224, 224),
    (256, 192),
    (300, 300),
    (500, 375),
    (800, 600),
    (112, 112),
    (168, 126),
    (200, 200),
)
"""Picture sizes people send, width x height; a quarter of all pictures has any other."""
LONGEST_ASPECT = 190.0
"""The processor refuses 200."""

NEAR = 0.045
"""Half the width of the band around a region's border in which no asked thing lies, as a share of the side."""
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "middle", "right")


@dataclass(frozen=True, slots=True)
class Box:
    """Corners as shares of the picture's width and height, from the top left."""

    x1: float
    y1: float
    x2: float
    y2: float

    @property
    def centre(self) -> tuple[float, float]:
        return (self.x1 + self.x2) / 2, (self.y1 + self.y2) / 2

    @property
    def clearly_in_region(self) -> bool:
        """Whether the centre keeps away from the borders between regions."""
        return all(abs(value - border) > NEAR for value in self.centre for border in (1 / 3, 2 / 3))

    def shifted(self, dx: float, dy: float) -> Box:
        return Box(self.x1 + dx, self.y1 + dy, self.x2 + dx, self.y2 + dy)

    def iou(self, other: Box) -> float:
        """Intersection over union; 0 for boxes without area."""
        width = min(self.x2, other.x2) - max(self.x1, other.x1)
        height = min(self.y2, other.y2) - max(self.y1, other.y1)
        shared = max(0.0, width) * max(0.0, height)
        union = self._area + other._area - shared
        return shared / union if union > 0 else 0.0

    @property
    def _area(self) -> float:
        return max(0.0, self.x2 - self.x1) * max(0.0, self.y2 - self.y1)


@dataclass(frozen=True, slots=True)
class Thing:
    """A shape, or a number of ``text`` digits."""

    kind: str
    """One of SHAPES, or NUMBER."""
    colour: str
    box: Box
    text: str = ""
    tint: tuple[int, int, int] = (0, 0, 0)
    """What is added to the colour's red, green and blue."""

    @property
    def name(self) -> str:
        return f"{self.colour} {self.kind}"

    @property
    def region(self) -> str:
        """One of nine: ``top left``, ``top``, ... ``middle``."""
        x, y = self.box.centre
        row, column = ROWS[min(2, int(y * 3))], COLUMNS[min(2, int(x * 3))]
        if row == column:
            return "middle"
        return " ".join(part for part in (row, column) if part != "middle")


@dataclass(frozen=True, slots=True)
class Ground:
    """What things lie on: a light colour, plain, noisy or fading, repeatable by its seed."""

    colour: tuple[int, int, int]
    noise: float = 0.0
    """Standard deviation of the grain, in 8-bit steps."""
    grain: int = 1
    """Side of a grain in pixels of a picture 112 wide."""
    fade: float = 0.0
    """How much darker the far end is, as a share."""
    angle: float = 0.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Scene:
    """A picture to draw; sizes in pixels."""

    width: int
    height: int
    ground: Ground
    things: tuple[Thing, ...]

    @property
    def shapes(self) -> tuple[Thing, ...]:
        return tuple(thing for thing in self.things if thing.kind != NUMBER)

    @property
    def numbers(self) -> tuple[Thing, ...]:
        return tuple(thing for thing in self.things if thing.kind == NUMBER)

    def only(self, *, kind: str | None = None, colour: str | None = None) -> Thing | None:
        """The one shape that fits, if it is the only one."""
        found = [t for t in self.shapes if kind in (None, t.kind) and colour in (None, t.colour)]
        return found[0] if len(found) == 1 else None


def random_size(rng: random.Random) -> tuple[int, int]:
    """Width and height of a picture."""
    if rng.random() < 0.75:
        return rng.choice(SIZES)
    aspect = math.exp(rng.uniform(-1, 1) * math.log(LONGEST_ASPECT if rng.random() < 0.3 else 2.2))
    side = rng.uniform(90, 480)
    return max(32, round(side * math.sqrt(aspect))), max(32, round(side / math.sqrt(aspect)))


def random_ground(rng: random.Random) -> Ground:
    base = rng.randint(205, 255)
    colour = tuple(max(0, min(255, base + rng.randint(-14, 14))) for _ in range(3))
    kind = rng.random()
    return Ground(
        colour=(colour[0], colour[1], colour[2]),
        noise=rng.uniform(3, 18) if kind < 0.45 else 0.0,
        grain=rng.choice((1, 1, 2, 4)),
        fade=rng.uniform(0.05, 0.2) if 0.3 < kind < 0.6 else 0.0,
        angle=rng.uniform(0, math.tau),
        seed=rng.getrandbits(32),
    )


def unit(width: int, height: int) -> float:
    """The length sizes of things are shares of: the side of a square of the picture's area."""
    return math.sqrt(width * height)


def place(
    rng: random.Random,
    size: tuple[int, int],
    sides: Sequence[tuple[float, float]],
    *,
    taken: Sequence[Box] = (),
    margin: float = 0.02,
    gap: float = 0.03,
    clear: bool = False,
    tries: int = 60,
) -> list[Box] | None:
    """Boxes of (width, height) in shares of ``unit``, inside the picture and apart; None when they do not fit.

    ``clear``: centres keep away from the borders between regions.
    """
    width, height = size
    side = unit(width, height)
    boxes: list[Box] = []
    for wide, high in sides:
        w, h = wide * side / width, high * side / height
        mx, my, gx, gy = margin * side / width, margin * side / height, gap * side / width, gap * side / height
        if w + 2 * mx > 1 or h + 2 * my > 1:
            return None
        for _ in range(tries):
            x, y = rng.uniform(mx, 1 - mx - w), rng.uniform(my, 1 - my - h)
            box = Box(x, y, x + w, y + h)
            apart = all(
                box.x2 + gx < other.x1 or other.x2 + gx < box.x1 or box.y2 + gy < other.y1 or other.y2 + gy < box.y1
                for other in (*boxes, *taken)
            )
            if apart and (not clear or box.clearly_in_region):
                boxes.append(box)
                break
        else:
            return None
    return boxes


def shape_side(rng: random.Random, size: tuple[int, int], count: int) -> float:
    """Side of a shape in shares of ``unit``: smaller where there are many, and never over the picture's short side."""
    width, height = size
    largest = min(
        {1: 0.46, 2: 0.42, 3: 0.36, 4: 0.32, 5: 0.28}.get(count, 0.25), 0.85 * min(size) / unit(width, height)
    )
    return rng.uniform(min(0.17, largest), largest)


def random_shapes(
    rng: random.Random,
    size: tuple[int, int],
    names: Sequence[tuple[str, str]],
    *,
    taken: Sequence[Box] = (),
    clear: bool = False,
) -> tuple[Thing, ...] | None:
    """Shapes of the given (kind, colour), placed; None when they do not fit."""
    sides = [(side, side) for side in (shape_side(rng, size, len(names) + len(taken)) for _ in names)]
    boxes = place(rng, size, sides, taken=taken, clear=clear)
    if boxes is None:
        return None
    return tuple(
        Thing(kind, colour, box, tint=random_tint(rng)) for (kind, colour), box in zip(names, boxes, strict=True)
    )


def random_tint(rng: random.Random) -> tuple[int, int, int]:
    return rng.randint(-14, 14), rng.randint(-14, 14), rng.randint(-14, 14)


DIGIT_ASPECT = 0.79
"""Width of a digit over its height, as the font draws it."""


def random_number(
    rng: random.Random, size: tuple[int, int], digits: int, high: tuple[float, float], *, taken: Sequence[Box] = ()
) -> Thing | None:
    """A number without a leading zero, ``high`` its height's range in shares of ``unit``; None when it does not fit."""
    text = str(rng.randrange(10) if digits == 1 else rng.randrange(10 ** (digits - 1), 10**digits))
    colour = rng.choice([name for name in COLOURS if name not in ("yellow", "pink")])
    limit = 0.8 * min(size) / unit(*size)
    tall = rng.uniform(min(high[0], limit), min(high[1], limit))
    boxes = place(rng, size, [(tall * DIGIT_ASPECT * len(text), tall)], taken=taken)
    return None if boxes is None else Thing(NUMBER, colour, boxes[0], text, random_tint(rng))


def names(rng: random.Random, count: int, *, distinct: bool = False) -> list[tuple[str, str]]:
    """(kind, colour) pairs; ``distinct``: no kind and no colour twice."""
    if distinct:
        return list(zip(rng.sample(SHAPES, count), rng.sample(list(COLOURS), count), strict=True))
    return [(rng.choice(SHAPES), rng.choice(list(COLOURS))) for _ in range(count)]
