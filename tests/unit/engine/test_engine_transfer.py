"""A prefill and a decode engine in one process, KV copied in memory."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from typing import Any

import pytest
import torch

from actors.engine.events import ComputedChunk
from actors.engine.scheduling.reservations import Reservation
from actors.errors import DeadlineExceeded, RequestCancelled, ServingError, Unavailable
from actors.types import AttemptMode, EngineRequest, EngineRole, FinishReason, MilestoneKind, SequenceKey
from tests.small_models import language_model, text_config
from tests.unit.engine.harness import Recorder, Rig, key, media_request, request
from tests.unit.engine.test_engine import Embeddings, mixed_requests, prompts

CUT = 9


class PrefillSide(Recorder):
    """Carries reservations and chunks to the other engine at once, on the step thread."""

    peer: Rig
    cache: Any
    hold_chunks = False
    """Chunks are remembered but not copied."""

    def on_reserve_needed(self, key: SequenceKey, token_count: int) -> None:
        super().on_reserve_needed(key, token_count)
        self.peer.engine.reserve(key, token_count).add_done_callback(lambda future: self.answer(key, future))

    def answer(self, key: SequenceKey, future: Future[Reservation]) -> None:
        assert self.engine is not None
        error = future.exception()
        if error is None:
            with self.peer.sink.tables_lock:  # type: ignore[attr-defined]
                _, self.peer.sink.tables[key], held_tokens = future.result()  # type: ignore[attr-defined]
            self.engine.reserved(key, held_tokens)
        else:
            assert isinstance(error, ServingError)
            self.engine.refused(key, error.reason)

    def on_chunk(self, chunk: ComputedChunk) -> None:
        super().on_chunk(chunk)
        if self.hold_chunks:
            return
        receiver = self.peer.sink
        assert isinstance(receiver, DecodeSide) and self.engine is not None
        with receiver.tables_lock:
            table = receiver.tables.get(chunk.key)
            for layer in chunk.part.layers(self.cache.layout.num_layers):
                if table is None:
                    break
                kv = self.cache.read_tokens(layer, chunk.block_table, chunk.first_token, chunk.token_count)
                self.peer.cache.write_tokens(layer, table, chunk.first_token, kv)
        if chunk.last:
            assert chunk.first_output_id is not None
            self.peer.engine.kv_arrived(chunk.key, chunk.first_output_id, chunk.finished)
            self.engine.transferred(chunk.key)

    def on_transfer_cancelled(self, key: SequenceKey) -> None:
        super().on_transfer_cancelled(key)
        assert self.engine is not None
        self.peer.engine.fail(key, Unavailable("the prefill engine gave it up", reason="STAGE_LOST"))
        if not self.hold_chunks:
            self.engine.transferred(key)


class DecodeSide(Recorder):
    def __init__(self) -> None:
        super().__init__()
        self.tables: dict[SequenceKey, list[int]] = {}
        self.tables_lock = threading.Lock()

    def on_reservation_dropped(self, key: SequenceKey) -> None:
        with self.tables_lock:
            self.tables.pop(key, None)
        super().on_reservation_dropped(key)


class Pair:
    """Decode has no vision bank, other blocks and other batches than prefill."""

    def __init__(
        self, *, decode_blocks: int = 90, decode_options: dict[str, Any] | None = None, **options: Any
    ) -> None:
        self.sender = PrefillSide()
        self.prefill = Rig(role=EngineRole.PREFILL, sink=self.sender, max_batched_tokens=CUT, **options)
        bankless = language_model(text_config(), bank=False)
        fields = {"reserve_wait_s": 60.0} | (decode_options or {})
        self.decode = Rig(bankless, role=EngineRole.DECODE, sink=DecodeSide(), blocks=decode_blocks, **fields)
        self.sender.peer, self.sender.cache = self.decode, self.prefill.cache

    def __enter__(self) -> Pair:
        self.prefill.__enter__()
        self.decode.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.prefill.__exit__(kind)
        self.decode.__exit__(kind)

    def submit(self, name: int, wanted: EngineRequest, embeddings: Embeddings | None = None) -> SequenceKey:
        self.decode.submit(name, wanted, mode=AttemptMode.DECODE)
        return self.prefill.submit(name, wanted, embeddings, AttemptMode.PREFILL)

    def wait_released(self, *keys: SequenceKey) -> None:
        self.prefill.wait_released(*keys)
        self.decode.wait_released(*keys)


@pytest.mark.parametrize("parted_tokens", [1, 512])
def test_disaggregated_equals_colocated(parted_tokens: int) -> None:
    """Each part of the layers is copied while the step computes those behind it."""
    wanted = mixed_requests()
    with Rig() as rig:
        want = rig.run(*wanted)
    with Pair(parted_tokens=parted_tokens) as pair:
        names = [pair.submit(number, *one) for number, one in enumerate(wanted)]
        pair.wait_released(*names)
        for number, name in enumerate(names):
            assert len(pair.prefill.sink.ids(name)) == 1
            assert pair.prefill.sink.ids(name) + pair.decode.sink.ids(name) == want[number]
            assert [token.index for token in pair.decode.sink.tokens[name]] == list(range(1, len(want[number])))
        assert not pair.prefill.sink.ended and not pair.decode.sink.ended
        assert len(pair.sender.chunks[names[-1]]) > 2
        parts = {chunk.part.count for chunk in pair.sender.chunks[names[-1]] if chunk.token_count}
        assert parts == ({pair.prefill.cache.layout.num_layers} if parted_tokens == 1 else {1})
        kinds = [kind for name, kind, _ in pair.decode.sink.milestones if name == names[0]]
        assert kinds == [MilestoneKind.RELEASED]
        kinds = [kind for name, kind, _ in pair.prefill.sink.milestones if name == names[0]]
        assert kinds == [MilestoneKind.PREFILL_STARTED, MilestoneKind.RELEASED]


def test_resumed_attempt_goes_through_both() -> None:
    wanted, embeddings = mixed_requests()[-1]
    with Rig() as rig:
        want = rig.run((wanted, embeddings))[0]
    resumed = request(
        wanted.prompt_ids,
        media=wanted.media,
        outputs=want[:3],
        max_tokens=wanted.sampling.max_tokens,
        seed=wanted.seed,
        temperature=wanted.sampling.temperature,
        top_k=wanted.sampling.top_k,
        top_p=wanted.sampling.top_p,
    )
    with Pair() as pair:
        name = pair.submit(0, resumed, embeddings)
        pair.wait_released(name)
        assert pair.prefill.sink.ids(name) + pair.decode.sink.ids(name) == want[3:]
        assert pair.prefill.sink.tokens[name][0].index == 3


def test_reply_of_one_token_never_decodes() -> None:
    with Pair() as pair:
        name = pair.submit(0, request(prompts(1)[0], max_tokens=1))
        pair.wait_released(name)
        assert pair.prefill.sink.finish(name) is FinishReason.LENGTH
        assert not pair.decode.sink.tokens[name]
        assert not pair.prefill.sink.ended and not pair.decode.sink.ended


def test_reservations_wait_for_room_and_all_replies_come() -> None:
    """Text that lost its blocks while decoding is computed anew there; one that lost them before its KV came ends."""
    wanted = [request(prompt, max_tokens=12) for prompt in prompts(6, seed=5)]
    with Rig() as rig:
        want = rig.run(*wanted)
    with Pair(decode_blocks=35) as pair:
        names = [pair.submit(number, one) for number, one in enumerate(wanted)]
        pair.wait_released(*names)
        whole = [pair.prefill.sink.ids(name) + pair.decode.sink.ids(name) for name in names]
        for got, expected, name in zip(whole, want, names, strict=True):
            ended = pair.decode.sink.ended.get(name) or pair.prefill.sink.ended.get(name)
            assert got == expected or (ended is not None and ended.reason in ("PREEMPTED", "STAGE_LOST"))
        assert sum(got == expected for got, expected in zip(whole, want, strict=True)) >= 2


def test_text_is_recomputed_by_a_decode_engine_that_ran_out_of_blocks() -> None:
    wanted = [request(prompt, max_tokens=40, arrival_s=float(i)) for i, prompt in enumerate(prompts(3, seed=4))]
    with Rig() as rig:
        want = rig.run(*wanted)
    with Pair(decode_blocks=30, decode_options={"reserve_margin_tokens": 1}) as pair:
        names = [pair.submit(number, one) for number, one in enumerate(wanted)]
        pair.wait_released(*names)
        assert pair.decode.engine.load().preemptions >= 1
        assert pair.decode.sink.preempted and not pair.decode.sink.ended
        assert [pair.prefill.sink.ids(name) + pair.decode.sink.ids(name) for name in names] == want
        assert {kind for _, kind, _ in pair.decode.sink.milestones} == {MilestoneKind.RELEASED}


def test_media_sequences_go_back_to_the_router() -> None:
    first = (request(prompts(1, seed=4)[0], max_tokens=60), None)
    shown = media_request(3, max_tokens=60, arrival_s=1.0)
    with Pair(decode_blocks=26, decode_options={"reserve_margin_tokens": 1, "max_model_len": 100}) as pair:
        names = [pair.submit(number, *one) for number, one in enumerate((first, shown))]
        pair.wait_released(*names)
        assert list(pair.decode.sink.ended) == [names[1]]
        assert pair.decode.sink.ended[names[1]].reason == "PREEMPTED"
        assert not pair.decode.sink.preempted


@pytest.mark.parametrize(("there", "here"), [(True, True), (True, False), (False, True)])
def test_only_what_the_decode_engine_lacks_is_sent(there: bool, here: bool) -> None:
    """Whichever of the two engines knows the prompt from before."""
    wanted, embeddings = mixed_requests()[-1]
    prompt = len(wanted.prompt_ids)
    with Rig() as rig:
        want = rig.run((wanted, embeddings))[0]
    with Pair(prefix_caching=here, decode_options={"prefix_caching": there}) as pair:
        names = []
        for number in range(2):
            names.append(pair.submit(number, wanted, embeddings))
            pair.wait_released(names[-1])
        held = (prompt - 1) // 4 * 4
        for number, name in enumerate(names):
            assert pair.prefill.sink.ids(name) + pair.decode.sink.ids(name) == want
            chunks = pair.sender.chunks[name]
            assert chunks[0].first_token == (held if number and there else 0)
            assert sum(chunk.token_count for chunk in chunks) == prompt - chunks[0].first_token
            assert pair.prefill.sink.cached[name] == (held if number and here else 0)
        assert (pair.decode.engine.load().prefix_hit_tokens > 0) == there


def test_refused_transfer_ends_the_prefill_side_with_its_reason() -> None:
    with Pair() as pair:
        name = pair.prefill.submit(0, request([5] * 9), mode=AttemptMode.PREFILL)
        pair.prefill.wait_released(name)
        error = pair.prefill.sink.ended[name]
        assert isinstance(error, Unavailable)
        assert error.reason == "UNKNOWN"


def test_prefill_cancelled_after_a_chunk_keeps_blocks_until_transferred() -> None:
    with Pair() as pair:
        pair.sender.hold_chunks = True
        name = pair.submit(0, request([5] * 30))
        # The tokens go in four chunks; token 0 may have followed before this thread looks.
        pair.sender.wait(lambda: len(pair.sender.chunks[name]) >= 4)
        pair.prefill.engine.cancel(name)
        pair.sender.wait(lambda: ("transfer_cancelled", name) in pair.sender.calls)
        pair.prefill.engine.check_integrity()
        assert pair.prefill.engine.load().free_blocks == 64 - 8
        assert name not in pair.sender.released
        pair.decode.wait_released(name)
        assert ("reservation_dropped", name) in pair.decode.sink.calls
        pair.prefill.engine.transferred(name)
        pair.prefill.wait_released(name)
        assert isinstance(pair.sender.ended[name], RequestCancelled)


def test_cancelled_reservation_lets_nothing_be_written() -> None:
    with Pair() as pair:
        pair.sender.hold_chunks = True
        name = pair.submit(0, request([5] * 30))
        pair.sender.wait(lambda: bool(pair.sender.chunks[name]))
        pair.decode.engine.cancel(name)
        pair.decode.sink.wait(lambda: ("reservation_dropped", name) in pair.decode.sink.calls)
        assert isinstance(pair.decode.sink, DecodeSide)
        assert name not in pair.decode.sink.tables
        pair.decode.engine.kv_arrived(name, 5)
        pair.prefill.engine.cancel(name)
        pair.prefill.engine.transferred(name)
        pair.wait_released(name)
        assert not pair.decode.sink.tokens[name]


def reservation_error(future: Future[Reservation]) -> str:
    error = future.exception(20)
    assert isinstance(error, Unavailable)
    return error.reason


def test_reservation_errors() -> None:
    with Pair() as pair:
        engine = pair.decode.engine
        early = engine.reserve(key("nobody"), 5)
        assert reservation_error(engine.reserve(key("nobody"), 5)) == "DUPLICATE"
        assert reservation_error(early) == "UNKNOWN"
        engine.cancel(key("cancelled"))
        assert reservation_error(engine.reserve(key("cancelled"), 5)) == "ENDED"
        waiting = engine.reserve(key("later"), 5)
        engine.cancel(key("later"))
        assert reservation_error(waiting) == "ENDED"
        name = pair.decode.submit(0, request([5] * 6), mode=AttemptMode.DECODE)
        assert reservation_error(engine.reserve(name, 5)) == "MISMATCH"
        assert len(engine.reserve(name, 6).result(20).block_table) == 18
        assert reservation_error(engine.reserve(name, 6)) == "DUPLICATE"
        engine.kv_arrived(name, 101)
        pair.decode.wait_released(name)
        assert pair.decode.sink.ended[name].reason == "INTERNAL"


def test_reservation_before_its_submit_is_granted() -> None:
    with Pair() as pair:
        future = pair.decode.engine.reserve(key(0), 6)
        name = pair.decode.submit(0, request([5] * 6), mode=AttemptMode.DECODE)
        assert future.result(20)
        pair.decode.engine.cancel(name)
        pair.decode.wait_released(name)


def test_stopping_fails_what_waits() -> None:
    pair = Pair()
    with pair.decode as decode:
        name = decode.submit(0, request([5] * 6), mode=AttemptMode.DECODE)
        early = decode.engine.reserve(key("nobody"), 5)
        decode.engine.stop()
        assert decode.sink.ended[name].reason == "STOPPED"
        assert reservation_error(early) == "STOPPED"
        assert reservation_error(decode.engine.reserve(key("later"), 5)) == "STOPPED"


def test_deadline_in_a_transfer_ends_both_sides() -> None:
    now = 1000.0
    pair = Pair()
    for rig in (pair.prefill, pair.decode):
        rig.engine._wall_clock = lambda: now
    with pair:
        pair.sender.hold_chunks = True
        name = pair.submit(0, request([5] * 30, deadline_s=now + 0.3))
        pair.decode.wait_released(name)
        pair.sender.wait(lambda: name in pair.sender.ended)
        pair.prefill.engine.transferred(name)
        pair.wait_released(name)
        assert isinstance(pair.sender.ended[name], DeadlineExceeded)


@pytest.mark.parametrize("side", ["prefill", "decode"])
@pytest.mark.parametrize("after", range(0, 40, 3))
def test_cancelled_at_any_time_on_either_side_first(side: str, after: int) -> None:
    """``after`` counts what the two engines told so far; wherever that is, everything is free in the end."""
    told = 0
    with Pair() as pair:
        name = key(0)
        first, second = (pair.prefill, pair.decode) if side == "prefill" else (pair.decode, pair.prefill)

        def cancel_when_due(*_: object) -> None:
            nonlocal told
            told += 1
            if told == after:
                first.engine.cancel(name)

        for rig in (pair.prefill, pair.decode):
            for method in ("on_tokens", "on_chunk", "on_reserve_needed", "on_admitted", "on_media_consumed"):
                original = getattr(rig.sink, method)

                def counted(*arguments: object, original: Any = original) -> None:
                    cancel_when_due()
                    original(*arguments)

                setattr(rig.sink, method, counted)
        wanted, embeddings = media_request(3, max_tokens=12)
        pair.submit(0, wanted, embeddings)
        first.wait_released(name)
        second.engine.cancel(name)
        pair.wait_released(name)


def test_the_last_tokens_are_handed_over_before_their_step_ends() -> None:
    """While the last layer's experts and the sampler still work; what was drawn follows by itself."""
    with Pair() as pair:
        name = pair.submit(0, request([5, 6, 7] * 8, max_tokens=2))
        told: list[tuple[int, int | None] | str] = []
        on_chunk, sample = pair.sender.on_chunk, pair.prefill.runner.sampler.sample

        def chunk_told(chunk: ComputedChunk) -> None:
            told.append((chunk.token_count, chunk.first_output_id))
            on_chunk(chunk)

        def sampled(*arguments: Any) -> Any:
            told.append("sampled")
            return sample(*arguments)

        pair.sender.on_chunk = chunk_told  # type: ignore[method-assign]
        pair.prefill.runner.sampler.sample = sampled
        pair.wait_released(name)
        (last,) = pair.sender.tokens[name]
        assert told[-3:] == [(6, None), "sampled", (0, last.token_id)]


def test_transfer_of_blocks_is_exact() -> None:
    with Pair() as pair:
        name = pair.submit(0, request([5, 6, 7] * 8, max_tokens=2))
        pair.sender.wait(lambda: bool(pair.sender.chunks[name]) and pair.sender.chunks[name][-1].last)
        pair.wait_released(name)
        chunks = pair.sender.chunks[name]
        assert [(chunk.index, chunk.first_token, chunk.token_count) for chunk in chunks] == [
            (0, 0, 9),
            (1, 9, 9),
            (2, 18, 6),
            (3, 24, 0),
        ]
        assert isinstance(pair.decode.sink, DecodeSide)
        table = pair.decode.sink.tables[name]
        for layer in range(3):
            ours = pair.prefill.cache.read_tokens(layer, chunks[0].block_table, 0, 24)
            assert torch.equal(pair.decode.cache.read_tokens(layer, table, 0, 24), ours)
