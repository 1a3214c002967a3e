"""An engine's rank holds what its role needs, and no more."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from multiprocessing.process import BaseProcess
from typing import Any

import pytest

from actors.config import EngineReplicaConfig
from actors.engine.execution import memory
from actors.engine.execution.runner import Runner
from actors.engine.group.balance import BalanceConfig
from actors.engine.group.followers import RankLost
from actors.engine.group.group_runner import GroupRunner
from actors.engine.group.meeting import Invitation
from actors.engine_group import EngineGroup, StartRank, child_processes
from actors.engine_rank import Rank, load_rank, rank_main
from actors.ernie.weights import Checkpoint
from actors.parallel.world import Seat
from actors.types import EngineRole
from tests.tiny_model import tiny_checkpoint
from tests.unit.engine.engine_requests import request
from tests.unit.engine.group.rank_group import CONTEXT, HOST, PATIENT, start_rank
from tests.unit.engine.harness import Rig
from tests.unit.wire.kv_groups import EnginePair, Side

CONFIG = EngineReplicaConfig(
    model_dir=str(tiny_checkpoint()), pool="engine", dtype="float32", kv_cache_gib=0.01, block_size=16
)


@pytest.mark.parametrize("naming", ["hf", "baidu"])
@pytest.mark.parametrize("role", list(EngineRole))
def test_only_engines_that_prefill_read_the_vision_experts(role: EngineRole, naming: str) -> None:
    directory = tiny_checkpoint(naming=naming)
    with Checkpoint(directory) as checkpoint:
        stored = checkpoint.bytes_to_read(checkpoint.specs)
        fingerprint = checkpoint.fingerprint("language")
    rank = load_rank(replace(CONFIG, model_dir=str(directory)), role)
    assert rank.loaded.bytes_read == stored | {"vision": 0} | ({} if role.prefills else {"vision_experts": 0})
    assert (rank.runner.model.vision_bank is not None) == role.prefills
    assert rank.fingerprint == fingerprint


def test_the_vision_experts_room_becomes_kv_blocks_of_a_decode_engine() -> None:
    prefill, decode = load_rank(CONFIG, EngineRole.PREFILL), load_rank(CONFIG, EngineRole.DECODE)
    assert prefill.arena.plan == decode.arena.plan
    plan = decode.arena.plan
    assert prefill.runner.block_count == plan.blocks_beside_bank == int(0.01 * 2**30) // plan.block_bytes
    assert decode.runner.block_count == plan.blocks_without_bank
    assert (decode.runner.block_count - prefill.runner.block_count + 1) * plan.block_bytes > plan.bank_bytes


def test_a_model_without_experts_prefills_too() -> None:
    directory = tiny_checkpoint(overrides={"text_config.mlp_layer_types": ["dense"] * 4})
    rank = load_rank(replace(CONFIG, model_dir=str(directory)), EngineRole.COLOCATED)
    assert rank.runner.model.vision_bank is not None
    assert rank.loaded.bytes_read["vision_experts"] == 0


def test_the_separator_also_ends_a_reply_unless_transformers_rules_apply() -> None:
    directory = tiny_checkpoint(overrides={"generation_config.eos_token_id": 2})
    config = replace(CONFIG, model_dir=str(directory))
    guarded = load_rank(config, EngineRole.COLOCATED).config.eos_token_ids
    plain = load_rank(replace(config, compat="transformers"), EngineRole.COLOCATED).config.eos_token_ids
    assert plain == (2,)
    assert guarded[0] == 2 and len(guarded) == 2


def test_memory_that_holds_no_block_is_refused() -> None:
    with pytest.raises(ValueError, match=r"kv_cache_gib: 1e-09 holds no KV block"):
        load_rank(replace(CONFIG, kv_cache_gib=1e-9), EngineRole.PREFILL)


def test_a_cpu_takes_a_share_of_its_free_memory_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_host_bytes", lambda: 80 << 20)
    arena = load_rank(replace(CONFIG, kv_cache_gib=None), EngineRole.PREFILL).arena.plan
    assert arena.blocks_beside_bank == (10 << 20) // arena.block_bytes


def test_a_configured_length_that_does_not_fit_is_refused_and_the_checkpoints_own_is_bounded(
    caplog: pytest.LogCaptureFixture,
) -> None:
    small = replace(CONFIG, kv_cache_gib=0.0005)
    with caplog.at_level("WARNING"):
        held = load_rank(small, EngineRole.PREFILL).runner.block_count * 16
    assert f"bounded by {held} tokens" in caplog.text and "give more with kv_cache_gib" in caplog.text
    load_rank(replace(small, max_model_len=held), EngineRole.PREFILL)
    with pytest.raises(ValueError, match=rf"^max_model_len: .* set it to {held} or less, or give more with kv_cache_g"):
        load_rank(replace(small, max_model_len=held + 1), EngineRole.PREFILL)


def test_start_says_what_runs_and_what_fits(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        load_rank(CONFIG, EngineRole.DECODE)
    assert "attention: paged" in caplog.text and "decode steps: eager" in caplog.text
    assert "KV arena of 0.0" in caplog.text and "beside 0.00 GiB of vision experts" in caplog.text


def rig_of(rank: Rank, **options: Any) -> Rig:
    """An engine around a loaded rank."""
    fields = {"config": rank.config, "rules": rank.rules, "cache": rank.runner.cache, "block_size": 16}
    return Rig(rank.runner.model, **fields, **options)


def child_ranks(config: EngineReplicaConfig, role: EngineRole = EngineRole.COLOCATED) -> StartRank:
    def start(invitation: Invitation, seat: Seat) -> BaseProcess:
        main = partial(share_main, seat=seat, config=config, role=role)
        return start_rank(main, invitation, seat.rank)

    return start


def share_main(invitation: Invitation, rank: int, seat: Seat, config: EngineReplicaConfig, role: EngineRole) -> None:
    assert seat.rank == rank
    rank_main(invitation, seat, config, role)


def test_groups_that_share_experts_prefill_and_decode_what_one_rank_computes() -> None:
    """Two of prefill, two of decode, as they are loaded from a checkpoint: only the former hold vision experts."""
    config = replace(CONFIG, dtype="float64")
    wanted = [request(range(3 + n, 40 + 2 * n), max_tokens=6, seed=n, temperature=n % 2) for n in range(6)]
    with rig_of(load_rank(config, EngineRole.COLOCATED)) as rig:
        outputs = rig.run(*wanted)
    with contextlib.ExitStack() as stack:
        sides = []
        for role in (EngineRole.PREFILL, EngineRole.DECODE):
            group = EngineGroup([HOST] * 2, child_ranks(config, role), config=PATIENT)
            stack.callback(group.close)
            rank, runner = group.load(config, role)
            assert (rank.runner.model.vision_bank is not None) == role.prefills
            options = {"config": rank.config, "rules": rank.rules, "cache": rank.runner.cache, "block_size": 16}
            sides.append(Side(join=joined(rank, runner), options={"model": rank.runner.model, **options}))
        with EnginePair(*sides) as pair:
            assert pair.run(*((one, None) for one in wanted)) == outputs
            assert {there for there, _ in pair.lanes} == {here for _, here in pair.lanes} == {0, 1}
            pair.wait_clean()


def joined(rank: Rank, runner: GroupRunner) -> Callable[[Runner], GroupRunner]:
    """The group of a loaded rank, around a rig's own runner of it."""

    def join(own: Runner) -> GroupRunner:
        own.experts = rank.runner.experts
        runner._runner = own
        return runner

    return join


def test_a_group_of_processes_shares_what_one_rank_loads_and_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # Of the other rank's process.
    config = replace(CONFIG, dtype="float64")
    alone = load_rank(config, EngineRole.COLOCATED)
    wanted = [request(range(3 + n, 40 + 2 * n), max_tokens=6) for n in range(4)]
    with rig_of(alone) as rig:
        outputs = rig.run(*wanted)
    start = child_processes(config, EngineRole.COLOCATED)
    group = EngineGroup([HOST] * 2, start, config=PATIENT, balance=BalanceConfig(every_steps=2))
    try:
        rank, runner = group.load(config, EngineRole.COLOCATED)
        assert any(note.endswith("; a share of them on rank 0 of 2") for note in rank.notes)
        assert rank.fingerprint == alone.fingerprint
        (elsewhere_said,) = group.notes
        assert re.fullmatch(
            r"rank 1: read \d MB in [\d.]+ s, with at most [\d.]+ [MG]B of host memory, mapped files among it",
            elsewhere_said,
        )
        ((done, total),) = group.loading
        assert 0 < done == total
        read, all_read = rank.loaded.bytes_read, alone.loaded.bytes_read
        with Checkpoint(config.model_dir) as checkpoint:
            text = checkpoint.config.text
        for name, inner in zip(("language", "vision_experts"), text.moe_intermediate_size, strict=True):
            elsewhere = len(text.sparse_layers) * text.moe_num_experts // 2 * 3 * inner * text.hidden_size
            assert all_read[name] - read[name] == elsewhere * stored_item_size()  # type: ignore[index]

        with rig_of(rank, group=joined(rank, runner)) as rig:
            assert rig.run(*wanted) == outputs
            assert min(runner.counters.rank_s) > 0
            assert runner.counters.balance is not None and runner.counters.balance.loads > 0
    finally:
        group.close()
    assert [process.is_alive() for process in group.processes.values()] == [False]


def stored_item_size() -> int:
    with Checkpoint(CONFIG.model_dir) as checkpoint:
        return checkpoint.load("model.language_model.layers.1.mlp.text_moe.experts.down_proj").element_size()


def test_a_rank_that_cannot_load_ends_the_group_with_its_reason() -> None:
    broken = replace(CONFIG, kv_cache_gib=1e-9)
    group = EngineGroup([HOST] * 2, child_ranks(broken), config=PATIENT)
    with pytest.raises(RankLost, match=r"(?s)rank 1 is lost: .*kv_cache_gib: 1e-09 holds no KV block"):
        group.load(CONFIG, EngineRole.COLOCATED)
    assert not group.processes[1].is_alive()


def test_a_leader_that_cannot_load_takes_its_ranks_along() -> None:
    group = EngineGroup([HOST] * 2, child_ranks(CONFIG), config=PATIENT)
    with pytest.raises(ValueError, match="kv_cache_gib: 1e-09 holds no KV block"):
        group.load(replace(CONFIG, kv_cache_gib=1e-9), EngineRole.COLOCATED)
    assert not group.processes[1].is_alive()


def test_a_process_that_ends_before_it_came_is_noticed() -> None:
    def start(_invitation: Invitation, seat: Seat) -> BaseProcess:
        process = CONTEXT.Process(target=int)
        process.start()
        return process

    with pytest.raises(RuntimeError, match=r"the processes of ranks \[1\] died at once"):
        EngineGroup([HOST] * 2, start, config=PATIENT)


@pytest.mark.parametrize(
    ("overrides", "size", "message"),
    [
        ({}, 64, "a group of 64 ranks cannot share the 8 experts of this model"),
        ({"text_config.mlp_layer_types": ["dense"] * 4}, 2, "a group of 2 ranks cannot share the 0 experts"),
    ],
)
def test_a_model_with_too_few_experts_is_refused(overrides: dict[str, Any], size: int, message: str) -> None:
    config = replace(CONFIG, model_dir=str(tiny_checkpoint(overrides=overrides)))
    seat = Seat(address="127.0.0.1:1", name="none", rank=0, size=size, host=HOST)
    with pytest.raises(ValueError, match=message):
        load_rank(config, EngineRole.COLOCATED, seat=seat)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention": "varlen"}, "attention: varlen cannot run here: the device is a cpu"),
        ({"cuda_graphs": True}, "cuda_graphs: they cannot run here: the device is a cpu"),
        ({"experts": "native"}, "native"),
    ],
)
def test_forms_that_were_named_and_cannot_run_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_rank(replace(CONFIG, **changes), EngineRole.DECODE)  # type: ignore[arg-type]


def test_forms_that_were_named_run() -> None:
    rank = load_rank(replace(CONFIG, attention="plain", experts="loop", cuda_graphs=False), EngineRole.DECODE)
    assert rank.runner.attention == "plain" and rank.runner.model.experts_form == "loop"
    with pytest.raises(ValueError, match=r"EngineReplicaConfig.attention must be one of plain, paged, varlen, got 'x'"):
        replace(CONFIG, attention="x")
