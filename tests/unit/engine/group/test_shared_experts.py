"""In float64 a reply does not depend on how many ranks share the experts, nor on which rank holds which, nor when."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest

from actors.engine.execution.runner import Runner
from actors.engine.group.balance import BalanceConfig, moved_experts
from actors.parallel.layout import ExpertLayout, ExpertPlacement
from actors.types import TokenLogprobs
from tests.unit.engine.engine_requests import Wanted, chats, key, media_request, request
from tests.unit.engine.group.rank_group import WatchedGroup
from tests.unit.engine.group.shared_experts import ALL_KINDS, KindsSeen, SharingGroup
from tests.unit.engine.group.test_group_engine import structured_model
from tests.unit.engine.harness import Rig
from tests.unit.engine.test_constrained_engine import own, some_of_each
from tests.unit.engine.test_constrained_engine import rig as constrained_rig


@pytest.fixture(scope="module", params=[2, 4])
def group(request: pytest.FixtureRequest) -> Iterator[SharingGroup]:
    with SharingGroup(request.param) as group:
        yield group
    assert {process.exitcode for process in group.processes.values()} == {0}


@pytest.fixture(scope="module")
def one_rank() -> list[list[int]]:
    with Rig(blocks=400, max_num_seqs=32) as rig:
        return rig.run(*chats())


def shared(group: SharingGroup, join: Any = None, **options: Any) -> Rig:
    return Rig(group.model, blocks=400, group=join or group.join, **options)


def seen(rig: Rig) -> KindsSeen:
    assert isinstance(rig.group, KindsSeen)
    return rig.group


@pytest.mark.parametrize(
    "options",
    [{"max_num_seqs": 32}, {"max_num_seqs": 3, "max_batched_tokens": 5}],
)
def test_shared_experts_give_the_same_tokens(
    group: SharingGroup, options: dict[str, Any], one_rank: list[list[int]]
) -> None:
    ranks = len(group.processes) + 1
    assert all(len(held) * ranks == 8 for held in group.model.expert_rows().values())
    with shared(group, **options) as rig:
        assert rig.run(*chats()) == one_rank
        assert seen(rig).lived_on == set(range(ranks))
        if "max_batched_tokens" in options:
            assert seen(rig).kinds == ALL_KINDS


def test_experts_that_move_all_the_time_change_no_token(group: SharingGroup, one_rank: list[list[int]]) -> None:
    before = group.experts.group.placement
    with shared(group, group.rebalanced, max_num_seqs=6, max_batched_tokens=16) as rig:
        assert rig.run(*chats()) == one_rank
        counters = rig.group.counters.balance
        assert counters is not None
        assert counters.loads > 5 and counters.moves > 2 and counters.moved_experts > 8 and counters.move_s > 0
        assert 1 < counters.text_skew < 8 and 1 <= counters.vision_skew < 8
    assert group.experts.group.placement != before
    with shared(group, max_num_seqs=32) as rig:
        assert rig.run(*chats()) == one_rank


def test_preemption_on_ranks_that_share_changes_nothing(group: SharingGroup) -> None:
    some = chats()[20:28]
    wanted: list[Wanted] = [
        (request(one.prompt_ids, media=one.media, max_tokens=30, seed=one.seed, temperature=0.5), embeddings)
        for one, embeddings in (*some, *reversed(some))
    ]
    with Rig(blocks=400, max_num_seqs=16) as rig:
        want = rig.run(*wanted)

    def tight(runner: Runner) -> WatchedGroup:
        runner_group = group.rebalanced(runner)
        runner_group.block_counts = tuple(20 + rank for rank in range(len(runner_group.block_counts)))
        return runner_group

    with shared(group, tight, max_model_len=80, max_batched_tokens=16) as rig:
        assert rig.run(*wanted) == want
        assert len(rig.sink.preempted) > 2


def test_log_probabilities_are_those_of_one_rank(group: SharingGroup) -> None:
    """Of prompts with pictures and videos, and of replies."""
    options = {"prompt_logprobs": 2, "logprobs": 2, "max_tokens": 4}
    wanted: list[Any] = [request([*range(3, 12), 20 + n], **options) for n in range(4)]
    wanted += [media_request(n, **options) for n in range(4)]

    def scores(rig: Rig) -> list[TokenLogprobs]:
        rig.run(*wanted)
        return [
            entry
            for number in range(len(wanted))
            for name in [key(number)]
            for entry in (
                *(entry for piece in rig.sink.prompt_logprobs[name] for entry in piece.entries if entry is not None),
                *(event.logprobs for event in rig.sink.tokens[name] if event.logprobs is not None),
            )
        ]

    with Rig(blocks=400) as rig:
        want = scores(rig)
    with shared(group) as rig:
        got = scores(rig)
        assert seen(rig).lived_on == {0, *group.processes}
    assert len(got) == len(want) > 100
    for one, other in zip(got, want, strict=True):
        assert (one.token_id, one.rank) == (other.token_id, other.rank)
        assert one.logprob == pytest.approx(other.logprob, abs=1e-9, rel=0)


def test_constraints_hold_on_ranks_that_share() -> None:
    wanted = some_of_each(3)
    with constrained_rig(own()) as rig:
        want = rig.run(*wanted)
    with SharingGroup(2, model=structured_model) as pair:

        def tight(runner: Runner) -> KindsSeen:
            runner.experts = pair.experts
            group = pair.rebalanced(runner)
            group.block_counts = (40, 40)
            return group

        with Rig(
            pair.model,
            config=pair.config,
            compiler=own(),
            group=tight,
            blocks=300,
            max_model_len=150,
            max_num_seqs=40,
        ) as rig:
            assert rig.run(*wanted) == want
            assert rig.sink.preempted and seen(rig).lived_on == {0, 1}


def test_moved_experts_are_those_that_change_their_rank() -> None:
    before = ExpertLayout(text=((0, 1), (2, 3)), vision=((0, 1), (2, 3)))
    after = ExpertLayout(text=((1, 0), (2, 3)), vision=((3, 1), (2, 0)))
    assert moved_experts(ExpertPlacement((None, before, before)), ExpertPlacement((None, after, before))) == {
        1: 2,
        2: 0,
    }


@pytest.mark.parametrize("changes", [{"every_steps": 0}, {"least_gain": -1.0}])
def test_balance_that_cannot_work_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="every_steps must be positive and least_gain not negative"):
        partial(BalanceConfig, **changes)()


def test_graphs_do_not_go_with_shared_experts_and_moves_need_them() -> None:
    runner = Rig().runner
    with pytest.raises(ValueError, match="this rank shares no experts with others"):
        runner.need_experts()
    parts: Any = (runner.model, runner.config, None, runner.cache)
    with pytest.raises(ValueError, match="decode graphs of a group of ranks are not built"):
        Runner(*parts, graphs=object(), experts=object())  # type: ignore[arg-type]
