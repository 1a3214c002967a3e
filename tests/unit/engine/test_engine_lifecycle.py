"""Ends of all kinds, keys, threads and defects."""

from __future__ import annotations

import threading
from collections.abc import Mapping

import pytest
import torch

from actors.engine.execution.runner import Runner
from actors.engine.keys import KeyRegistry
from actors.engine.plan import RankPlan
from actors.errors import AlreadyExists, DeadlineExceeded, InvalidRequest, Overloaded, RequestCancelled, Unavailable
from tests.unit.engine.harness import Rig, key, media_request, request


class Gate:
    """Holds a rig's step thread before each step until told."""

    def __init__(self, rig: Rig) -> None:
        self.entered = threading.Semaphore(0)
        self.may_run = threading.Semaphore(0)
        run = rig.runner.run

        def gated(plan: RankPlan) -> Mapping[int, int]:
            if plan.slices:
                self.entered.release()
                assert self.may_run.acquire(timeout=20)
            return run(plan)

        rig.runner.run = gated  # type: ignore[method-assign]

    def wait(self) -> None:
        assert self.entered.acquire(timeout=20)

    def open(self, steps: int = 1000) -> None:
        self.may_run.release(steps)


def test_cancel_in_every_phase_frees_everything() -> None:
    with Rig(max_num_seqs=1) as rig:
        gate = Gate(rig)
        wanted, embeddings = media_request(0, max_tokens=20)
        running = rig.submit(0, wanted, embeddings)
        waiting = rig.submit(1, request([5] * 10))
        gate.wait()
        rig.engine.cancel(waiting)
        rig.engine.cancel(running)
        gate.open()
        rig.wait_released(running, waiting)
        assert {type(error) for error in rig.sink.ended.values()} == {RequestCancelled}
        assert not rig.sink.tokens[waiting]


def test_cancel_while_decoding_stops_the_tokens() -> None:
    with Rig() as rig:
        name = rig.submit(0, request([5] * 10, max_tokens=150))
        rig.sink.wait(lambda: len(rig.sink.tokens[name]) >= 3)
        rig.engine.cancel(name)
        rig.engine.cancel(name)
        rig.wait_released(name)
        assert len(rig.sink.tokens[name]) < 150
        assert rig.sink.finish(name) is None


def test_cancel_while_embeddings_are_missing() -> None:
    with Rig() as rig:
        wanted, embeddings = media_request(0)
        name = rig.submit(0, wanted)
        rig.sink.wait(lambda: ("admitted", name) in rig.sink.calls)
        rig.engine.supply_embedding(name, 1, 2, embeddings[1, 2])
        rig.engine.cancel(name)
        rig.engine.supply_embedding(name, 0, 0, embeddings[0, 0])
        rig.wait_released(name)


def test_keys_are_refused_when_active_ended_or_cancelled_early() -> None:
    with Rig() as rig:
        gate = Gate(rig)
        rig.submit(0, request([5], max_tokens=1))
        with pytest.raises(AlreadyExists):
            rig.submit(0, request([5]))
        gate.wait()
        gate.open()
        rig.wait_released(key(0))
        rig.engine.cancel(key("early"))
        for name in (0, "early"):
            with pytest.raises(Unavailable) as caught:
                rig.submit(name, request([5]))
            assert caught.value.reason == "ENDED"


def test_key_registry_forgets_after_its_time() -> None:
    keys = KeyRegistry(30.0)
    keys.claim(key(0), 0.0)
    keys.retire(key(0), 1.0)
    keys.retire(key(1), 2.0)
    keys.retire(key(0), 5.0)
    for now in (31.5, 34.9):
        with pytest.raises(Unavailable):
            keys.claim(key(0), now)
    assert not keys.has_ended(key(1), 32.0)
    keys.claim(key(0), 35.0)


def test_bad_requests_never_reach_the_scheduler() -> None:
    with Rig() as rig:
        with pytest.raises(InvalidRequest):
            rig.submit(0, request([5], top_p=2.0))
        rig.run(request([5]))


def test_full_queue_ends_with_overloaded() -> None:
    with Rig(max_waiting=1, max_num_seqs=1) as rig:
        gate = Gate(rig)
        first = rig.submit(0, request([5]))
        gate.wait()
        others = [rig.submit(number, request([5])) for number in (1, 2)]
        gate.open()
        rig.wait_released(first, *others)
        assert list(rig.sink.ended) == [others[1]]
        assert isinstance(rig.sink.ended[others[1]], Overloaded)


def test_idle_engine_wakes_for_a_deadline() -> None:
    with Rig() as rig:
        rig.engine._wall_clock = lambda: 100.0
        name = rig.submit(0, media_request(0, deadline_s=100.05)[0])
        rig.wait_released(name)
        assert isinstance(rig.sink.ended[name], DeadlineExceeded)


def test_fail_from_outside() -> None:
    with Rig() as rig:
        name = rig.submit(0, media_request(0)[0])
        rig.engine.fail(name, Unavailable("the encoder is gone", reason="STAGE_LOST"))
        rig.engine.fail(key("unknown"), Unavailable("?"))
        rig.wait_released(name)
        assert rig.sink.ended[name].reason == "STAGE_LOST"


@pytest.mark.parametrize("shape", [(5, 48), (6, 47), (6,)])
def test_wrong_embedding_ends_only_its_attempt(shape: tuple[int, ...]) -> None:
    with Rig() as rig:
        name = rig.submit(0, media_request(0)[0])
        rig.sink.wait(lambda: ("admitted", name) in rig.sink.calls)
        rig.engine.supply_embedding(name, 0, 0, torch.zeros(shape))
        rig.wait_released(name)
        assert rig.sink.ended[name].reason == "INTERNAL"


def test_stop_ends_everything_and_refuses_more() -> None:
    rig = Rig()
    with rig:
        running = rig.submit(0, request([5] * 5, max_tokens=190))
        waiting = rig.submit(1, media_request(0)[0])
        rig.sink.wait(lambda: bool(rig.sink.tokens[running]))
        rig.engine.stop()
        assert {rig.sink.ended[name].reason for name in (running, waiting)} == {"STOPPED"}
        with pytest.raises(Unavailable) as caught:
            rig.submit(2, request([5]))
        assert caught.value.reason == "DRAINING"
        rig.engine.stop()
    assert not rig.engine._thread.is_alive()


def test_move_ends_all_there_is_for_others_to_go_on() -> None:
    with Rig(max_num_seqs=1) as rig:
        gate = Gate(rig)
        names = [rig.submit(index, request([5] * 10, max_tokens=50)) for index in range(2)]
        gate.wait()
        rig.engine.drain()
        rig.engine.move()
        gate.open()
        rig.wait_released(*names)
        assert {(type(error), error.reason) for error in rig.sink.ended.values()} == {(Unavailable, "MOVED")}
        assert rig.engine.wait_idle(5)


def test_drain_lets_the_present_finish() -> None:
    with Rig() as rig:
        gate = Gate(rig)
        name = rig.submit(0, request([5], max_tokens=3))
        gate.wait()
        rig.engine.drain()
        assert not rig.engine.wait_idle(0.01)
        with pytest.raises(Unavailable):
            rig.submit(1, request([5]))
        gate.open()
        assert rig.engine.wait_idle(20)
        assert len(rig.sink.ids(name)) == 3


def test_failed_step_stops_the_engine_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Runner, plan: RankPlan) -> Mapping[int, int]:
        raise RuntimeError("kernel")

    monkeypatch.setattr(Runner, "run", broken)
    rig = Rig()
    rig.engine.start()
    rig.submit(0, request([5]))
    with pytest.raises(RuntimeError, match="kernel"):
        rig.sink.wait(lambda: False)
    rig.engine._thread.join(20)
    with pytest.raises(Unavailable):
        rig.submit(1, request([5]))
    assert rig.engine.reserve(key(2), 3).exception(20) is not None
    assert not rig.engine.wait_idle(20)
    rig.engine.check_integrity()
    rig.engine.stop()


def test_nan_in_the_weights_is_fatal_not_a_reply() -> None:
    rig = Rig()
    rig.model.norm_D.fill_(float("nan"))
    rig.engine.start()
    rig.submit(0, request([5]))
    with pytest.raises(FloatingPointError):
        rig.sink.wait(lambda: False)
    rig.engine.stop()


def test_a_step_that_hangs_ends_the_engine() -> None:
    rig = Rig()
    gate = Gate(rig)
    rig.engine.start()
    rig.engine.check_step(0.0)  # nothing is to be done, which takes as long as it likes
    rig.submit(0, request([5]))
    gate.wait()
    rig.engine.check_step(3600.0)
    assert rig.sink.fatal is None
    rig.engine.check_step(0.0)
    with pytest.raises(RuntimeError, match="step 1 did not end in 0 s"):
        rig.sink.wait(lambda: False)
    gate.open()
    rig.engine.stop()


def test_load_counts() -> None:
    with Rig(max_num_seqs=1) as rig:
        gate = Gate(rig)
        rig.submit(0, request([5] * 9, max_tokens=2))
        gate.wait()
        rig.submit(1, request([5] * 7, max_tokens=1))
        gate.open(1)
        gate.wait()
        load = rig.engine.load()
        assert (load.step, load.running, load.waiting, load.queued_tokens) == (2, 1, 1, 7)
        assert (load.total_blocks, load.free_blocks, load.block_size) == (64, 61, 4)
        gate.open()
        rig.wait_released(key(0), key(1))


def test_many_threads_submitting_and_cancelling() -> None:
    with Rig(blocks=24, max_model_len=96, max_waiting=1000) as rig:

        def use(worker: int) -> None:
            for number in range(12):
                name = f"{worker}.{number}"
                wanted, embeddings = media_request(number, max_tokens=1 + number)
                if number % 2:
                    rig.submit(name, wanted, embeddings)
                else:
                    rig.submit(name, request([5] * (1 + worker + number), max_tokens=9))
                if number % 3 == 0:
                    rig.engine.cancel(key(name))

        threads = [threading.Thread(target=use, args=(worker,)) for worker in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        names = [key(f"{worker}.{number}") for worker in range(4) for number in range(12)]
        rig.wait_released(*names)
        for name in names:
            assert (name in rig.sink.ended) != (rig.sink.finish(name) is not None)
