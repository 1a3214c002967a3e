"""Arena and KV cache."""

from __future__ import annotations

import pytest
import torch

from actors.engine.arena import ALIGNMENT, Arena, ArenaPlan, arena_bytes
from actors.engine.kv_cache import KvCache, KvLayout
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
    bank, beside, everything = (
        arena.bank_storage(),
        arena.block_storage(with_bank=True),
        arena.block_storage(with_bank=False),
    )
    bank.fill_(7)
    assert not beside.any()
    assert everything.any()
    assert beside.data_ptr() == everything.data_ptr() == arena.bytes.data_ptr()
    assert (beside.numel(), everything.numel(), bank.numel()) == (plan.blocks_beside_bank * 1000, 100_000, 30_000)


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
