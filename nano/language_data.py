"""Conversations about random worlds, packed into rows."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from actors.processing.video import draw_timestamp
from cluster.eval.world.chat import SYSTEM_PROMPTS, absent, outside, small_talk, without_picture
from cluster.eval.world.clips import Clip, clip
from cluster.eval.world.draw import draw_scene
from cluster.eval.world.pairs import compare, in_either, pair
from cluster.eval.world.questions import BUILDERS, Question
from cluster.eval.world.scenes import LARGE_DIGITS, dense, scene, small_number
from cluster.eval.world.things import Scene, random_number
from cluster.eval.world.zoom import OFFER, SCALE, SIDE, call, where
from cluster.pictures import crop
from nano.files import FONT_PATH
from nano.frames import Frame, FrameBatch, Ints, batch_frames, frame, smaller, spoil
from nano.packing import ASSISTANT, BEGIN, NOT_THINKING, SEP, Answer, Media, Row, RowBatch, Segment, batch_rows
from nano.vision_data import ABOUT_THING, Targets, VisionBatch, stack, targets, things_of_tokens

LENGTH = 264
LATER_TURN = 0.12


@dataclass(frozen=True, kw_only=True, slots=True)
class Mix:
    """Shares of rows by what they are about, relative weights of the tasks their scenes are made for (a task without
    one is not asked about), and the share of replies that think."""

    kinds: Mapping[str, float]
    scenes: Mapping[str, float]
    clips: Mapping[str, float]
    thinking: float
    thought_weight: float = 4.0


FULL = Mix(
    kinds={"picture": 0.38, "clip": 0.17, "pair": 0.08, "zoom": 0.13, "late": 0.22, "chat": 0.02},
    scenes={
        "colour": 1.2,
        "shape": 1.5,
        "count": 3.0,
        "region": 0.8,
        "digits": 1.5,
        "position": 0.8,
        "odd": 0.8,
        "exist": 0.2,
        "describe": 0.8,
        "grounding": 1.0,
    },
    clips={"moving": 0.5, "direction": 0.8, "event_time": 1.4, "timestamp": 1.4},
    thinking=0.25,
)
FIRST = Mix(
    kinds={"picture": 0.8, "clip": 0.15, "chat": 0.05},
    scenes={"colour": 1.0, "shape": 1.0, "count": 1.0, "region": 0.5, "digits": 1.0, "exist": 0.5, "describe": 2.0},
    clips={"moving": 1.0, "direction": 1.0, "event_time": 1.0},
    thinking=0.0,
)
"""To begin with: until questions find their things, long answers only drown the short ones."""
SECOND = Mix(
    kinds={"picture": 0.65, "clip": 0.35},
    scenes={"colour": 0.3, "shape": 0.3, "count": 0.5, "region": 4.0, "digits": 3.0, "position": 1.0},
    clips={"moving": 0.6, "direction": 1.2, "event_time": 1.4, "timestamp": 0.8},
    thinking=0.0,
)
"""Then where things are, what numbers say, and when something happens."""
MIXES = {"first": FIRST, "second": SECOND, "full": FULL}
WEIGHTS = {"grounding": 12.0, "count": 8.0}
"""Of answers that are harder to learn than others."""


@dataclass(frozen=True, slots=True)
class Batch:
    vision: VisionBatch
    rows: RowBatch
    events: Ints
    """int [U, P / 4]: 1 or 2 where a thing changes in the first or the second frame of a unit."""
    things: Ints
    """int [U, P / 4, ABOUT_THING]: as ``things_of_tokens`` tells; -1 where nothing is known."""

    @property
    def frames(self) -> FrameBatch:
        return self.vision.frames


class Album:
    """Frames of a batch as they come up."""

    def __init__(self, rng: random.Random, mix: Mix = FULL) -> None:
        self.mix = mix
        self._rng = rng
        self._frames: list[Frame] = []
        self._pairs: list[tuple[int, int]] = []
        self._targets: list[tuple[Targets, Targets] | None] = []
        self._events: list[tuple[int, int, int]] = []
        self._things: dict[int, Ints] = {}

    def picture(self, image: Image.Image, made: Scene | None = None, *, legible: bool = True) -> Media:
        """``made``: what is in it, if it is known; ``legible``: whether one can read its numbers."""
        item = frame(spoil(image, self._rng))
        if made is not None:
            self._things[len(self._pairs)] = things_of_tokens(made, item.grid)
        self._pairs.append((len(self._frames), len(self._frames)))
        self._frames.append(item)
        seen = targets(made, item.grid) if made is not None and legible else None
        self._targets.append(None if seen is None else (seen, seen))
        return Media((len(self._pairs) - 1,), item.grid)

    def scene(self, made: Scene) -> Media:
        made = smaller(made, self._rng)
        return self.picture(draw_scene(made), made)

    def clip(self, film: Clip) -> Media:
        """The frames the server would take, with their times; the last of an odd count is repeated."""
        first, times = len(self._pairs), film.sampled()
        items = []
        for index, image in zip(times, film.draw(times), strict=True):
            draw_timestamp(image, index / film.rate, FONT_PATH)
            item = frame(image)
            items.append((item, targets(film.at(index), item.grid, index / film.rate)))
        if film.change is not None:
            rows, columns = items[0][0].grid
            x, y = film.things[0].box.centre
            k = film.first_sample_after_change()
            self._events.append((first + k // 2, int(y * rows) * columns + int(x * columns), 1 + k % 2))
        items += items[-1:] if len(items) % 2 else []
        for i in range(0, len(items), 2):
            (one, seen), (two, seen_later) = items[i : i + 2]
            self._pairs.append((len(self._frames), len(self._frames) + 1))
            self._frames += [one, two]
            self._targets.append((seen, seen_later))
        return Media(tuple(range(first, len(self._pairs))), items[0][0].grid, video=True)

    def batch(self, rows: list[Row]) -> Batch:
        """Everything of rows whose pictures and clips are these."""
        frames = batch_frames(self._frames, self._pairs)
        vision = VisionBatch(frames, *stack(self._targets, frames))
        tokens = frames.tokens
        return Batch(vision, batch_rows(rows, tokens), self._event_map(tokens), self._thing_map(tokens))

    def _event_map(self, tokens: int) -> Ints:
        found = np.zeros((len(self._pairs), tokens), dtype=np.int64)
        for unit, token, kind in self._events:
            found[unit, token] = kind
        return found

    def _thing_map(self, tokens: int) -> Ints:
        found = np.full((len(self._pairs), tokens, ABOUT_THING), -1, dtype=np.int64)
        for unit, things in self._things.items():
            found[unit, : len(things)] = things
        return found


def language_batch(rng: random.Random, rows: int, mix: Mix = FULL) -> Batch:
    album = Album(rng, mix)
    made = []
    for _ in range(rows):
        kind = _choose(rng, mix.kinds)
        made.append(MAKERS[kind](rng, album))
    return album.batch(made)


def _opening(rng: random.Random, *, tools: bool = False) -> str:
    # Tools leave little room in a row.
    prompt = rng.choice(SYSTEM_PROMPTS) if rng.random() < (0 if tools else 0.15) else None
    listed = OFFER if tools else ""
    # As the chat template renders a system message and tools.
    head = f"{prompt or ''}{listed}\n" if prompt or tools else ""
    return f"{BEGIN}{head}User: "


def _choose(rng: random.Random, weights: Mapping[str, float]) -> str:
    return rng.choices(list(weights), list(weights.values()))[0]


def _reply(question: Question, rng: random.Random, mix: Mix) -> list[Segment]:
    """The assistant's turn up to its end."""
    weight = WEIGHTS.get(question.task, mix.thought_weight)
    if question.thought and rng.random() < mix.thinking:
        return [
            f"{ASSISTANT}<think>",
            Answer(f"\n{question.thought}\n</think>\n\n{question.answer}", weight, f"{question.task}+"),
        ]
    return [f"{ASSISTANT}{NOT_THINKING}", Answer(question.answer, weight, question.task)]


def _fill(row: Row, questions: Sequence[Question], rng: random.Random, mix: Mix) -> None:
    """Adds branches until the row is full: one question each, now and then after an earlier one."""
    for question in questions:
        before = ""
        if rng.random() < LATER_TURN:
            earlier = rng.choice(questions)
            before = f"{earlier.text}{ASSISTANT}{earlier.answer}{SEP}User: "
        if not row.add([f"{before}{question.text}", *_reply(question, rng, mix)]):
            return


MOST = {"digits": 4, "region": 3, "position": 2, "count": 4}
"""Questions of a task about one picture; one of every other."""


def about(made: Scene, rng: random.Random, mix: Mix, task: str | None = None) -> list[Question]:
    """Questions on a picture in random order, those of ``task`` first."""
    found = [q for name, build in BUILDERS.items() if name in mix.scenes for q in build(made, rng)]
    if "digits" in mix.scenes:
        found += BUILDERS["digits"](made, rng)
    missing = absent(made, rng)
    if missing is not None and rng.random() < 0.3:
        found.append(missing)
    rng.shuffle(found)
    seen: dict[str, int] = {}
    kept = []
    for question in found:
        seen[question.task] = seen.get(question.task, 0) + 1
        if seen[question.task] <= MOST.get(question.task, 1):
            kept.append(question)
    return sorted(kept, key=lambda q: q.task not in (task, "digits"))


def with_numbers(made: Scene, rng: random.Random) -> Scene:
    """Two in three scenes get numbers, of other colours, as far as there is room: reading takes the most practice."""
    things, size = made.things, (made.width, made.height)
    for _ in range(rng.choice((0, 1, 2))):
        number = random_number(rng, size, rng.choice((1, 2, 2)), LARGE_DIGITS, taken=[t.box for t in things])
        if number is not None and number.colour not in {t.colour for t in things if t.text}:
            things = (*things, number)
    return dataclasses.replace(made, things=things)


def _picture(rng: random.Random, album: Album) -> Row:
    task = _choose(rng, album.mix.scenes)
    made = dense(rng) if rng.random() < 0.08 else with_numbers(scene(rng, task), rng)
    row = Row.begin(LENGTH, [f"{_opening(rng)}Picture 1:", album.scene(made)])
    _fill(row, about(made, rng, album.mix, task), rng, album.mix)
    return row


def _clip(rng: random.Random, album: Album) -> Row:
    film = smaller(clip(rng, _choose(rng, album.mix.clips)), rng)
    row = Row.begin(LENGTH, [f"{_opening(rng)}Video 1:", album.clip(film)])
    still = Scene(film.width, film.height, film.ground, film.things if film.change is None else film.things[1:])
    if film.change is None:
        others = [q for task in ("colour", "shape", "exist") for q in BUILDERS[task](still, rng) if q.answer != "no"]
    else:
        # What is true of the colours it has at first need not be true at the end.
        others = [*BUILDERS["colour"](still, rng), *BUILDERS["shape"](still, rng)]
        others = [q for q in others if q.task != "shape" or film.change.colour not in q.text]
    rng.shuffle(others)
    asked = [question for _ in range(4) for question in film.questions(rng)]
    _fill(row, [*asked, *others[:2]], rng, album.mix)
    return row


def _pair(rng: random.Random, album: Album) -> Row:
    both = pair(rng)
    first, second = (album.scene(s) for s in both)
    row = Row.begin(LENGTH, [f"{_opening(rng)}Picture 1:", first, "Picture 2:", second])
    others = list(in_either(both, rng))
    rng.shuffle(others)
    questions = [*list(compare(both, rng))[:6], *others[:4]]
    rng.shuffle(questions)
    _fill(row, questions, rng, album.mix)
    return row


def _zoom(rng: random.Random, album: Album) -> Row:
    """With the tool on offer: used where the number is small, not where it can be read."""
    if rng.random() < 0.35:
        made = scene(rng, "digits")
        row = Row.begin(LENGTH, [f"{_opening(rng, tools=True)}Picture 1:", album.scene(made)])
        _fill(row, about(made, rng, album.mix, "digits")[:4], rng, album.mix)
        return row
    made = small_number(rng)
    image = draw_scene(made)
    number = made.numbers[0]
    corners = where(number.box)
    question = next(iter(BUILDERS["digits"](made, rng)))
    row = Row.begin(LENGTH, [f"{_opening(rng, tools=True)}Picture 1:", album.picture(image, made, legible=False)])
    # A row has room for the call or for what follows it.
    if rng.random() < 0.55:
        row.add([f"{question.text}{ASSISTANT}{NOT_THINKING}", Answer(call(corners), 14.0, "zoom call")])
        return row
    looked = [max(0, min(SCALE - SIDE, c + rng.choice((-40, -20, 0, 20, 40)))) for c in corners[:2]]
    looked += [c + SIDE for c in looked]
    history = f"{question.text}{ASSISTANT}{call(looked)}\n{SEP}User: \n<tool_output>\nPicture 2:"
    after = f"\n</tool_output>\n{ASSISTANT}{NOT_THINKING}"
    if not row.add([history, album.picture(crop(image, looked)), after, Answer(number.text, 8.0, "zoom")]):
        raise ValueError(f"a row of {LENGTH} tokens has no room for a closer look")
    return row


LATE_SCENES = {"colour": 9.0}
"""Weights of their own: which shape was asked about is the hardest to keep in mind past a picture."""


def _late(rng: random.Random, album: Album) -> Row:
    """Questions before their pictures, each with one of its own."""
    row = Row.begin(LENGTH, [_opening(rng)])
    for _ in range(3):
        task = _choose(rng, {**album.mix.scenes, **LATE_SCENES})
        made = scene(rng, task)
        question = about(made, rng, album.mix, task)[0]
        row.add([f"{question.text}Picture 1:", album.scene(made), *_reply(question, rng, album.mix)])
    return row


def _chat(rng: random.Random, album: Album) -> Row:
    if rng.random() < 0.4:
        made = scene(rng, "colour")
        row = Row.begin(LENGTH, [f"{_opening(rng)}Picture 1:", album.scene(made)])
        questions = [
            *(outside(rng) for _ in range(4)),
            *(small_talk(rng) for _ in range(3)),
            *about(made, rng, album.mix)[:2],
        ]
    else:
        row = Row.begin(LENGTH, [_opening(rng)])
        questions = [rng.choice((small_talk, outside, without_picture))(rng) for _ in range(10)]
    rng.shuffle(questions)
    _fill(row, questions, rng, album.mix)
    return row


MAKERS: dict[str, Callable[[random.Random, Album], Row]] = {
    "picture": _picture,
    "clip": _clip,
    "pair": _pair,
    "zoom": _zoom,
    "late": _late,
    "chat": _chat,
}
"""What makes a row of each kind."""
