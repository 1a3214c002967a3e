"""Short clips: a shape that moves, or one that changes its colour at a time that can be read off the frames."""

from __future__ import annotations

import dataclasses
import io
import random
from collections.abc import Iterator
from dataclasses import dataclass

import av
from PIL import Image

from cluster.eval.world.draw import draw_ground, draw_things
from cluster.eval.world.questions import Question, at
from cluster.eval.world.things import (
    COLOURS,
    Box,
    Ground,
    Scene,
    Thing,
    names,
    place,
    random_ground,
    random_size,
    random_tint,
    shape_side,
    unit,
)

CLIP_SIZES = ((320, 240), (240, 320), (256, 256), (224, 224), (320, 180), (448, 336), (360, 360), (180, 320))
RATES = (4, 6, 8, 10)
"""Frames per second of a file. All divide a half second."""
SAMPLES_PER_SECOND, MOST = 2, 8
"""How the model's video processor samples; the clips' times are made to fit."""
STAMP = Box(0.0, 0.0, 1.0, 0.15)
"""Where the processor draws the time: nothing else lies there."""
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}


@dataclass(frozen=True, slots=True)
class Move:
    """A thing that moves evenly from its box by (dx, dy) over the whole clip, and the word for it."""

    dx: float
    dy: float
    word: str


@dataclass(frozen=True, slots=True)
class Change:
    """A thing that has another colour from a frame on."""

    frame: int
    colour: str
    tint: tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Clip:
    """``things[0]`` does what ``move`` or ``change`` says, the others stay."""

    width: int
    height: int
    rate: int
    frames: int
    ground: Ground
    things: tuple[Thing, ...]
    move: Move | None = None
    change: Change | None = None

    @property
    def seconds(self) -> float:
        return self.frames / self.rate

    def sampled(self) -> tuple[int, ...]:
        """The frames the model sees: every half second, or eight evenly spread over a longer clip."""
        wanted = int(self.seconds * SAMPLES_PER_SECOND)
        if wanted <= MOST:
            step = self.rate // SAMPLES_PER_SECOND
            return tuple(range(0, self.frames, step))
        return tuple(i * self.frames // MOST for i in range(MOST))

    def at(self, frame: int) -> Scene:
        actor, *others = self.things
        if self.move is not None:
            share = frame / max(1, self.frames - 1)
            actor = dataclasses.replace(actor, box=actor.box.shifted(self.move.dx * share, self.move.dy * share))
        if self.change is not None and frame >= self.change.frame:
            actor = dataclasses.replace(actor, colour=self.change.colour, tint=self.change.tint)
        return Scene(self.width, self.height, self.ground, (actor, *others))

    def draw(self, frames: Iterator[int] | range | tuple[int, ...]) -> Iterator[Image.Image]:
        ground = draw_ground(self.ground, self.width, self.height)
        for frame in frames:
            image = ground.copy()
            draw_things(image, self.at(frame).things)
            yield image

    def questions(self, rng: random.Random) -> Iterator[Question]:
        """What can be asked about the clip."""
        actor = self.things[0]
        if self.move is not None:
            end = dataclasses.replace(actor, box=actor.box.shifted(self.move.dx, self.move.dy))
            thought = f"The {actor.kind} is at {at(actor)} and later at {at(end)}."
            yield Question(
                "moving",
                rng.choice(("Which shape moves?", "What moves?", "Which shape is moving?")),
                actor.kind,
                thought,
            )
            text = rng.choice(
                (
                    f"Which way does the {actor.kind} move?",
                    f"In which direction does the {actor.kind} move?",
                    "Which way does it move?",
                )
            )
            yield Question("direction", text, self.move.word, thought)
        if self.change is not None:
            text = rng.choice(
                (
                    f"When does the {actor.kind} turn {self.change.colour}?",
                    f"When does the {actor.kind} become {self.change.colour}?",
                )
            )
            before, after = self.times_around()
            thought = f"It is {actor.colour} at {before} and {self.change.colour} at {after}."
            yield Question("event_time" if self.seconds < 5 else "timestamp", text, after, thought)

    def first_sample_after_change(self) -> int:
        """Index into ``sampled()``. Raises ValueError where nothing changes."""
        if self.change is None:
            raise ValueError("nothing changes in this clip")
        frame = self.change.frame
        return next(i for i, sampled in enumerate(self.sampled()) if sampled >= frame)

    def times_around(self) -> tuple[str, str]:
        """The last time at which the old colour is seen, and the first at which the new one is."""
        frames, k = self.sampled(), self.first_sample_after_change()
        return seconds(frames[k - 1] / self.rate), seconds(frames[k] / self.rate)


def seconds(value: float) -> str:
    return f"{value:.1f} s"


def clip(rng: random.Random, task: str) -> Clip:
    """A clip in which ``task`` (moving, direction, event_time or timestamp) has an answer."""
    while True:
        size = rng.choice(CLIP_SIZES) if rng.random() < 0.8 else random_size(rng)
        made = _clip(rng, task, size)
        if made is not None:
            return made


def _clip(rng: random.Random, task: str, size: tuple[int, int]) -> Clip | None:
    rate = rng.choice(RATES)
    frames = round(rate * (rng.choice((8, 12, 16)) if task == "timestamp" else rng.choice((2, 2.5, 3, 3.5, 4, 4, 4))))
    count = rng.choice((1, 2, 2, 3))
    chosen = names(rng, count, distinct=True)
    sides = [shape_side(rng, size, count + 1) for _ in chosen]
    side = unit(*size)
    move, dx, dy, word = None, 0.0, 0.0, ""
    if task in ("moving", "direction"):
        word = rng.choice(list(DIRECTIONS))
        reach = rng.uniform(0.3, 0.6)
        dx, dy = DIRECTIONS[word][0] * reach, DIRECTIONS[word][1] * reach
        move = Move(dx, dy, word)
    swept = (sides[0] + abs(dx) * size[0] / side, sides[0] + abs(dy) * size[1] / side)
    boxes = place(rng, size, [swept, *((s, s) for s in sides[1:])], taken=[STAMP], gap=0.02)
    if boxes is None:
        return None
    path = boxes[0]
    w, h = sides[0] * side / size[0], sides[0] * side / size[1]
    x = path.x2 - w if dx < 0 else path.x1
    y = path.y2 - h if dy < 0 else path.y1
    boxes[0] = Box(x, y, x + w, y + h)
    things = tuple(
        Thing(kind, colour, box, tint=random_tint(rng)) for (kind, colour), box in zip(chosen, boxes, strict=True)
    )
    made = Clip(*size, rate, frames, random_ground(rng), things, move)
    if move is None:
        samples = made.sampled()
        k = rng.randrange(1, len(samples))
        colour = rng.choice([c for c in COLOURS if c not in {t.colour for t in things}])
        made = dataclasses.replace(
            made, change=Change(rng.randint(samples[k - 1] + 1, samples[k]), colour, random_tint(rng))
        )
    return made


def encode(clip: Clip) -> bytes:
    """The clip as an mp4 file (H.264, sides cut to even numbers)."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        # For the same bytes every time: macroblock trees read memory nobody set, and threads differ by machine.
        options = {"crf": "16", "preset": "veryfast", "mbtree": "0", "threads": "1"}
        stream = container.add_stream("libx264", rate=clip.rate, options=options)
        stream.width, stream.height, stream.pix_fmt = clip.width // 2 * 2, clip.height // 2 * 2, "yuv420p"
        for image in clip.draw(range(clip.frames)):
            cut = image.crop((0, 0, stream.width, stream.height))
            frame = av.VideoFrame.from_image(cut)  # type: ignore[no-untyped-call]
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()
