"""The same engine on a CUDA device: float64 gives the same tokens as on a CPU, and the arena fits what is left."""

from __future__ import annotations

import pytest
import torch

from actors.config import EngineReplicaConfig
from actors.engine_rank import load_rank
from actors.ernie.attention import PackedAttention
from actors.ernie.experts_form import ExpertsForm
from actors.ernie.weights import Checkpoint, load_vision
from actors.types import EngineRole, Grid
from tests.small_models import language_model, text_config
from tests.tiny_model import tiny_checkpoint
from tests.unit.engine.harness import Rig, media_request, request

CUDA = "cuda"


def test_float64_tokens_equal_the_cpus() -> None:
    wanted = [
        media_request(1),
        media_request(2, temperature=0.8, top_p=0.9),
        (request([5, 6, 7, 8], max_tokens=20), None),
    ]
    outputs = []
    for device in ("cpu", CUDA):
        model = language_model(text_config(), bank=False, device=device)
        bank = language_model(text_config()).vision_bank
        assert bank is not None
        _attach_copy(model, bank)
        with Rig(model, max_batched_tokens=16) as rig:
            outputs.append(rig.run(*wanted))
    assert outputs[0] == outputs[1]


def _attach_copy(model, bank) -> None:  # type: ignore[no-untyped-def]
    from actors.ernie.bank import VisionBank, empty_bank_buffer

    copy = VisionBank(model.config, model.dtype, empty_bank_buffer(model.config, model.dtype, model.device))
    views = copy.parameters_by_name()
    for name, tensor in bank.parameters_by_name().items():
        views[name].copy_(tensor)
    model.attach_vision_bank(copy)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.bfloat16, 0.3)])
@pytest.mark.parametrize("form", [ExpertsForm.LOOP, ExpertsForm.GROUPED])
def test_logits_are_near_float64_on_the_cpu(dtype: torch.dtype, tolerance: float, form: ExpertsForm) -> None:
    ids = torch.arange(3, 60)
    exact = _logits(language_model(text_config(), bank=False), ids)
    model = language_model(text_config(), dtype, bank=False, device=CUDA, experts_form=form)
    assert (_logits(model, ids) - exact).abs().mean() < tolerance


@torch.inference_mode()
def _logits(model, ids):  # type: ignore[no-untyped-def]
    ids = ids.to(model.device)
    positions = torch.arange(len(ids), device=model.device).expand(3, -1)
    h_TD = model.forward(model.embed(ids), positions, None, PackedAttention([0, len(ids)]))
    return model.logits(h_TD).double().cpu()


def test_embeddings_equal_the_cpus_in_float64() -> None:
    directory = tiny_checkpoint()
    grids = [Grid(1, 4, 6), Grid(2, 4, 4), Grid(1, 2, 8)]
    patches = torch.randint(0, 256, (sum(grid.patches for grid in grids), 588), dtype=torch.uint8)
    outputs = []
    for device in ("cpu", CUDA):
        with Checkpoint(directory) as checkpoint, torch.inference_mode():
            model = load_vision(checkpoint, checkpoint.config, dtype=torch.float64, device=device)
            outputs.append([unit.cpu() for unit in model.encode(patches.to(device), grids)])
    for ours, theirs in zip(*outputs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


@pytest.mark.parametrize("role", [EngineRole.PREFILL, EngineRole.DECODE])
def test_the_arena_takes_what_the_device_has_left(role: EngineRole) -> None:
    config = EngineReplicaConfig(
        model_dir=str(tiny_checkpoint(dtype="bfloat16")),
        pool="engine",
        dtype="bfloat16",
        device=CUDA,
        gpu_memory_utilization=0.5,
    )
    _, total = torch.cuda.mem_get_info()
    rank = load_rank(config, role)
    free, _ = torch.cuda.mem_get_info()
    assert 0.45 * total < free < 0.6 * total
    assert (rank.runner.model.vision_bank is None) == (role is EngineRole.DECODE)
    del rank
    torch.cuda.empty_cache()
