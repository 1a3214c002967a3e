"""KV between groups of ranks of any sizes: the tokens of one engine, straight from rank to rank, nothing is kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from torch import Tensor

from actors.engine.execution.runner import Runner
from actors.parallel.kv_transfer import KvCache, Transport, TransportError
from tests.unit.engine.constraints import structures as st
from tests.unit.engine.engine_requests import chats, key, media_request, request
from tests.unit.engine.group.rank_group import RankGroup, WatchedGroup
from tests.unit.engine.harness import Rig
from tests.unit.engine.test_constrained_engine import own, some_of_each
from tests.unit.engine.test_constrained_engine import rig as constrained_rig
from tests.unit.wire.kv_engines import Through
from tests.unit.wire.kv_groups import EnginePair, Side, decode_group, prefill_group

Groups = dict[tuple[str, int], RankGroup]


@pytest.fixture(scope="module")
def groups() -> Iterator[Groups]:
    """By role and size; made when first asked for."""
    made: Groups = {}
    yield made
    for group in made.values():
        group.__exit__()
    assert {process.exitcode for group in made.values() for process in group.processes.values()} <= {0}


def joining(groups: Groups, role: str, size: int) -> Callable[[Runner], WatchedGroup]:
    if (role, size) not in groups:
        groups[role, size] = prefill_group(size) if role == "prefill" else decode_group(size)
    return groups[role, size].join


def sides(groups: Groups, prefill: int, decode: int, **options: Any) -> tuple[Side, Side]:
    """``options`` of both engines."""
    return tuple(  # type: ignore[return-value]
        Side(join=joining(groups, role, size) if size > 1 else None, options=options)
        for role, size in (("prefill", prefill), ("decode", decode))
    )


@pytest.fixture(scope="module")
def one_rank() -> list[list[int]]:
    with Rig(blocks=400, max_num_seqs=32) as rig:
        return rig.run(*chats())


def lived_on(rig: Rig) -> set[int]:
    return rig.group.lived_on if isinstance(rig.group, WatchedGroup) else {0}


@pytest.mark.parametrize(
    ("prefill", "decode", "parted_tokens"),
    [(1, 2, 512), (2, 1, 1), (2, 2, 512), (2, 2, 1), (2, 4, 512), (4, 2, 1)],
)
def test_any_sizes_give_the_tokens_of_one_engine(
    groups: Groups, one_rank: list[list[int]], prefill: int, decode: int, parted_tokens: int
) -> None:
    """Text, images and videos, greedy and drawn. Every rank here meets every rank there."""
    with EnginePair(*sides(groups, prefill, decode, parted_tokens=parted_tokens)) as pair:
        assert pair.run(*chats()) == one_rank
        assert lived_on(pair.prefill.rig) == set(range(prefill))
        assert lived_on(pair.decode.rig) == set(range(decode))
        assert {there for there, _ in pair.lanes} == set(range(prefill))
        assert {here for _, here in pair.lanes} == set(range(decode))
        counters = pair.prefill.sender.counters
        chunks = [chunk for one in pair.prefill.sink.chunks.values() for chunk in one]
        tokens = sum(chunk.token_count for chunk in chunks if chunk.part.is_last)
        parted = {chunk.rank for chunk in chunks if chunk.part.count > 1}
        assert parted == (set(range(prefill)) if parted_tokens == 1 else set())
        assert counters.sent_bytes == tokens * pair.prefill.sender._parts.geometry.chunk_bytes(1)
        assert pair.decode.receiver.counters.received_bytes == counters.sent_bytes
        assert counters.chunks == len(chunks) and counters.generations == len(pair.lanes)
        assert (counters.resent_bytes, counters.failures) == (0, 0)
        pair.wait_clean()


def test_constrained_replies_go_on_where_their_kv_went() -> None:
    wanted = some_of_each(2)
    with constrained_rig(own()) as rig:
        want = rig.run(*wanted)
    model: Any = structured_model
    with prefill_group(2, model=model, blocks=300) as there, decode_group(2, model=model, blocks=300) as here:
        options = {
            "model": st.model(),
            "config": st.model_config(),
            "max_model_len": 150,
            "max_num_seqs": 9,
            "blocks": 300,
        }
        two = [Side(join=group.join, options=options | {"compiler": own()}) for group in (there, here)]
        with EnginePair(*two) as pair:
            assert pair.run(*((one, None) for one in wanted)) == want
            assert lived_on(pair.prefill.rig) == lived_on(pair.decode.rig) == {0, 1}
            pair.wait_clean()


def structured_model() -> Any:
    return st.model(), st.model_config()


def test_blocks_that_a_rank_holds_are_not_sent(groups: Groups) -> None:
    wanted, embeddings = media_request(4, max_tokens=4)
    prompt = len(wanted.prompt_ids)
    with EnginePair(*sides(groups, 2, 2)) as pair:
        names = []
        for number in range(3):
            names.append(pair.submit(number, wanted, embeddings))
            pair.wait_released(names[-1])
        held = (prompt - 1) // 4 * 4
        replies = [pair.reply(name) for name in names]
        assert replies == [replies[0]] * 3
        assert [pair.prefill.sink.chunks[name][0].first_token for name in names] == [0, held, held]
        chunk_bytes = pair.prefill.sender._parts.geometry.chunk_bytes
        assert pair.prefill.sender.counters.sent_bytes == chunk_bytes(prompt) + 2 * chunk_bytes(prompt - held)
        pair.wait_clean()


@pytest.mark.parametrize("first", ["prefill", "decode"])
def test_cancelled_at_any_time_on_either_side_first(groups: Groups, first: str) -> None:
    """After so many things that either engine told; wherever that is, nothing is left on any rank."""
    with EnginePair(*sides(groups, 2, 2)) as pair:
        side, other = (pair.prefill, pair.decode) if first == "prefill" else (pair.decode, pair.prefill)
        left, name = 0, key("")

        def told(original: Callable[..., None]) -> Callable[..., None]:
            def tell(*arguments: object) -> None:
                nonlocal left
                left -= 1
                if left == 0:
                    side.rig.engine.cancel(name)
                original(*arguments)

            return tell

        for sink in (pair.prefill.sink, pair.decode.sink):
            for method in ("on_tokens", "on_chunk", "on_reserve_needed", "on_admitted", "on_media_consumed"):
                setattr(sink, method, told(getattr(sink, method)))
        cancelled = 0
        for number in range(24):
            left, name = number, key(number)
            wanted, embeddings = media_request(number, max_tokens=12)
            # One that stays, so that lanes between all ranks are in use.
            beside = pair.submit(1000 + number, *media_request(1000 + number, max_tokens=3))
            pair.submit(number, wanted, embeddings)
            side.rig.wait_released(name)
            other.rig.engine.cancel(name)
            pair.wait_released(name, beside)
            pair.reply(beside)
            cancelled += name in pair.prefill.sink.ended or name in pair.decode.sink.ended
            pair.wait_clean()
        assert cancelled > 12


class SlowCache:
    """Of a rank: writes of transfers take their time."""

    def __init__(self, inner: KvCache) -> None:
        self.inner = inner

    def read_tokens(self, layer: int, block_table: Sequence[int], first: int, count: int) -> Tensor:
        return self.inner.read_tokens(layer, block_table, first, count)

    def write_tokens(self, layer: int, block_table: Sequence[int], first: int, kv_T2Hd: Tensor) -> None:
        time.sleep(0.05)
        self.inner.write_tokens(layer, block_table, first, kv_T2Hd)


def test_blocks_taken_from_a_reservation_are_written_by_nobody_else(groups: Groups) -> None:
    """Replies grow into the blocks of sequences that are being received: a late write would change their tokens."""
    grow = [(request([3 + n, 5, 6, 7, 8], max_tokens=62, seed=n, temperature=0.9), None) for n in range(8)]
    with Rig(blocks=400, max_num_seqs=16) as rig:
        want = rig.run(*grow)

    def tight(runner: Runner) -> WatchedGroup:
        group = here.join(runner)
        group.block_counts = (18, 18)
        return group

    options = {"reserve_margin_tokens": 4, "max_model_len": 70, "prefix_caching": False}
    there = Side(join=joining(groups, "prefill", 2))
    with decode_group(2, cache=SlowCache) as here, EnginePair(there, Side(join=tight, options=options)) as pair:
        for number in range(0, len(grow), 2):
            growing = [pair.submit(number + n, *grow[number + n]) for n in range(2)]
            for name in growing:
                pair.decode.sink.wait(lambda name=name: len(pair.decode.sink.tokens[name]) > 4)
            victims = [
                pair.submit(1000 + number + n, request([9 + n] * 40, max_tokens=2, arrival_s=1.0)) for n in range(2)
            ]
            pair.wait_released(*growing, *victims)
            assert [pair.reply(name) for name in growing] == want[number : number + 2]
        ended = [error.reason for error in pair.decode.sink.ended.values()]
        assert set(ended) == {"PREEMPTED"} and len(ended) > 2
        assert lived_on(pair.decode.rig) == {0, 1}
        pair.wait_clean()


class FlipOnce(Through):
    """Flips a bit of the first chunk."""

    flipped = False

    def recv(self, buffers: Sequence[Tensor], arrived: Callable[[int], None]) -> None:
        def corrupted(position: int) -> None:
            if position == 1 and not self.flipped:
                self.flipped = True
                buffers[position][17] ^= 4
            arrived(position)

        self.inner.recv(buffers, corrupted)


def test_bits_that_flip_on_the_way_to_a_rank_are_noticed(one_rank: list[list[int]]) -> None:
    with prefill_group(2) as there, decode_group(2, wrap=FlipOnce) as here:
        with EnginePair(Side(join=there.join), Side(join=here.join)) as pair:
            assert pair.run(*chats()) == one_rank
            counters = pair.prefill.sender.counters
            assert counters.resent_bytes > 0
            assert counters.generations == len(pair.lanes) == 4
            pair.wait_clean()


_calls = iter(range(1000))


class CutOnce(Through):
    """The first transport of the process fails under the receiver."""

    def __init__(self, inner: Transport) -> None:
        super().__init__(inner)
        self.first = next(_calls) == 0

    def recv(self, buffers: Sequence[Tensor], arrived: Callable[[int], None]) -> None:
        if self.first:
            raise TransportError("cut")
        self.inner.recv(buffers, arrived)


def test_a_data_path_that_breaks_at_a_rank_is_built_anew(one_rank: list[list[int]]) -> None:
    with prefill_group(2) as there, decode_group(2, wrap=CutOnce) as here:
        with EnginePair(Side(join=there.join), Side(join=here.join)) as pair:
            assert pair.run(*chats()) == one_rank
            assert pair.prefill.sender.counters.generations == len(pair.lanes) + 1
            pair.wait_clean()


class NeverReceives(Through):
    def recv(self, buffers: Sequence[Tensor], arrived: Callable[[int], None]) -> None:
        raise TransportError("no data path here")


def test_what_goes_to_a_rank_without_a_data_path_goes_through_the_leaders(one_rank: list[list[int]]) -> None:
    with prefill_group(2) as there, decode_group(2, wrap=NeverReceives) as here:
        with EnginePair(Side(join=there.join), Side(join=here.join)) as pair:
            assert pair.run(*chats()) == one_rank
            assert lived_on(pair.decode.rig) == {0, 1}
            counters = pair.prefill.sender.counters
            assert 0 < counters.streamed_bytes < counters.sent_bytes
            assert counters.streamed_bytes == pair.decode.receiver.counters.streamed_bytes
            assert counters.failures == 0
            pair.wait_clean()
