from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from actors.ernie.bank import ALIGNMENT, VisionBank, empty_bank_buffer, vision_bank_bytes
from actors.parallel.layout import ExpertLayout, ExpertPlacement, ExpertShare
from tests.small_models import text_config


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_tensors_are_aligned_views_of_the_buffer(dtype: torch.dtype) -> None:
    config = text_config(moe_num_experts=5, hidden_size=42)
    arena = torch.zeros(ALIGNMENT + vision_bank_bytes(config, dtype) + 10, dtype=torch.uint8)
    buffer = arena[ALIGNMENT:]
    bank = VisionBank(config, dtype, buffer)
    spans = []
    for view in bank.parameters_by_name().values():
        start = view.data_ptr() - buffer.data_ptr()
        assert start % ALIGNMENT == 0
        spans.append((start, start + view.nbytes))
        view.fill_(1)
    spans.sort()
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))
    assert spans[-1][1] <= vision_bank_bytes(config, dtype)
    assert arena[:ALIGNMENT].sum() == 0
    assert arena[-10:].sum() == 0


def test_names_shapes_and_dtypes() -> None:
    config = text_config()
    views = VisionBank(config, torch.bfloat16, empty_bank_buffer(config, torch.bfloat16)).parameters_by_name()
    prefix = "model.language_model.layers.2.mlp.vision_moe"
    assert {name: (tuple(v.shape), v.dtype) for name, v in views.items() if name.startswith(prefix)} == {
        f"{prefix}.gate.weight": ((8, 48), torch.float32),
        f"{prefix}.gate.moe_statics.e_score_correction_bias": ((1, 8), torch.float32),
        f"{prefix}.experts.gate_up_proj": ((8, 32, 48), torch.bfloat16),
        f"{prefix}.experts.down_proj": ((8, 48, 16), torch.bfloat16),
    }
    assert len(views) == 8


def test_a_share_has_whole_routers_and_its_own_experts() -> None:
    config = text_config()
    layout = ExpertLayout(text=((0, 1, 2, 3), (4, 5, 6, 7)), vision=((5, 0, 1), (2, 3, 4, 6, 7)))
    share = ExpertShare(ExpertPlacement((None, layout, layout)), 0)
    bank = VisionBank(config, torch.float32, empty_bank_buffer(config, torch.float32, share=share), share)
    prefix = "model.language_model.layers.2.mlp.vision_moe"
    shapes = {name: tuple(view.shape) for name, view in bank.parameters_by_name().items()}
    assert shapes[f"{prefix}.gate.weight"] == (8, 48)
    assert shapes[f"{prefix}.experts.gate_up_proj"] == (3, 32, 48)
    assert bank.expert_rows()[f"{prefix}.experts.down_proj"] == (5, 0, 1)
    saved = 2 * 5 * (32 * 48 + 48 * 16) * 4
    assert vision_bank_bytes(config, torch.float32) - vision_bank_bytes(config, torch.float32, share) == saved


def test_size_of_the_28b_bank() -> None:
    """27 layers of 64 experts of 512 and their fp32 routers; nothing needs padding at these sizes."""
    config = text_config(
        hidden_size=2560,
        num_hidden_layers=28,
        mlp_layer_types=("dense",) + ("sparse",) * 27,
        moe_num_experts=64,
        moe_intermediate_size=(1536, 512),
    )
    assert vision_bank_bytes(config, torch.bfloat16) == 2 * 6_794_772_480 + 4 * 27 * 64 * 2561


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda size: torch.empty(size - 1, dtype=torch.uint8), "bytes"),
        (lambda size: torch.empty(size, dtype=torch.int8), "uint8"),
        (lambda size: torch.empty(2 * size, dtype=torch.uint8)[::2], "contiguous"),
        (lambda size: torch.empty(size + 64, dtype=torch.uint8)[64:], "multiple"),
    ],
)
def test_unfit_buffers_are_refused(make: object, message: str) -> None:
    config = text_config()
    buffer = make(vision_bank_bytes(config, torch.float32))  # type: ignore[operator]
    with pytest.raises(ValueError, match=message):
        VisionBank(config, torch.float32, buffer)
