"""In float64 a reply depends on nothing but its request: not on caching, chunks, batch or preemption."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from actors.types import AttemptMode, SequenceKey
from tests.unit.engine.engine_requests import IMAGE, Wanted, chats, key, media_request, named_by, request
from tests.unit.engine.harness import Rig


@pytest.fixture(scope="module")
def alone() -> list[list[int]]:
    """What each of ``chats`` gives by itself, in an engine that remembers nothing."""
    outputs = []
    with Rig(prefix_caching=False) as rig:
        for number, one in enumerate(chats()):
            name = rig.submit(number, *one)
            rig.wait_released(name)
            outputs.append(rig.sink.ids(name))
    assert len({tuple(output) for output in outputs}) > 20
    return outputs


def replies(rig: Rig, wanted: list[Wanted], order: list[int]) -> list[list[int]]:
    names = [rig.submit(number, *wanted[number]) for number in order]
    rig.wait_released(*names)
    assert not rig.sink.ended
    return [rig.sink.ids(key(number)) for number in range(len(wanted))]


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"max_num_seqs": 1},
        {"max_num_seqs": 32},
        {"max_num_seqs": 32, "max_batched_tokens": 33},
        {"max_num_seqs": 5, "max_batched_tokens": 7, "block_size": 1, "blocks": 700},
        {"max_num_seqs": 8, "block_size": 16, "blocks": 60},
    ],
)
def test_batch_chunks_and_caching_change_nothing(
    caching: bool, options: dict[str, Any], alone: list[list[int]]
) -> None:
    wanted = chats()
    with Rig(prefix_caching=caching, **({"blocks": 400} | options)) as rig:
        assert replies(rig, wanted, list(range(len(wanted)))) == alone
        assert rig.engine.load().preemptions == 0
        if not caching:
            assert rig.engine.load().prefix_queried_tokens == 0
        elif options["max_num_seqs"] == 1:
            assert rig.engine.load().prefix_hit_tokens > 300


@pytest.mark.parametrize("budget", [1, 2, 3, 5, 7, 11, 16, 25])
def test_chunks_of_any_size_after_a_cached_prefix(budget: int, alone: list[list[int]]) -> None:
    wanted = chats()
    picked = [24, 26, 25, 31, 0, 1]
    with Rig(max_num_seqs=1, max_batched_tokens=budget) as rig:
        names = [rig.submit(number, *wanted[number]) for number in picked]
        rig.wait_released(*names)
        assert [rig.sink.ids(key(number)) for number in picked] == [alone[number] for number in picked]
        assert rig.sink.cached[key(26)] >= 20, "a picture seen before"


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("blocks", [26, 34, 44])
def test_preemption_changes_nothing(caching: bool, blocks: int, alone: list[list[int]]) -> None:
    """Too few blocks for replies that grow. Media sequences are among those that lose theirs."""
    wanted = [
        (
            request(
                one.prompt_ids, media=one.media, max_tokens=30, seed=one.seed, temperature=one.sampling.temperature
            ),
            e,
        )
        for one, e in chats()[20:28]
    ]
    with Rig(prefix_caching=False, blocks=400) as rig:
        want = replies(rig, wanted, list(range(8)))
    assert [output[: len(short)] for output, short in zip(want, alone[20:28], strict=True)] == alone[20:28]
    with Rig(prefix_caching=caching, blocks=blocks, max_model_len=80, max_batched_tokens=16) as rig:
        assert replies(rig, wanted, [7, 3, 0, 5, 1, 6, 2, 4]) == want
        assert rig.engine.load().preemptions > 2
        assert len(rig.sink.preempted) == rig.engine.load().preemptions
        if blocks == 34:
            assert any(wanted[int(name.request_id)][1] for name in rig.sink.preempted), (
                "no media sequence was preempted"
            )


def test_another_picture_of_the_same_size_is_not_found() -> None:
    shown, one = media_request(3, max_tokens=6)
    _, other = media_request(4)
    wanted: list[Wanted] = [
        (request(shown.prompt_ids, media=named_by(e, shown.media), max_tokens=6), e) for e in (one, other, one)
    ]
    with Rig(prefix_caching=False) as rig:
        want = [rig.run(item)[0] for item in wanted[:1]]
    with Rig(prefix_caching=False) as rig:
        want += [rig.run(item)[0] for item in wanted[1:2]]
    assert want[0] != want[1]
    with Rig() as rig:
        got = []
        for number, item in enumerate(wanted):
            name = rig.submit(number, *item)
            rig.wait_released(name)
            got.append(rig.sink.ids(name))
        assert got == [want[0], want[1], want[0]]
        assert [rig.sink.cached[key(number)] for number in range(3)] == [0, 4, len(shown.prompt_ids) // 4 * 4]


def test_tenants_do_not_share() -> None:
    prompt = list(range(3, 40))
    with Rig() as rig:
        for number, salt in enumerate((b"one", b"two", b"one")):
            rig.wait_released(rig.submit(number, request(prompt, salt=salt)))
        assert [rig.sink.cached[key(number)] for number in range(3)] == [0, 0, 36]
        outputs = [rig.sink.ids(key(number)) for number in range(3)]
        assert outputs[0] == outputs[1] == outputs[2]


def test_a_chat_finds_its_last_turn() -> None:
    """The reply too: of 20 + 9 tokens 28 were computed, which are 7 blocks."""
    prompt = list(range(3, 23))
    with Rig() as rig:
        rig.wait_released(rig.submit("turn 1", request(prompt, max_tokens=9)))
        reply = rig.sink.ids(key("turn 1"))
        rig.wait_released(rig.submit("turn 2", request([*prompt, *reply, 50, 51, 52])))
        assert rig.sink.cached[key("turn 2")] == 28
        warm = rig.sink.ids(key("turn 2"))
        load = rig.engine.load()
        assert (load.prefix_queried_tokens, load.prefix_hit_tokens) == (20 + 32, 28)
        assert load.cached_blocks == len(rig.sink.findable) == (32 + 7) // 4
    with Rig(prefix_caching=False) as rig:
        rig.wait_released(rig.submit("turn 2", request([*prompt, *reply, 50, 51, 52])))
        assert rig.sink.ids(key("turn 2")) == warm
        assert not rig.sink.findable


def test_choices_share_their_prompt() -> None:
    prompt = list(range(3, 40))
    with Rig() as rig:
        first = SequenceKey("n", 0, 0)
        rig.engine.submit(first, request(prompt, temperature=1.0), AttemptMode.COLOCATED)
        rig.sink.wait(lambda: bool(rig.sink.tokens[first]))
        others = [SequenceKey("n", 0, choice) for choice in range(1, 5)]
        for name in others:
            rig.engine.submit(name, request(prompt, temperature=1.0), AttemptMode.COLOCATED)
        rig.wait_released(first, *others)
        assert [rig.sink.cached[name] for name in others] == [36] * 4
        assert len({tuple(rig.sink.ids(name)) for name in (first, *others)}) > 1


@pytest.mark.parametrize("options", [{}, {"max_num_seqs": 2, "max_batched_tokens": 5}, {"blocks": 20}])
def test_prompt_logprobs_come_once_whatever_is_cached_cut_or_preempted(options: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(2)
    prompts = [torch.randint(3, IMAGE, (22,), generator=generator).tolist() for _ in range(2)]

    def scores(rig: Rig) -> list[tuple[Any, ...]]:
        pieces = rig.sink.prompt_logprobs[key("scored")]
        assert [piece.first for piece in pieces] == [
            sum(len(earlier.entries) for earlier in pieces[:number]) for number in range(len(pieces))
        ]
        entries = [entry for piece in pieces for entry in piece.entries]
        assert entries[0] is None
        return [(entry.token_id, entry.rank, round(entry.logprob, 9), len(entry.top)) for entry in entries if entry]

    wanted = request(prompts[1], prompt_logprobs=2, logprobs=1, max_tokens=40, arrival_s=1.0)
    with Rig(prefix_caching=False) as rig:
        rig.wait_released(rig.submit("scored", wanted))
        want, tokens = scores(rig), rig.sink.ids(key("scored"))
        assert [score[0] for score in want] == prompts[1][1:]
    with Rig(**({"max_model_len": 80} | options)) as rig:
        rig.wait_released(rig.submit("warm", request(prompts[1], max_tokens=1)))
        names = [rig.submit("first", request(prompts[0], max_tokens=40)), rig.submit("scored", wanted)]
        rig.wait_released(*names)
        assert scores(rig) == want
        assert rig.sink.ids(key("scored")) == tokens
        assert rig.sink.cached[key("scored")] == 0
        assert all(event.logprobs is not None for event in rig.sink.tokens[key("scored")])
        assert (rig.engine.load().preemptions > 0) == ("blocks" in options)
