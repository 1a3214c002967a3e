"""From files to tokens: a checkpoint, its vision tower, an arena with the bank in its tail."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch

from actors.engine.execution.arena import Arena, ArenaPlan, arena_bytes
from actors.engine.execution.kv_cache import KvCache
from actors.engine.execution.runner import RoleChange, Runner
from actors.engine.execution.vision_tail import VisionTail
from actors.engine.group.group_runner import GroupRunner
from actors.ernie.bank import vision_bank_bytes
from actors.ernie.config import ErnieConfig, Rules
from actors.ernie.text import LanguageModel
from actors.ernie.weights import Checkpoint, load_language, load_vision, load_vision_bank
from actors.types import EngineRequest, Grid, MediaKind
from tests.tiny_model import tiny_checkpoint
from tests.unit.engine.harness import Rig, kv_layout, request, span
from tests.unit.engine.test_engine import Embeddings, plain_greedy

BLOCK_SIZE, BLOCKS = 8, 60


@pytest.fixture(scope="module")
def checkpoint() -> Iterator[Checkpoint]:
    with Checkpoint(tiny_checkpoint()) as opened:
        yield opened


def make_rig(checkpoint: Checkpoint, *, with_bank: bool, **options: Any) -> tuple[Rig, Arena]:
    config = checkpoint.config
    bank_bytes = vision_bank_bytes(config.text, torch.float64)
    probe = kv_layout(LanguageModel(config.text, dtype=torch.float64, device="meta"), BLOCK_SIZE)
    size = arena_bytes(BLOCKS, probe.block_bytes, bank_bytes)
    arena = Arena(ArenaPlan(size_bytes=size, block_bytes=probe.block_bytes, bank_bytes=bank_bytes))
    model = load_language(checkpoint, config, dtype=torch.float64)
    roles = RoleChange(tail=VisionTail(arena, model), fill=partial(load_vision_bank, checkpoint))
    if with_bank:
        roles.tail.hold_bank(roles.fill)

    def join(runner: Runner) -> GroupRunner:
        runner.roles = roles
        return GroupRunner(runner)

    cache = KvCache(probe, arena.block_storage())
    return Rig(model, config=config, cache=cache, block_size=BLOCK_SIZE, group=join, **options), arena


def image_and_video(checkpoint: Checkpoint, config: ErnieConfig) -> tuple[EngineRequest, Embeddings]:
    """Random pixels through the checkpoint's own tower; the video is longer than it is wide."""
    vision = load_vision(checkpoint, config, dtype=torch.float64)
    generator = torch.Generator().manual_seed(5)
    image, video = Grid(1, 4, 6), Grid(8, 4, 4)
    embeddings: Embeddings = {}
    for media, grid in enumerate((image, video)):
        units = [grid.unit] * grid.units
        patches = torch.randint(0, 256, (grid.patches, 588), generator=generator).to(torch.uint8)
        for unit, embedding in enumerate(vision.encode(patches, units)):
            embeddings[media, unit] = embedding
    text = torch.randint(3, config.im_patch_id, (14,), generator=generator).tolist()
    start, end = config.image_start_token_id, config.image_end_token_id
    prompt = [*text[:5], start, *[config.image_token_id] * image.tokens, end]
    offset = len(prompt) + 1
    prompt += [config.video_start_token_id, *[config.video_token_id] * video.tokens, config.video_end_token_id, *text]
    spans = [span(MediaKind.IMAGE, 6, image), span(MediaKind.VIDEO, offset, video)]
    return request(prompt, media=spans, max_tokens=10), embeddings


@pytest.mark.parametrize("rules", [Rules.original(), Rules.transformers()])
@torch.inference_mode()
def test_media_prompt_from_a_checkpoint(checkpoint: Checkpoint, rules: Rules) -> None:
    wanted = image_and_video(checkpoint, checkpoint.config)
    rig, arena = make_rig(checkpoint, with_bank=True, rules=rules, max_batched_tokens=13)
    before = arena.bank_storage().clone()
    with rig:
        assert rig.run(wanted) == [plain_greedy(rig.model, rig.config, rules, *wanted)]
    assert torch.equal(arena.bank_storage(), before), "a block reached into the vision bank"


def test_decode_engine_uses_the_tail_as_blocks(checkpoint: Checkpoint) -> None:
    with_bank, arena = make_rig(checkpoint, with_bank=True)
    without, _ = make_rig(checkpoint, with_bank=False)
    assert with_bank.runner.block_count == arena.plan.blocks_beside_bank == BLOCKS
    assert without.runner.block_count == arena.plan.blocks_without_bank > BLOCKS
    wanted = request([7, 8, 9], max_tokens=20)
    with with_bank, without:
        assert with_bank.run(wanted) == without.run(wanted)
