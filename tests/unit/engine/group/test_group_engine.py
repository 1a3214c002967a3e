"""In float64 a reply does not depend on how many ranks compute it, on which it lives, or what the others do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from actors.engine.execution.runner import Runner
from actors.engine.group.messages import Embedding
from actors.types import AttemptMode, Grid, MediaKind, SequenceKey
from tests.unit.engine.constraints import structures as st
from tests.unit.engine.engine_requests import IMAGE, Wanted, chats, key, media_request, request, span
from tests.unit.engine.group.rank_group import RankGroup, RankLoader, WatchedGroup
from tests.unit.engine.harness import Rig
from tests.unit.engine.test_constrained_engine import own, some_of_each
from tests.unit.engine.test_constrained_engine import rig as constrained_rig


def structured_model() -> Any:
    return st.model(), st.model_config()


@pytest.fixture(scope="module", params=[2, 4])
def group(request: pytest.FixtureRequest) -> Iterator[RankGroup]:
    with RankGroup(request.param) as group:
        yield group
    assert {process.exitcode for process in group.processes.values()} == {0}


@pytest.fixture(scope="module")
def pair() -> Iterator[RankGroup]:
    with RankGroup(2) as group:
        yield group


@pytest.fixture(scope="module")
def one_rank() -> list[list[int]]:
    with Rig(blocks=400, max_num_seqs=32) as rig:
        return rig.run(*chats())


def lived_on(rig: Rig) -> set[int]:
    assert isinstance(rig.group, WatchedGroup)
    return rig.group.lived_on


@pytest.mark.parametrize(
    "options",
    [
        {"max_num_seqs": 32},
        {"max_num_seqs": 3, "max_batched_tokens": 7},
        {"max_num_seqs": 8, "max_batched_tokens": 33, "batched_decode": False},
    ],
)
def test_any_number_of_ranks_gives_the_same_tokens(
    group: RankGroup, options: dict[str, Any], one_rank: list[list[int]]
) -> None:
    with Rig(blocks=400, group=group.join, **options) as rig:
        assert rig.run(*chats()) == one_rank
        assert lived_on(rig) == {0, *group.processes}
        counters = rig.group.counters
        assert counters.steps >= rig.engine.load().step > 0
        assert min(counters.plan_s, counters.own_s, counters.gather_s, counters.sent_bytes, *counters.rank_s) > 0


def test_preemption_on_every_rank_changes_nothing(group: RankGroup) -> None:
    shared = chats()[20:28]
    wanted: list[Wanted] = [
        (request(one.prompt_ids, media=one.media, max_tokens=30, seed=one.seed), embeddings)
        for one, embeddings in (*shared, *reversed(shared))
    ]
    with Rig(blocks=400, max_num_seqs=16) as rig:
        want = rig.run(*wanted)

    def tight(runner: Runner) -> WatchedGroup:
        runner_group = group.join(runner)
        runner_group.block_counts = tuple(20 + rank for rank in range(len(runner_group.block_counts)))
        return runner_group

    with Rig(blocks=400, group=tight, max_model_len=80, max_batched_tokens=16) as rig:
        assert rig.run(*wanted) == want
        assert rig.engine.load().preemptions == len(rig.sink.preempted) > 2


def test_ranks_without_tokens_take_part(group: RankGroup, one_rank: list[list[int]]) -> None:
    """One sequence at a time; at last on another rank, as the leader's waits for a picture that never comes."""
    with Rig(blocks=400, group=group.join) as rig:
        for number in (0, 25, 2):
            name = rig.submit(number, *chats()[number])
            rig.wait_released(name)
            assert rig.sink.ids(name) == one_rank[number]
        assert lived_on(rig) == {0}
    with Rig(blocks=400, group=group.join) as rig:
        grid = Grid(1, 4, 6)
        rig.submit("held", request([*[IMAGE] * grid.tokens, 5], media=[span(MediaKind.IMAGE, 0, grid)]))
        rig.sink.wait(lambda: ("admitted", key("held")) in rig.sink.calls)
        assert rig.run(chats()[25]) == [one_rank[25]]
        assert lived_on(rig) == {1}
        rig.engine.cancel(key("held"))
        rig.wait_released(key("held"))


def test_ends_of_all_kinds_leave_nothing_on_any_rank(group: RankGroup, one_rank: list[list[int]]) -> None:
    """The engine behind this one gives its sequences the same numbers: a rank that kept one would refuse it."""
    wanted = chats()
    with Rig(blocks=400, group=group.join, max_num_seqs=4, max_batched_tokens=9) as rig:
        names = [rig.submit(number, *one) for number, one in enumerate(wanted)]
        bare = [rig.submit(f"bare {number}", media_request(number)[0]) for number in range(3)]
        for number, name in enumerate(names):
            if number % 3 == 0:
                rig.engine.cancel(name)
            if number == 20:
                rig.sink.wait(lambda: len(rig.sink.steps) > 9)
        for name in bare:
            rig.engine.cancel(name)
        rig.wait_released(*names, *bare)
        for number, name in enumerate(names):
            got = rig.sink.ids(name)
            assert got == one_rank[number][: len(got)]
            assert got == one_rank[number] or name in rig.sink.ended
    with Rig(blocks=400, group=group.join) as rig:
        assert rig.run(*wanted[24:]) == one_rank[24:]


def test_choices_stay_with_their_prompt(group: RankGroup) -> None:
    prompt = list(range(3, 40))
    with Rig(group=group.join, blocks=400) as rig:
        first, *others = (SequenceKey("n", 0, choice) for choice in range(5))
        rig.engine.submit(first, request(prompt, temperature=1.0), AttemptMode.COLOCATED)
        rig.sink.wait(lambda: bool(rig.sink.tokens[first]))
        for name in others:
            rig.engine.submit(name, request(prompt, temperature=1.0), AttemptMode.COLOCATED)
        rig.wait_released(first, *others)
        assert [rig.sink.cached[name] for name in others] == [36] * 4
        assert lived_on(rig) == {0}


def test_log_probabilities_come_from_every_rank(pair: RankGroup) -> None:
    wanted = [request([*range(3, 12), 20 + n], prompt_logprobs=1, logprobs=2, max_tokens=4) for n in range(6)]

    def scores(rig: Rig) -> list[Any]:
        rig.run(*wanted)
        drawn = [[event.logprobs for event in rig.sink.tokens[key(n)]] for n in range(6)]
        return [drawn, [rig.sink.prompt_logprobs[key(n)] for n in range(6)]]

    with Rig() as rig:
        want = scores(rig)
    with Rig(group=pair.join) as rig:
        got = scores(rig)
        assert lived_on(rig) == {0, 1}
    assert _tokens(got) == _tokens(want)


def _tokens(scores: list[Any]) -> list[Any]:
    drawn, prompts = scores
    return [
        [[(entry.token_id, entry.rank, round(entry.logprob, 9)) for entry in reply] for reply in drawn],
        [[entry and (entry.token_id, entry.rank) for piece in prompt for entry in piece.entries] for prompt in prompts],
    ]


def test_constraints_hold_on_every_rank() -> None:
    wanted = some_of_each(4)
    with constrained_rig(own()) as rig:
        want = rig.run(*wanted)
    loader = RankLoader(model=structured_model, blocks=300)
    with RankGroup(2, loader.main) as pair:
        with constrained_rig(own(), group=pair.join) as rig:
            assert rig.run(*wanted) == want
            assert lived_on(rig) == {0, 1}
            assert not rig.sink.preempted

        def tight(runner: Runner) -> WatchedGroup:
            runner_group = pair.join(runner)
            runner_group.block_counts = (40, 40)
            return runner_group

        with constrained_rig(own(), group=tight) as rig:
            assert rig.run(*wanted) == want
            assert rig.sink.preempted


def test_ranks_tell_how_far_they_are_and_what_they_are() -> None:
    with RankGroup(3) as group:
        assert len(group.followers.wait_ready()) == 2
        assert group.followers.loading == ((1, 2), (1, 2))
        assert group.followers.notes == {1: ("rank 1 is here",), 2: ("rank 2 is here",)}


def test_a_plan_for_another_number_of_ranks_is_refused(pair: RankGroup) -> None:
    with Rig() as rig:
        plans: list[Any] = []
        run = rig.group.run
        rig.group.run = lambda plan: (plans.append(plan), run(plan))[1]  # type: ignore[method-assign]
        rig.run(request([5], max_tokens=1))
    with pytest.raises(ValueError, match="a plan for 1 ranks, and there are 2"):
        pair.join(Rig().runner).run(plans[0])


def test_embeddings_travel_whole() -> None:
    for dtype in (torch.float64, torch.bfloat16):
        sent = torch.randn(6, 8, dtype=torch.float64).to(dtype).t()
        assert torch.equal(Embedding.of(1, 2, 3, sent).tensor(), sent)
