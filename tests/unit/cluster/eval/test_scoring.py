from __future__ import annotations

import json

import pytest

from cluster.eval.scoring import metric, score


def box(*corners: object) -> str:
    return json.dumps({"bbox_2d": corners})


TRUE_BOX = box(100, 100, 300, 300)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("red", 1.0), (" red\n", 1.0), ("Red", 0.0), ("red.", 0.0), ("", 0.0), ("a red circle", 0.0)],
)
def test_words_must_be_the_same(answer: str, expected: float) -> None:
    assert score("colour", answer, "red") == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (TRUE_BOX, 1.0),
        (f"\n{TRUE_BOX} ", 1.0),
        (box(100.0, 100, 300, 300), 1.0),
        (box(200, 100, 400, 300), 1 / 3),
        (box(100, 100, 300, 200), 0.5),
        (box(300, 300, 500, 500), 0.0),
        (box(300, 300, 100, 100), 0.0),
        (box(100, 100, 100, 300), 0.0),
    ],
)
def test_boxes_count_their_overlap(answer: str, expected: float) -> None:
    assert score("grounding", answer, TRUE_BOX) == pytest.approx(expected)


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "the middle",
        TRUE_BOX[:-1],
        f"Here: {TRUE_BOX}",
        "[100, 100, 300, 300]",
        '{"box": [100, 100, 300, 300]}',
        box(100, 100, 300),
        box(100, 100, 300, 300, 300),
        box(100, 100, 300, "300"),
        box(100, 100, 300, True),
        '{"bbox_2d": [100, 100, 300, NaN]}',
        '{"bbox_2d": [100, 100, 300, Infinity]}',
        '{"bbox_2d": [100, 100, 300, 1' + 400 * "0" + "]}",
        '{"bbox_2d": [100, 100, 300, 1' + 9000 * "0" + "]}",
        100_000 * "[",
        '{"bbox_2d": null}',
    ],
)
def test_unreadable_boxes_count_nothing(answer: str) -> None:
    assert score("grounding", answer, TRUE_BOX) == 0.0


def test_names_of_means() -> None:
    assert metric("grounding") == "iou" and metric("colour") == metric("zoom") == "accuracy"
