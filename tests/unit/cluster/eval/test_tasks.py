"""Samples: repeatable, answerable, of the sizes and files that are promised."""

from __future__ import annotations

import io
import re
from collections import Counter

import av
import pytest
from PIL import Image

from cluster.eval.scoring import score
from cluster.eval.tasks import TASKS, Sample, sample, samples
from cluster.eval.world.questions import BUILDERS
from cluster.eval.world.seeds import EVALUATION_SEEDS
from cluster.eval.world.things import COLOURS, SHAPES

COUNT = 12
CLIPS = ("moving", "direction", "event_time", "timestamp")
ANSWERS = {
    "colour": "|".join(COLOURS),
    "shape": "|".join(SHAPES),
    "count": "[0-5]",
    "region": "(top|bottom)( left| right)?|left|right|middle",
    "digits": r"\d|[1-9]\d",
    "moving": "|".join(SHAPES),
    "direction": "left|right|up|down",
    "event_time": r"\d\.\d s",
    "position": "left|right|above|below",
    "compare": "Picture [12]",
    "timestamp": r"\d+\.\d s",
    "grounding": r'\{"bbox_2d": \[\d+, \d+, \d+, \d+\]\}',
    "zoom": r"\d|[1-9]\d",
}


def many(task: str, seed: int = 5) -> list[Sample]:
    return list(samples(task, seed, COUNT))


def test_tasks_are_reported_in_this_order() -> None:
    assert TASKS == tuple(ANSWERS)


@pytest.mark.parametrize("task", TASKS)
def test_a_seed_gives_its_own_samples_again(task: str) -> None:
    made = many(task)
    assert made == many(task)
    assert made[7] == sample(task, 5, 7)
    media = [s.images + s.videos for s in made]
    assert len(set(media)) == COUNT
    assert not set(media) & {s.images + s.videos for s in many(task, seed=6)}


@pytest.mark.parametrize("task", TASKS)
def test_the_right_answer_scores_one_and_has_the_form_of_the_task(task: str) -> None:
    for made in many(task):
        assert re.fullmatch(ANSWERS[task], made.answer)
        assert score(task, made.answer, made.answer) == 1.0
        assert score(task, f" {made.answer}\n", made.answer) == 1.0
        assert score(task, "", made.answer) == 0.0
        assert made.text and made.thinking == (task in ("position", "compare"))


@pytest.mark.parametrize("task", TASKS)
def test_media_are_files_of_the_promised_kinds(task: str) -> None:
    made = many(task)
    for one in made:
        assert (len(one.images), len(one.videos)) == ((0, 1) if task in CLIPS else (1 + (task == "compare"), 0))
        for file in one.videos:
            with av.open(io.BytesIO(file)) as container:
                assert sum(1 for _ in container.decode(video=0)) >= 8
    formats = {Image.open(io.BytesIO(file)).format for one in made for file in one.images}
    assert formats <= {"PNG", "JPEG"}


def test_shares_of_files_sizes_and_orders() -> None:
    made = [one for task in ("colour", "count") for one in samples(task, 9, 150)]
    pictures = [Image.open(io.BytesIO(one.images[0])) for one in made]
    formats = Counter(picture.format for picture in pictures)
    assert 0.1 < formats["JPEG"] / len(made) < 0.3
    assert 0.03 < sum(one.question_first for one in made) / len(made) < 0.2
    assert len({picture.size for picture in pictures}) > 20
    assert not any(one.question_first for task in ("compare", "zoom", "moving") for one in many(task))


def test_each_task_asks_its_own_questions() -> None:
    first_words = {task: {one.text.split(" ")[0] for one in many(task)} for task in TASKS}
    assert first_words["count"] <= {"How", "Count"}
    assert first_words["timestamp"] == first_words["event_time"] == {"When"}
    assert first_words["position"] == {"Is"} and "position" in BUILDERS


@pytest.mark.parametrize("seed", [-1, EVALUATION_SEEDS.stop])
def test_seeds_of_training_are_refused(seed: int) -> None:
    with pytest.raises(ValueError, match=f"seed {seed} is not from 0 to 1048575"):
        sample("colour", seed, 0)
    with pytest.raises(ValueError, match="seed"):
        next(samples("colour", seed, 1))


def test_unknown_tasks_are_refused() -> None:
    with pytest.raises(ValueError, match="no task 'colours': colour, shape"):
        sample("colours", 0, 0)
