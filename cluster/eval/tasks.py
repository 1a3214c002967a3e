"""Samples of every task, each from its own seed, with the answer that is right."""

from __future__ import annotations

import functools
import io
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from PIL import Image

from cluster.eval.world import clips
from cluster.eval.world.draw import draw_scene
from cluster.eval.world.pairs import compare, pair
from cluster.eval.world.questions import BUILDERS, Question
from cluster.eval.world.scenes import scene, small_number
from cluster.eval.world.seeds import EVALUATION_SEEDS

QUESTION_FIRST = 0.1
"""Share of the samples of one picture that ask before they show it."""
JPEG = 0.2
"""Share of pictures that are JPEG files; the others are PNG."""
JPEG_QUALITY = 90


@dataclass(frozen=True, slots=True)
class Sample:
    """A question about encoded pictures (PNG or JPEG) and videos (mp4), and its one right answer."""

    text: str
    answer: str
    images: tuple[bytes, ...] = ()
    videos: tuple[bytes, ...] = ()
    thinking: bool = False
    question_first: bool = False


def sample(task: str, seed: int, index: int) -> Sample:
    """One sample of a task; the same arguments give the same sample.

    Raises:
        ValueError: there is no such task, or ``seed`` is not kept for evaluation.
    """
    check_seed(seed)
    if task not in _MAKERS:
        raise ValueError(f"no task {task!r}: {', '.join(TASKS)}")
    return _MAKERS[task](random.Random(f"evaluation/{seed}/{task}/{index}"))


def samples(task: str, seed: int, count: int) -> Iterator[Sample]:
    """The first ``count`` samples of a task. Raises ValueError as ``sample`` does."""
    return (sample(task, seed, index) for index in range(count))


def check_seed(seed: int) -> None:
    """Raises ValueError for a seed that is not kept for evaluation."""
    if seed not in EVALUATION_SEEDS:
        raise ValueError(f"seed {seed} is not from {EVALUATION_SEEDS[0]} to {EVALUATION_SEEDS[-1]}")


def _about_picture(task: str, rng: random.Random, *, thinking: bool = False) -> Sample:
    while True:
        made = scene(rng, task)
        question = _any_of(BUILDERS[task](made, rng), rng)
        if question is not None:
            break
    return Sample(
        question.text,
        question.answer,
        images=(_file(draw_scene(made), rng),),
        thinking=thinking,
        question_first=rng.random() < QUESTION_FIRST,
    )


def _about_clip(task: str, rng: random.Random) -> Sample:
    while True:
        made = clips.clip(rng, task)
        question = _any_of((q for q in made.questions(rng) if q.task == task), rng)
        if question is not None:
            return Sample(question.text, question.answer, videos=(clips.encode(made),))


def _compare(rng: random.Random) -> Sample:
    while True:
        both = pair(rng)
        question = _any_of(compare(both, rng), rng)
        if question is not None:
            files = tuple(_file(draw_scene(made), rng) for made in both)
            return Sample(question.text, question.answer, images=files, thinking=True)


def _zoom(rng: random.Random) -> Sample:
    while True:
        made = small_number(rng)
        question = _any_of(BUILDERS["digits"](made, rng), rng)
        if question is not None:
            return Sample(question.text, question.answer, images=(_file(draw_scene(made), rng),))


def _any_of(questions: Iterable[Question], rng: random.Random) -> Question | None:
    found = list(questions)
    rng.shuffle(found)
    return found[0] if found else None


def _file(image: Image.Image, rng: random.Random) -> bytes:
    buffer = io.BytesIO()
    if rng.random() < JPEG:
        image.save(buffer, "JPEG", quality=JPEG_QUALITY)
    else:
        image.save(buffer, "PNG")
    return buffer.getvalue()


_MAKERS: dict[str, Callable[[random.Random], Sample]] = {
    "colour": functools.partial(_about_picture, "colour"),
    "shape": functools.partial(_about_picture, "shape"),
    "count": functools.partial(_about_picture, "count"),
    "region": functools.partial(_about_picture, "region"),
    "digits": functools.partial(_about_picture, "digits"),
    "moving": functools.partial(_about_clip, "moving"),
    "direction": functools.partial(_about_clip, "direction"),
    "event_time": functools.partial(_about_clip, "event_time"),
    "position": functools.partial(_about_picture, "position", thinking=True),
    "compare": _compare,
    "timestamp": functools.partial(_about_clip, "timestamp"),
    "grounding": functools.partial(_about_picture, "grounding"),
    "zoom": _zoom,
}
TASKS = tuple(_MAKERS)
"""All tasks, in the order of a report. In position and compare the model may think before it answers."""
