from __future__ import annotations

import pytest

from tests.unit.parallel.group_steps import refused_moves, steps_with_moves
from tests.unit.parallel.ranks import run_ranks, values


@pytest.mark.parametrize(("ranks", "rounds"), [(2, 14), (4, 14)])
def test_moving_experts_changes_no_output(ranks: int, rounds: int) -> None:
    found = values(run_ranks(ranks, steps_with_moves, rounds, 5))
    assert max(rank["worst"] for rank in found) < 1e-9
    assert all(rank["moved"] > rounds for rank in found)
    planned = [(before, after) for number, before, after in found[0]["skews"] if number % 2 == 0]
    assert all(new <= old + 1e-9 for before, after in planned for old, new in zip(before, after, strict=True))
    assert any(after != before for before, after in planned)


def test_a_rank_keeps_its_number_of_experts() -> None:
    assert all("keeps its number" in text for text in values(run_ranks(2, refused_moves)))
