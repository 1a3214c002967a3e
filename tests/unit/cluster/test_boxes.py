"""Boxes found in what models write."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.boxes import MAX_UNREADABLE, LabelledBox, find_boxes, read_box

CAT = LabelledBox((10, 20, 300, 400), "cat")
BARE = LabelledBox((10, 20, 300, 400))


CASES: list[tuple[str, list[LabelledBox]]] = [
    ('{"bbox_2d": [10, 20, 300, 400]}', [BARE]),
    ('{"bbox_2d": [10, 20, 300, 400], "label": "cat"}', [CAT]),
    (
        '[{"bbox_2d": [10, 20, 300, 400], "label": "cat"}, {"bbox_2d": [0, 0, 5, 5.5]}]',
        [CAT, LabelledBox((0, 0, 5, 5.5))],
    ),
    ('Here:\n```json\n[\n  {"label": "cat", "bbox_2d": [10, 20, 300, 400]}\n]\n```\nThat is it.', [CAT]),
    ('The cat {"name": "cat", "bbox": [10, 20, 300, 400]} sits [1], {sic}.', [CAT]),
    ('{"cat": [10, 20, 300, 400]}', [CAT]),
    ('{"cat": {"bbox_2d": [10, 20, 300, 400]}}', [CAT]),
    ('{"objects": [{"text_content": "cat", "box": [10, 20, 300, 400]}]}', [CAT]),
    ('{"label": "cat", "bbox_2d": [[10, 20, 300, 400], [1, 1, 2, 2]]}', [CAT, LabelledBox((1, 1, 2, 2), "cat")]),
    ("[[10, 20, 300, 400], [1, 1, 2, 2]]", [BARE, LabelledBox((1, 1, 2, 2))]),
    ("It is at [10, 20, 300, 400].", [BARE]),
    # Cut off by a bound on tokens.
    ('[{"bbox_2d": [10, 20, 300, 400], "label": "cat"}, {"bbox_2d": [10, 2', [CAT]),
    ('{"bbox_2d": [10, 20, 300, 400], "label": "ca', [BARE]),
    # Corners in the other order, and outside.
    ('{"bbox_2d": [300, 400, 10, 20], "label": "cat"}', [CAT]),
    ('{"bbox_2d": [-50, 20, 300, 4000]}', [LabelledBox((0, 20, 300, 1000))]),
    # No boxes.
    ("", []),
    ("no box", []),
    ('{"bbox_2d": [1, 2, 3]}', []),
    ('{"bbox_2d": [1, 2, 3, "4"]}', []),
    ('{"bbox_2d": [1, 2, 3, true]}', []),
    ('{"bbox_2d": [1, 2, 3, NaN]}', []),
    ('{"bbox_2d": [1, 2, 3, 1e999]}', []),
    ('{"bbox_2d": [5, 2, 5, 9]}', []),
    ('{"bbox_2d": [2000, 2, 3000, 9]}', []),
    ('{"bbox_2d": null}', []),
    ("[" * 5000, []),
    ("[" * (MAX_UNREADABLE - 1) + "[10, 20, 300, 400]", [BARE]),
    ("[" * MAX_UNREADABLE + "[10, 20, 300, 400]", []),
    ('{"a":' * 30 + "[1, 1, 2, 2]" + "}" * 30, []),
]


@pytest.mark.parametrize(("text", "boxes"), CASES)
def test_boxes_in_answers(text: str, boxes: list[LabelledBox]) -> None:
    assert find_boxes(text) == boxes


@given(st.text(alphabet='[]{}"bbox_2d:,0.5e- label\n', max_size=60))
def test_any_text_can_be_read(text: str) -> None:
    for box in find_boxes(text):
        x1, y1, x2, y2 = box.corners
        assert 0 <= x1 < x2 <= 1000 and 0 <= y1 < y2 <= 1000


@pytest.mark.parametrize(
    ("value", "corners"),
    [
        ({"bbox_2d": [500, 400, 740, 640]}, [500, 400, 740, 640]),
        ({"bbox_2d": [0.5, 400, 740, 640], "label": "x"}, [0.5, 400, 740, 640]),
        ({"box": [500, 400, 740, 640]}, None),
        ({"bbox_2d": [500, 400, 740, "640"]}, None),
        ({"bbox_2d": [500, 400, 740]}, None),
        ({"bbox_2d": [500, 400, 740, float("nan")]}, None),
        ({"bbox_2d": [500, 400, 740, 10**400]}, None),
        ([500, 400, 740, 640], None),
    ],
)
def test_the_one_form_that_is_scored(value: object, corners: list[float] | None) -> None:
    assert read_box(value) == corners
