"""The GPU's own forms against the plain ones: varlen attention, grouped experts, CUDA graphs."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from actors.config import EngineReplicaConfig
from actors.engine.execution.attention import PagedAttention, PlainAttention
from actors.engine.execution.attention_varlen import VarlenAttention
from actors.engine.execution.decode_graphs import CudaRecorder, DecodeGraphs, graph_sizes
from actors.engine.execution.forms import AttentionForm, varlen_obstacle
from actors.engine.execution.kv_cache import KvCache, KvLayout
from actors.engine.execution.step_batch import Chunk, StepBatch, StepLayout
from actors.engine_rank import load_rank
from actors.ernie.experts_form import ExpertsForm
from actors.ernie.text import LanguageModel
from actors.types import EngineRole
from tests.small_models import language_model, text_config
from tests.tiny_model import tiny_checkpoint
from tests.unit.engine.execution.runner_rig import RunnerRig
from tests.unit.engine.harness import Rig, media_request, request

BLOCK = 256
HEADS, KV_HEADS, WIDTH = 20, 4, 128


def layout(block_size: int = BLOCK, layers: int = 3) -> KvLayout:
    return KvLayout(
        num_layers=layers, block_size=block_size, num_kv_heads=KV_HEADS, head_dim=WIDTH, dtype=torch.bfloat16
    )


def require_varlen(kv: KvLayout, heads: int) -> None:
    obstacle = varlen_obstacle(torch.device("cuda"), kv, heads)
    if obstacle is not None:
        pytest.skip(f"no varlen attention here: {obstacle}")


@pytest.mark.parametrize("block_size", [16, 256])
def test_what_varlen_attention_says_of_block_sizes(block_size: int) -> None:
    """No claim: run with ``-s``, it tells which block sizes the kernels of this torch take."""
    print(f"block_size {block_size}: {varlen_obstacle(torch.device('cuda'), layout(block_size), HEADS)}")


@torch.inference_mode()
def test_varlen_attention_equals_the_plain_form_on_long_ragged_contexts() -> None:
    require_varlen(layout(), HEADS)
    generator = torch.Generator("cuda").manual_seed(0)
    caches = [KvCache.allocate(layout(), 160, "cuda") for _ in range(3)]
    noise = torch.randn(caches[0].pages.shape, generator=generator, device="cuda", dtype=torch.bfloat16)
    for cache in caches:
        cache.pages.copy_(noise)
    tables = np.random.default_rng(0).permutation(160).reshape(5, 32)
    step = StepLayout(
        contexts_n=np.array([1, 700, 8000]),
        tables_nP=tables[:3],
        chunks=(
            Chunk(start=3, first=0, count=300, blocks=tables[3]),
            Chunk(start=303, first=5000, count=513, blocks=tables[4]),
        ),
    )
    q, k, v = (
        torch.randn(step.token_count, heads, WIDTH, generator=generator, device="cuda", dtype=torch.bfloat16)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    want = PlainAttention(caches[0], step).attend(2, q, k, v)
    for got in (
        VarlenAttention.of_layout(caches[1], step).attend(2, q, k, v),
        PagedAttention(caches[2], step).attend(2, q, k, v),
    ):
        torch.testing.assert_close(got, want, rtol=0, atol=0.02)


def small(dtype: torch.dtype, **options: Any) -> LanguageModel:
    """Text only: heads of the width the kernels like."""
    config = text_config(head_dim=64, mrope_section=(12, 12, 8), max_position_embeddings=8192)
    return language_model(config, dtype, bank=False, **options)


def test_graphs_equal_the_same_steps_run_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small(torch.bfloat16, device="cuda", experts_form=ExpertsForm.GROUPED)
    rig = RunnerRig(model, blocks=64, block_size=BLOCK, attention=AttentionForm.VARLEN)
    require_varlen(rig.cache.layout, model.config.num_attention_heads)
    graphs = DecodeGraphs(model, rig.cache, sizes=graph_sizes(16), max_context=2 * BLOCK, recorder=CudaRecorder())
    eager = rig.runner._forward
    compared: list[int] = []

    def both(batch: StepBatch) -> Tensor:
        want = eager(batch)
        if graphs.fits(batch.layout):
            torch.testing.assert_close(graphs.run(batch), want, rtol=0.02, atol=0.05)
            compared.append(batch.layout.decode_count)
        return want

    monkeypatch.setattr(rig.runner, "_forward", both)
    ids = [rig.add(length) for length in (250, 1, 17, 300, 40, 254, 9, 77, 5)]
    for id in ids:
        rig.step({id: len(rig.driven[id].tokens)})
    for count in (9, 8, 3, 2, 1, 9):
        for _ in range(3):
            rig.step(dict.fromkeys(ids[:count], 1))
    assert compared == [count for count in (9, 8, 3, 2, 1, 9) for _ in range(3)]


def test_greedy_tokens_in_float32_equal_the_cpus() -> None:
    wanted = [request(list(range(3 + i, 40 + 3 * i)), max_tokens=24) for i in range(5)]
    outputs = []
    for device in ("cpu", "cuda"):
        with Rig(small(torch.float32, device=device), max_batched_tokens=24) as rig:
            outputs.append(rig.run(*wanted))
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize("form", [ExpertsForm.LOOP, ExpertsForm.GROUPED])
def test_media_prompts_run_with_both_banks(form: ExpertsForm) -> None:
    from tests.gpu.test_engine_on_gpu import _attach_copy

    model = language_model(text_config(), torch.bfloat16, bank=False, device="cuda", experts_form=form)
    bank = language_model(text_config(), torch.bfloat16).vision_bank
    assert bank is not None
    _attach_copy(model, bank)
    with Rig(model, max_batched_tokens=16) as rig:
        outputs = rig.run(media_request(1, max_tokens=6), media_request(2, max_tokens=6))
    assert [len(output) for output in outputs] == [6, 6]


def test_a_rank_chooses_what_the_device_can_and_says_it(caplog: pytest.LogCaptureFixture) -> None:
    config = EngineReplicaConfig(
        model_dir=str(tiny_checkpoint(dtype="bfloat16")),
        pool="engine",
        dtype="bfloat16",
        device="cuda",
        gpu_memory_utilization=0.3,
        block_size=BLOCK,
        max_num_seqs=16,
    )
    with caplog.at_level(logging.INFO):
        rank = load_rank(config, EngineRole.DECODE)
    print(caplog.text)
    assert rank.runner.model.experts_form is ExpertsForm.GROUPED
    graphed = rank.runner.attention is AttentionForm.VARLEN
    assert (rank.runner.graphs is not None) == graphed
    assert graphed or "instead of varlen, which cannot run here" in caplog.text
