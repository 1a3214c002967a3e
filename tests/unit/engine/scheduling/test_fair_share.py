"""Tables of how prompts share a step."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.engine.scheduling.fair_share import Want, share_budget


@pytest.mark.parametrize(
    ("budget", "wants", "grants"),
    [
        (100, [], []),
        (0, [(5, 5)], [0]),
        (-3, [(5, 5)], [0]),
        (100, [(300, 300)], [100]),
        (100, [(30, 30)], [30]),
        # A long prompt leaves room for a short one behind it, and takes what that does not need.
        (100, [(300, 300), (20, 20)], [80, 20]),
        # A short one does not hold a long one up.
        (100, [(20, 20), (300, 300)], [20, 80]),
        # Two long ones share in halves, the odd token for the first.
        (100, [(300, 300), (300, 300)], [50, 50]),
        (101, [(300, 300), (300, 300)], [51, 50]),
        (1, [(300, 300), (1, 1)], [1, 0]),
        # Among the others, the shortest go first, whatever their rank.
        (100, [(300, 300), (60, 60), (20, 20)], [50, 30, 20]),
        (100, [(300, 300), (60, 60), (60, 60)], [50, 50, 0]),
        # Short is what remains, not what is available just now.
        (100, [(300, 300), (10, 400), (45, 45)], [50, 5, 45]),
        # Those that cannot go on get nothing, and the next is first.
        (100, [(0, 300), (300, 300), (300, 300)], [0, 50, 50]),
        (100, [(-1, 1), (300, 300), (20, 20)], [0, 80, 20]),
        (100, [(300, 300), (0, 10), (-1, 1), (70, 70)], [50, 0, 0, 50]),
        (100, [(0, 10), (0, 20)], [0, 0]),
    ],
)
def test_table(budget: int, wants: list[tuple[int, int]], grants: list[int]) -> None:
    assert share_budget(budget, [Want(*want) for want in wants]) == grants


@given(
    budget=st.integers(0, 50),
    wants=st.lists(
        st.tuples(st.integers(-1, 30), st.integers(0, 30)).map(lambda w: Want(w[0], w[0] + w[1])), max_size=8
    ),
)
def test_nothing_is_wasted_or_exceeded(budget: int, wants: list[Want]) -> None:
    grants = share_budget(budget, wants)
    usable = [max(0, want.available) for want in wants]
    assert all(0 <= grant <= most for grant, most in zip(grants, usable, strict=True))
    assert sum(grants) == min(budget, sum(usable))
    first = next((number for number, most in enumerate(usable) if most), None)
    if first is not None:
        assert grants[first] >= min(usable[first], (budget + 1) // 2)
