from __future__ import annotations

import pytest

from actors.parallel.world import WorldConfig
from tests.unit.parallel.group_steps import ALL_KINDS, one_rank_fails, other_forms, random_steps, wrong_plans
from tests.unit.parallel.ranks import run_ranks, values


@pytest.mark.parametrize(("ranks", "steps"), [(2, 200), (4, 150), (8, 30)])
def test_random_steps_equal_one_rank_that_holds_all_experts(ranks: int, steps: int) -> None:
    found = values(run_ranks(ranks, random_steps, steps, 17 + ranks))
    assert max(rank["worst"] for rank in found) < 1e-9
    assert all(rank["seen"] == ALL_KINDS for rank in found)


def test_static_shapes_and_bfloat16_keep_their_distance() -> None:
    """In bfloat16 a rounded score may tip an expert, so that only the mean is near."""
    for found in values(run_ranks(2, other_forms, 12)):
        assert len(found["static"]) > 3 and max(found["static"]) < 1e-5
        assert len(found["bfloat16"]) > 3 and sum(found["bfloat16"]) / len(found["bfloat16"]) < 0.1


def test_wrong_plans_are_noticed() -> None:
    """Expert 9 is a vision expert of rank 0."""
    first, second = values(run_ranks(2, wrong_plans))
    assert first[0] == second[0] == "3 tokens on a rank in a step whose plan tells at most 2"
    assert (first[1], second[1]) == ("vision tokens need the vision expert bank", "computed")


@pytest.mark.parametrize("form", [0, 1], ids=["all_to_all", "fixed_shape"])
def test_a_dead_rank_breaks_the_others_at_once(form: int) -> None:
    """Long before the limit of a collective, which the harness does not outlast."""
    config = WorldConfig(join_timeout_s=120, collective_timeout_s=3600)
    first, dead, third = run_ranks(3, one_rank_fails, form, "dies", 2, config=config)
    assert dead.exit_code == 3
    for rank, outcome in ((0, first), (2, third)):
        error = outcome.world_error
        assert error is not None, outcome
        assert not error["timed_out"] and 1 in error["silent"]
        assert (error["rank"], error["step"], error["layer"]) == (rank, 2, 1)
        assert error["text"].startswith(f"rank {rank} of 3, step 2, layer 1, dispatch"), error["text"]


@pytest.mark.parametrize("form", [0, 1], ids=["all_to_all", "fixed_shape"])
def test_a_rank_that_stands_still_is_an_error_that_names_the_place(form: int) -> None:
    config = WorldConfig(join_timeout_s=120, collective_timeout_s=5)
    (outcome,) = run_ranks(2, one_rank_fails, form, "stands still", 1, config=config, ranks=[0])
    error = outcome.world_error
    assert error is not None, outcome
    assert error["timed_out"]
    assert (error["rank"], error["step"], error["layer"], error["silent"]) == (0, 1, 1, (1,))
    assert error["text"].endswith("(no word from rank 1)")
