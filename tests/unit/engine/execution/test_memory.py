"""Arena, KV cache, and how much they get."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from actors.engine.execution import memory
from actors.engine.execution.arena import ALIGNMENT, Arena, ArenaPlan, arena_bytes
from actors.engine.execution.kv_cache import KvCache, KvLayout
from actors.ernie.bank import VisionBank, vision_bank_bytes
from tests.small_models import text_config

LAYOUT = KvLayout(num_layers=3, block_size=4, num_kv_heads=2, head_dim=5, dtype=torch.float64)


def test_bank_lies_in_the_tail_and_becomes_blocks() -> None:
    plan = ArenaPlan(size_bytes=100_000, block_bytes=1000, bank_bytes=30_000)
    assert plan.bank_offset % ALIGNMENT == 0
    assert plan.bank_offset + plan.bank_bytes <= plan.size_bytes
    assert plan.blocks_beside_bank == plan.bank_offset // 1000
    assert plan.blocks_without_bank == 100
    arena = Arena(plan)
    bank, blocks = arena.bank_storage(), arena.block_storage()
    bank.fill_(7)
    beside = blocks[: plan.blocks_beside_bank * 1000]
    assert not beside.any() and blocks[len(beside) :].any()
    assert blocks.data_ptr() == arena.bytes.data_ptr()
    assert (blocks.numel(), bank.numel()) == (100_000, 30_000)


def test_arena_bytes_is_enough_and_no_block_more() -> None:
    for blocks, block_bytes, bank_bytes in [(1, 1000, 1), (7, 960, 5000), (3, 8192, 4096), (9, 100, 0)]:
        size = arena_bytes(blocks, block_bytes, bank_bytes)
        plan = ArenaPlan(size_bytes=size, block_bytes=block_bytes, bank_bytes=bank_bytes)
        assert blocks <= plan.blocks_beside_bank < blocks + 1 + ALIGNMENT // block_bytes


def test_arena_refuses_what_cannot_work() -> None:
    with pytest.raises(ValueError, match="holds no KV block of 1000 bytes beside a vision bank of 9000 bytes"):
        ArenaPlan(size_bytes=9500, block_bytes=1000, bank_bytes=9000)
    with pytest.raises(ValueError, match="without a vision bank"):
        Arena(ArenaPlan(size_bytes=1000, block_bytes=100, bank_bytes=0)).bank_storage()


def test_a_vision_bank_fits_its_tail() -> None:
    config = text_config()
    need = vision_bank_bytes(config, torch.float64)
    plan = ArenaPlan(
        size_bytes=arena_bytes(2, LAYOUT.block_bytes, need), block_bytes=LAYOUT.block_bytes, bank_bytes=need
    )
    VisionBank(config, torch.float64, Arena(plan).bank_storage())


def test_block_is_one_run_of_layer_kind_token_head() -> None:
    cache = KvCache.allocate(LAYOUT, 6)
    kv = torch.randn(3, 2, 2, 5, dtype=torch.float64)
    cache.write_tokens(2, [4, 1], 3, kv)
    blocks = cache.rows.view(6, 3, 2, 4, 2, 5)
    assert torch.equal(blocks[4, 2, :, 3], kv[0])
    assert torch.equal(blocks[1, 2, :, 0], kv[1])
    assert torch.equal(blocks[1, 2, :, 1], kv[2])
    assert int((cache.rows != 0).any(1).sum()) == 6


def test_tokens_survive_a_move_to_other_blocks() -> None:
    ours, theirs = KvCache.allocate(LAYOUT, 8), KvCache.allocate(LAYOUT, 5)
    ours.rows.copy_(torch.randn(ours.rows.shape, dtype=torch.float64))
    for layer in range(3):
        kv = ours.read_tokens(layer, [7, 2, 5], 1, 9)
        assert kv.shape == (9, 2, 2, 5)
        theirs.write_tokens(layer, [0, 4, 3], 1, kv)
        assert torch.equal(theirs.read_tokens(layer, [0, 4, 3], 1, 9), kv)
        assert torch.equal(theirs.read_tokens(layer, [0, 4, 3], 5, 2), kv[4:6])


def test_cache_refuses_wrong_buffers_shapes_and_ranges() -> None:
    with pytest.raises(ValueError, match="uint8"):
        KvCache(LAYOUT, torch.zeros(LAYOUT.block_bytes, dtype=torch.int8))
    with pytest.raises(ValueError, match="whole number"):
        KvCache(LAYOUT, torch.zeros(LAYOUT.block_bytes + 1, dtype=torch.uint8))
    cache = KvCache.allocate(LAYOUT, 2)
    with pytest.raises(ValueError, match="expected"):
        cache.write_tokens(0, [0], 0, torch.zeros(1, 2, 5, 2, dtype=torch.float64))
    with pytest.raises(ValueError, match="expected"):
        cache.write_tokens(0, [0], 0, torch.zeros(1, 2, 2, 5, dtype=torch.float32))
    with pytest.raises(ValueError, match="outside a table of 1 blocks"):
        cache.read_tokens(0, [0], 2, 3)
    with pytest.raises(ValueError, match="layer 3 of 3"):
        cache.read_tokens(3, [0], 0, 1)


def test_layout_sizes() -> None:
    assert LAYOUT.block_bytes == 3 * 2 * 4 * 2 * 5 * 8
    assert LAYOUT.token_bytes == 3 * 2 * 2 * 5 * 8


def test_layer_pages_are_views_of_the_blocks() -> None:
    cache = KvCache.allocate(LAYOUT, 6)
    cache.write_tokens(1, [4, 1], 3, kv := torch.randn(3, 2, 2, 5, dtype=torch.float64))
    keys, values = cache.layer_pages(1)
    assert keys.shape == values.shape == (6, 4, 2, 5)
    assert keys.stride(0) * 8 == LAYOUT.block_bytes
    assert torch.equal(torch.stack((keys[4, 3], values[4, 3])), kv[0])
    assert torch.equal(torch.stack((keys[1, :2], values[1, :2]), dim=1), kv[1:])


# How much

PLAN = ArenaPlan(size_bytes=100 << 20, block_bytes=LAYOUT.block_bytes, bank_bytes=40 << 20)


def test_the_arena_says_what_it_holds() -> None:
    with_bank = memory.describe(PLAN, LAYOUT, 1000, has_bank=True)
    beside, alone = PLAN.blocks_beside_bank, PLAN.blocks_without_bank
    assert with_bank == (
        f"KV arena of 0.10 GiB: {beside * 4} tokens in {beside} blocks, {beside * 4 / 1000:.1f} sequences of 1000, "
        f"beside 0.04 GiB of vision experts; without them {alone * 4} tokens in {alone} blocks, "
        f"{alone * 4 / 1000:.1f} sequences of 1000"
    )
    without = memory.describe(PLAN, LAYOUT, 1000, has_bank=False)
    assert without.startswith(f"KV arena of 0.10 GiB: {alone * 4} tokens") and f"experts {beside * 4} tokens" in without
    no_bank = ArenaPlan(size_bytes=1 << 20, block_bytes=LAYOUT.block_bytes, bank_bytes=0)
    assert "vision" not in memory.describe(no_bank, LAYOUT, 1000, has_bank=False)


def check(length: int, *, configured: bool, has_bank: bool = True) -> str | None:
    return memory.check_model_len(
        PLAN, LAYOUT, length, has_bank=has_bank, configured=configured, option="gpu_memory_utilization"
    )


def test_a_length_that_fits_is_no_matter_and_one_that_does_not_is_told() -> None:
    beside, alone = PLAN.blocks_beside_bank * 4, PLAN.blocks_without_bank * 4
    assert check(beside, configured=True) is None
    assert check(alone, configured=True, has_bank=False) is None
    warning = check(beside + 1, configured=False)
    assert warning is not None
    assert warning.startswith(f"prompt and reply together are bounded by {beside} tokens: a sequence of {beside + 1}")
    assert warning.endswith("give more with gpu_memory_utilization")
    with pytest.raises(ValueError, match=rf"^max_model_len: .*set it to {beside} or less, .*gpu_memory_ut"):
        check(beside + 1, configured=True)


def room(**changes: int | float) -> int:
    fields = {
        "free": 90 << 30,
        "total": 140 << 30,
        "utilization": 0.9,
        "activations": 2 << 30,
        "max_num_seqs": 64,
        "prompt_logprob_rows": 256,
        "vocab_size": 100_000,
        "graphs": 0,
    }
    return memory.gpu_room(**(fields | changes))  # type: ignore[arg-type]


def test_a_gpu_gives_what_the_others_leave() -> None:
    base = room()
    # 10 % of 140 GiB stays free; 256 rows of prompt logits at 16 bytes outweigh 64 rows of sampling at 48.
    assert base == (90 << 30) - (14 << 30) - (2 << 30) - 256 * 100_000 * 16
    assert base - room(max_num_seqs=256) == 256 * 100_000 * (48 - 16)
    assert base - room(graphs=10) == (2 << 30) + 10 * memory.GRAPH_BYTES
    assert room(utilization=0.8) == base - (14 << 30)
    assert room(free=1 << 30) < 0


def test_a_cpu_gives_a_share_with_a_bound() -> None:
    assert memory.host_share(16 << 30) == 2 << 30
    assert memory.host_share(1 << 40) == 4 << 30


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        ({}, 1000 << 10),
        ({"sys/fs/cgroup/memory.max": "max\n", "sys/fs/cgroup/memory.current": "5\n"}, 1000 << 10),
        ({"sys/fs/cgroup/memory.max": "900000\n", "sys/fs/cgroup/memory.current": "100000\n"}, 800_000),
        ({"sys/fs/cgroup/memory.max": "9\n", "sys/fs/cgroup/memory.current": "10\n"}, 0),
        (
            {
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "700000",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "200000",
            },
            500_000,
        ),
    ],
)
def test_free_memory_is_the_systems_or_the_cgroups(tmp_path: Path, files: dict[str, str], wanted: int) -> None:
    files = {"proc/meminfo": "MemTotal:       2000 kB\nMemAvailable:   1000 kB\n"} | files
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert memory.available_host_bytes(tmp_path) == wanted
