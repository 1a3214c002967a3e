"""An idle engine changes its role: the vision experts come and go in the arena's tail, and no token is another."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from actors.config import EngineReplicaConfig
from actors.engine.execution.arena import Arena, ArenaPlan, arena_bytes
from actors.engine.execution.kv_cache import KvCache
from actors.engine.execution.runner import RoleChange, Runner
from actors.engine.execution.vision_tail import VisionTail
from actors.engine.group.group_runner import GroupRunner
from actors.engine_group import EngineGroup, child_processes
from actors.engine_rank import load_rank
from actors.ernie.bank import VisionBank, vision_bank_bytes
from actors.errors import Unavailable
from actors.types import AttemptMode, EngineRole
from tests.small_models import fill, language_model, text_config
from tests.tiny_model import tiny_checkpoint
from tests.unit.engine.engine_requests import chats, key, media_request, request
from tests.unit.engine.group.rank_group import HOST, PATIENT
from tests.unit.engine.harness import Rig, kv_layout

TEXT = [one for one in chats() if one[1] is None]
BLOCKS = 300
"""Beside the bank."""
Filled = Callable[[VisionBank], object]


def fill_bank(bank: VisionBank) -> None:
    """As ``language_model`` fills its own."""
    fill(bank.parameters_by_name(), 1)


class Movable(Rig):
    """An engine whose bank lies in an arena."""

    def __init__(self, role: EngineRole, *, fill: Filled = fill_bank, **options: object) -> None:
        model = language_model(text_config(), bank=False)
        layout = kv_layout(model, 4)
        bank = vision_bank_bytes(model.config, model.dtype)
        size = arena_bytes(BLOCKS, layout.block_bytes, bank)
        self.arena = Arena(ArenaPlan(size_bytes=size, block_bytes=layout.block_bytes, bank_bytes=bank))
        self.tail = VisionTail(self.arena, model)
        if role.prefills:
            self.tail.hold_bank(fill)

        def join(runner: Runner) -> GroupRunner:
            runner.roles = RoleChange(tail=self.tail, fill=fill)
            return GroupRunner(runner)

        cache = KvCache(layout, self.arena.block_storage())
        super().__init__(model, cache=cache, role=role, group=join, **options)

    def change_role(self, role: EngineRole) -> None:
        self.engine.drain()
        assert self.engine.wait_idle(60)
        self.engine.set_role(role).result(60)


def test_a_changed_engine_says_what_it_would_have_said() -> None:
    with Rig(blocks=BLOCKS) as plain:
        wanted = plain.run(*chats())
    text = wanted[: len(TEXT)]
    with Movable(EngineRole.DECODE) as rig:
        blocks = rig.engine.load().total_blocks
        assert blocks == rig.arena.plan.blocks_without_bank > BLOCKS
        # As many at once as the tail's blocks are needed for, so that the bank is read over what they hold.
        rig.cache.rows.fill_(3.0)
        assert rig.run(*TEXT) == text
        for number in range(2):
            rig.change_role(EngineRole.COLOCATED)
            assert rig.engine.load().total_blocks == rig.arena.plan.blocks_beside_bank < blocks
            assert rig.model.vision_bank is not None
            keys = [rig.submit(f"{number}-{at}", *one) for at, one in enumerate(chats())]
            rig.wait_released(*keys)
            assert [rig.sink.ids(one) for one in keys] == wanted
            rig.change_role(EngineRole.DECODE)
            assert rig.engine.load().total_blocks == blocks and rig.model.vision_bank is None
            assert not rig.arena.bank_storage().any()
            keys = [rig.submit(f"text {number}-{at}", *one) for at, one in enumerate(TEXT)]
            rig.wait_released(*keys)
            assert [rig.sink.ids(one) for one in keys] == text


def test_what_the_cache_holds_outlives_a_change_outside_the_tail() -> None:
    prompt = request(range(3, 43), max_tokens=2)
    with Movable(EngineRole.COLOCATED) as rig:
        rig.run(prompt)
        findable = set(rig.sink.findable)
        rig.change_role(EngineRole.DECODE)
        rig.change_role(EngineRole.COLOCATED)
        rig.wait_released(rig.submit("again", prompt))
        assert rig.sink.cached[key("again")] == 36 and findable <= rig.sink.findable


def test_a_role_decides_which_attempts_are_taken_and_how_long_they_may_be() -> None:
    with Movable(EngineRole.COLOCATED, max_model_len=10**6) as rig:
        short = rig.engine.max_model_len
        rig.change_role(EngineRole.DECODE)
        assert rig.engine.max_model_len > short == BLOCKS * 4
        media = rig.submit("media", *media_request(1))
        rig.sink.wait(lambda: media in rig.sink.ended)
        assert rig.sink.ended[media].reason == "NOT_CACHED"
        rig.change_role(EngineRole.PREFILL)
        assert rig.engine.max_model_len == short
        with pytest.raises(Unavailable, match="role is prefill") as refused:
            rig.submit("text", request(range(3, 9)), mode=AttemptMode.DECODE)
        assert refused.value.reason == "WRONG_ROLE"


def test_only_a_drained_idle_engine_changes_its_role() -> None:
    with Movable(EngineRole.DECODE) as rig:
        with pytest.raises(RuntimeError, match="while it takes attempts"):
            rig.engine.set_role(EngineRole.COLOCATED).result(60)
        running = rig.submit("long", request(range(3, 9), max_tokens=100))
        rig.sink.wait(lambda: bool(rig.sink.tokens[running]))
        rig.engine.drain()
        with pytest.raises(RuntimeError, match="while attempts are here"):
            rig.engine.set_role(EngineRole.COLOCATED).result(60)
        rig.wait_released(running)
        rig.engine.set_role(EngineRole.DECODE).result(60)
        assert rig.run(request(range(3, 9), max_tokens=3))
    with pytest.raises(RuntimeError, match="stopped"):
        rig.engine.set_role(EngineRole.COLOCATED).result(60)


def test_experts_that_cannot_be_read_end_the_engine() -> None:
    def broken(_bank: VisionBank) -> None:
        raise OSError("the disk is gone")

    with Movable(EngineRole.DECODE, fill=broken) as rig:
        rig.engine.drain()
        with pytest.raises(OSError, match="the disk is gone"):
            rig.engine.set_role(EngineRole.COLOCATED).result(60)
        rig.engine._thread.join(60)
        assert isinstance(rig.sink.fatal, OSError)


def test_a_rank_without_an_arena_keeps_its_role() -> None:
    with pytest.raises(ValueError, match="role of this rank is fixed"):
        Rig().runner.set_role(EngineRole.DECODE)


def test_a_group_reads_its_shares_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # Of the other rank's process.
    config = EngineReplicaConfig(
        model_dir=str(tiny_checkpoint()), pool="engine", dtype="float64", kv_cache_gib=0.01, block_size=16
    )
    group = EngineGroup([HOST] * 2, child_processes(config, EngineRole.DECODE), config=PATIENT)
    try:
        rank, runner = group.load(config, EngineRole.DECODE)
        before = runner.block_counts
        fields = {"config": rank.config, "rules": rank.rules, "cache": rank.runner.cache, "block_size": 16}

        def join(own: Runner) -> GroupRunner:
            own.experts, own.roles = rank.runner.experts, rank.runner.roles
            runner._runner = own
            return runner

        wanted = [request(range(3 + n, 40 + 2 * n), max_tokens=6) for n in range(4)]
        with Rig(rank.runner.model, group=join, role=EngineRole.DECODE, **fields) as rig:
            outputs = rig.run(*wanted)
            for number, role in enumerate((EngineRole.COLOCATED, EngineRole.DECODE, EngineRole.COLOCATED)):
                rig.engine.drain()
                assert rig.engine.wait_idle(60)
                rig.engine.set_role(role).result(60)
                counts = runner.block_counts
                assert all((now < then) == role.prefills for now, then in zip(counts, before, strict=True))
                keys = [rig.submit(f"{number}-{at}", one) for at, one in enumerate(wanted)]
                rig.wait_released(*keys)
                assert [rig.sink.ids(one) for one in keys] == outputs
        again = rank.runner.model.vision_bank
        whole = load_rank(config, EngineRole.PREFILL).runner.model.vision_bank
        assert again is not None and whole is not None
        all_of = whole.parameters_by_name()
        for name, rows in again.expert_rows().items():
            assert len(rows) == 4 and torch.equal(again.parameters_by_name()[name], all_of[name][list(rows)])
    finally:
        group.close()
