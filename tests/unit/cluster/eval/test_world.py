"""What holds in every scene and clip of the world, over a few hundred random ones."""

from __future__ import annotations

import io
import itertools
import json
import random
from fractions import Fraction

import av
import numpy as np
import pytest

from actors.processing.sampling import Sampling, select_frames
from cluster.eval.world import clips
from cluster.eval.world.draw import draw_ground, draw_scene, fill
from cluster.eval.world.pairs import compare, pair
from cluster.eval.world.questions import BUILDERS, CLEAR_SIDE, Question, plural
from cluster.eval.world.scenes import SHARPEST, dense, scene, small_number
from cluster.eval.world.things import NEAR, NUMBER, Box, Scene, Thing
from cluster.eval.world.zoom import SCALE, where

NANO_SAMPLING = Sampling(frames_per_second=2.0, min_frames=4, max_frames=8)
CLIP_TASKS = ("moving", "direction", "event_time", "timestamp")


def rng(*parts: object) -> random.Random:
    return random.Random("/".join(map(str, ("world", *parts))))


def scenes() -> list[Scene]:
    made = [scene(rng(task, i), task) for task in BUILDERS for i in range(40)]
    made += [dense(rng("dense", i)) for i in range(40)]
    return made + [small_number(rng("small", i)) for i in range(40)]


def inside(box: Box) -> bool:
    return 0 <= box.x1 < box.x2 <= 1 and 0 <= box.y1 < box.y2 <= 1


def overlap(a: Box, b: Box) -> bool:
    return a.x1 < b.x2 and b.x1 < a.x2 and a.y1 < b.y2 and b.y1 < a.y2


def named(made: Scene, name: str) -> Thing:
    """The one thing a question calls so."""
    found = [t for t in made.things if name in (t.kind, t.name)]
    assert len(found) == 1, (name, made)
    return found[0]


def between(text: str, *ends: tuple[str, str]) -> str:
    """What stands between the first pair of ends that fits."""
    for before, after in ends:
        if text.startswith(before) and text.endswith(after):
            return text[len(before) : len(text) - len(after)]
    raise AssertionError(text)


def asked(task: str) -> list[tuple[Scene, Question]]:
    found = []
    for i in range(300):
        made = scene(rng("asked", task, i), task)
        found += [(made, question) for question in BUILDERS[task](made, rng("question", task, i))]
    assert len(found) > 150
    assert all(question.task == task for _, question in found)
    return found


def test_things_lie_inside_and_apart() -> None:
    for made in scenes():
        assert all(inside(thing.box) for thing in made.things)
        assert not any(overlap(a.box, b.box) for a, b in itertools.combinations(made.things, 2))


def test_things_are_drawn_inside_their_boxes_in_their_colours() -> None:
    for i in range(60):
        made = scene(rng("drawn", i), "digits" if i % 2 else "count")
        drawn = np.asarray(draw_scene(made)).astype(int)
        changed = (drawn != np.asarray(draw_ground(made.ground, made.width, made.height))).any(axis=2)
        for thing in made.things:
            rows = slice(max(0, int(thing.box.y1 * made.height) - 3), int(thing.box.y2 * made.height) + 4)
            columns = slice(max(0, int(thing.box.x1 * made.width) - 3), int(thing.box.x2 * made.width) + 4)
            assert (drawn[rows, columns] == fill(thing)).all(axis=2).sum() > 4
            changed[rows, columns] = False
        assert not changed.any()


def test_colours_and_shapes_asked_for_are_the_only_ones() -> None:
    for made, question in asked("colour"):
        kind = between(
            question.text,
            ("What colour is the ", "?"),
            ("What color is the ", "?"),
            ("Which colour does the ", " have?"),
        )
        assert [t.colour for t in made.shapes if t.kind == kind] == [question.answer]
    for made, question in asked("shape"):
        colour = between(question.text, ("What shape is ", "?"), ("Which shape is ", "?"), ("What is the ", " shape?"))
        assert [t.kind for t in made.shapes if t.colour == colour] == [question.answer]


def test_counts() -> None:
    for made, question in asked("count"):
        what = between(question.text, ("How many ", " are there?"), ("How many ", " do you see?"), ("Count the ", "."))
        fitting = [t for t in made.shapes if what in ("shapes", plural(t.kind), f"{t.colour} shapes")]
        assert question.answer == str(len(fitting)) and len(fitting) <= 5


def test_regions_are_clear() -> None:
    rows, columns = ("top", "middle", "bottom"), ("left", "middle", "right")
    for made, question in asked("region"):
        name = between(question.text, ("Where is the ", "?"), ("In which part of the picture is the ", "?"))
        x, y = named(made, name).box.centre
        assert all(abs(value - border) > NEAR for value in (x, y) for border in (1 / 3, 2 / 3))
        words = [rows[int(y * 3)], columns[int(x * 3)]]
        expected = "middle" if words == ["middle"] * 2 else " ".join(w for w in words if w != "middle")
        assert question.answer == expected


def test_numbers_asked_for_are_the_only_ones() -> None:
    for made, question in asked("digits"):
        assert [t.text for t in made.things if t.kind == NUMBER] == [question.answer]


def test_positions_are_clear() -> None:
    for made, question in asked("position"):
        axis, words = (0, ("left", "right")) if "left or right" in question.text else (1, ("above", "below"))
        middle = " left or right of the " if axis == 0 else " above or below the "
        first, second = between(question.text, ("Is the ", "?")).split(middle)
        a, b = (named(made, name).box.centre[axis] for name in (first, second))
        assert abs(a - b) > CLEAR_SIDE and question.answer == words[a > b]


def test_the_odd_one_is_the_only_one() -> None:
    for made, question in asked("odd"):
        names = [f"the {t.name}" for t in made.shapes]
        assert names.count(question.answer) == 1 and len(set(names)) == 2 and len(names) >= 3


def test_boxes_are_those_of_the_named() -> None:
    for made, question in asked("grounding"):
        name = between(
            question.text,
            ("Give the box of the ", " as JSON."),
            ("Give the bounding box of the ", "."),
            ("Box of the ", "?"),
        )
        box = named(made, name).box
        corners = [corner / 1000 for corner in json.loads(question.answer)["bbox_2d"]]
        assert corners == pytest.approx([box.x1, box.y1, box.x2, box.y2], abs=0.0051)


def test_pairs_differ_in_what_is_asked() -> None:
    for i in range(150):
        both = pair(rng("pair", i))
        questions = list(compare(both, rng("compare", i)))
        assert questions
        for question in questions:
            what = between(question.text, ("Which picture has more ", "?"))
            first, second = (
                sum(what in ("shapes", plural(t.kind), f"{t.colour} shapes") for t in one.shapes) for one in both
            )
            assert first != second and question.answer == f"Picture {1 if first > second else 2}"


def film(task: str, i: int) -> clips.Clip:
    return clips.clip(rng("clip", task, i), task)


@pytest.mark.parametrize("task", CLIP_TASKS)
def test_clips_are_sampled_as_the_processor_does(task: str) -> None:
    for i in range(150):
        made = film(task, i)
        seen = select_frames(made.frames, float(made.rate), NANO_SAMPLING)
        ours = made.sampled()
        assert seen == ours + ours[-1:] * (len(ours) % 2)


@pytest.mark.parametrize("task", CLIP_TASKS)
def test_things_of_clips_stay_inside_apart_and_below_the_time(task: str) -> None:
    for i in range(80):
        made = film(task, i)
        for frame in made.sampled():
            things = made.at(frame).things
            assert all(inside(t.box) and not overlap(t.box, clips.STAMP) for t in things)
            assert not any(overlap(a.box, b.box) for a, b in itertools.combinations(things, 2))


def test_what_moves_and_where() -> None:
    signs = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
    for i in range(80):
        made = film("moving", i)
        (x1, y1), (x2, y2) = (made.at(frame).things[0].box.centre for frame in (0, made.frames - 1))
        answers = {question.task: question.answer for question in made.questions(rng("q", i))}
        assert answers["moving"] == made.things[0].kind
        assert (round(np.sign(round(x2 - x1, 9))), round(np.sign(round(y2 - y1, 9)))) == signs[answers["direction"]]
        assert made.at(0).things[1:] == made.at(made.frames - 1).things[1:]


@pytest.mark.parametrize("task", ["event_time", "timestamp"])
def test_the_time_of_a_change_is_the_first_frame_that_shows_it(task: str) -> None:
    for i in range(80):
        made = film(task, i)
        (question,) = made.questions(rng("q", i))
        assert question.task == task
        colours = [made.at(frame).things[0].colour for frame in made.sampled()]
        first = next(k for k, colour in enumerate(colours) if colour != colours[0])
        assert len(set(colours[first:])) == 1 and f" {colours[first]}?" in question.text
        assert question.answer == f"{made.sampled()[first] / made.rate:.1f} s"
        # Half seconds come out in one decimal, and no two frames have the same time.
        times = [f"{frame / made.rate:.1f}" for frame in made.sampled()]
        assert len(set(times)) == len(times)


@pytest.mark.parametrize("task", ["moving", "timestamp"])
def test_files_of_clips_hold_their_frames(task: str) -> None:
    for i in range(3):
        made = film(task, i)
        with av.open(io.BytesIO(clips.encode(made))) as container:
            stream = container.streams.video[0]
            assert stream.average_rate == Fraction(made.rate)
            frames = [frame.to_image() for frame in container.decode(video=0)]
        assert len(frames) == made.frames
        last = next(iter(made.draw((made.frames - 1,)))).crop((0, 0, *frames[-1].size))
        assert np.abs(np.asarray(frames[-1]).astype(int) - np.asarray(last)).mean() < 8


def test_a_look_at_a_small_number_shows_it_whole() -> None:
    for i in range(150):
        made = small_number(rng("look", i))
        assert min(made.width, made.height) >= SHARPEST
        box, corners = made.numbers[0].box, where(made.numbers[0].box)
        assert all(0 <= corner <= SCALE for corner in corners)
        assert corners[0] <= 1000 * box.x1 and corners[1] <= 1000 * box.y1
        assert corners[2] >= 1000 * box.x2 and corners[3] >= 1000 * box.y2


def test_the_same_state_gives_the_same_world() -> None:
    assert [scene(rng(1), task) for task in BUILDERS] == [scene(rng(1), task) for task in BUILDERS]
    assert clips.encode(film("moving", 1)) == clips.encode(film("moving", 1))
