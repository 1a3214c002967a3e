from __future__ import annotations

import numpy as np
import pytest

from actors.ernie.positions import prompt_positions
from actors.types import Grid


def test_text_counts_up_on_all_axes() -> None:
    positions, following = prompt_positions(5, [], "original")
    assert positions.dtype == np.int32
    assert positions.tolist() == [[0, 1, 2, 3, 4]] * 3
    assert following == 5


def test_empty_prompt() -> None:
    positions, following = prompt_positions(0, [], "original")
    assert positions.shape == (3, 0)
    assert following == 0


@pytest.mark.parametrize("rule", ["original", "transformers"])
def test_image_worked_example(rule: str) -> None:
    """One image of 4 x 4 patches after one token."""
    positions, following = prompt_positions(7, [(1, Grid(1, 4, 4))], rule)  # type: ignore[arg-type]
    assert positions.tolist() == [[0, 1, 1, 1, 1, 3, 4], [0, 1, 1, 2, 2, 3, 4], [0, 1, 2, 1, 2, 3, 4]]
    assert following == 5


@pytest.mark.parametrize("rule", ["original", "transformers"])
def test_video_order_is_frame_pair_then_row_then_column(rule: str) -> None:
    positions, following = prompt_positions(9, [(0, Grid(4, 2, 4)), (5, Grid(1, 4, 2))], rule)  # type: ignore[arg-type]
    assert positions[:, :4].T.tolist() == [[0, 0, 0], [0, 0, 1], [1, 0, 0], [1, 0, 1]]
    assert positions[:, 4].tolist() == [2, 2, 2]
    assert positions[:, 5:7].T.tolist() == [[3, 3, 3], [3, 4, 3]]
    assert positions[:, 7].tolist() == [5, 5, 5]
    assert following == 7


def test_rules_differ_for_a_video_longer_than_it_is_wide() -> None:
    spans = [(2, Grid(10, 4, 2))]
    original, after_original = prompt_positions(15, spans, "original")
    other, after_other = prompt_positions(15, spans, "transformers")
    assert original[:, :12].tolist() == other[:, :12].tolist()
    assert original[0, 2:12].tolist() == [2, 2, 3, 3, 4, 4, 5, 5, 6, 6]
    assert original[:, 12:].tolist() == [[7, 8, 9]] * 3
    assert other[:, 12:].tolist() == [[4, 5, 6]] * 3
    assert after_original == 10
    assert after_other == 7


@pytest.mark.parametrize(("rule", "last"), [("original", 6), ("transformers", 3)])
def test_generation_follows_the_last_text_also_when_it_lags_behind_a_long_video(rule: str, last: int) -> None:
    """As transformers' ``generate`` does; its largest position here is 4."""
    positions, following = prompt_positions(12, [(0, Grid(10, 4, 2))], rule)  # type: ignore[arg-type]
    assert positions[:, -1].tolist() == [last] * 3
    assert following == last + 1


@pytest.mark.parametrize(
    "spans", [[(0, Grid(1, 4, 4)), (3, Grid(1, 2, 2))], [(6, Grid(1, 4, 4))], [(-1, Grid(1, 2, 2))]]
)
def test_spans_that_do_not_fit_are_refused(spans: list[tuple[int, Grid]]) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        prompt_positions(8, spans, "original")
