from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from actors.ernie.attention import PackedAttention
from actors.ernie.bank import VisionBank, empty_bank_buffer
from actors.ernie.experts_form import ExpertsForm
from actors.ernie.positions import prompt_positions
from actors.ernie.text import LanguageModel
from actors.parallel.dispatch import LocalDispatcher
from actors.parallel.layout import ExpertShare, even_placement
from actors.types import Grid
from tests.small_models import language_model, text_config


class DenseCache:
    """Keys and values of one sequence, layer by layer; a query sees everything up to itself."""

    def __init__(self) -> None:
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}

    def attend(self, layer: int, q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor) -> Tensor:
        if layer in self.kept:
            k_TKd, v_TKd = (torch.cat([old, new]) for old, new in zip(self.kept[layer], (k_TKd, v_TKd), strict=True))
        self.kept[layer] = k_TKd, v_TKd
        past = k_TKd.shape[0] - q_THd.shape[0]
        mask = torch.ones(q_THd.shape[0], k_TKd.shape[0], dtype=torch.bool).tril(past)
        q, k, v = (x.transpose(0, 1) for x in (q_THd, k_TKd, v_TKd))
        out = F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask, enable_gqa=True)
        return out[0].transpose(0, 1)


class Sequence:
    """Random embeddings with a medium in the middle."""

    def __init__(self, seed: int, length: int, grid: Grid | None, dtype: torch.dtype = torch.float64) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x_TD = torch.randn(length, 48, generator=generator, dtype=torch.float64).to(dtype)
        spans = [] if grid is None else [(2, grid)]
        self.positions_3T = torch.from_numpy(prompt_positions(length, spans, "original")[0])
        self.vision_T = torch.zeros(length, dtype=torch.bool)
        if grid is not None:
            self.vision_T[1 : 3 + grid.tokens] = True

    def __len__(self) -> int:
        return self.x_TD.shape[0]

    def forward(self, model: LanguageModel, attention: Any = None, start: int = 0, end: int | None = None) -> Tensor:
        part = slice(start, end)
        attention = attention or PackedAttention([0, len(self)])
        h_TD = model.forward(self.x_TD[part], self.positions_3T[:, part], self.vision_T[part], attention)
        return model.logits(h_TD)


def test_chunks_through_a_cache_equal_the_whole_prompt() -> None:
    model = language_model(text_config())
    sequence = Sequence(0, 21, Grid(4, 4, 4))
    cache, edges = DenseCache(), [0, 5, 6, 13, 20, 21]
    chunks = [sequence.forward(model, cache, a, b) for a, b in pairwise(edges)]
    torch.testing.assert_close(torch.cat(chunks), sequence.forward(model), atol=1e-10, rtol=0)


def test_sequences_in_one_flat_batch_equal_each_alone() -> None:
    model = language_model(text_config())
    sequences = [
        Sequence(1, 17, Grid(1, 4, 6)),
        Sequence(2, 5, None),
        Sequence(3, 12, Grid(2, 4, 4)),
        Sequence(4, 1, None),
    ]
    bounds = [0, 17, 22, 34, 35]
    h_TD = model.forward(
        torch.cat([s.x_TD for s in sequences]),
        torch.cat([s.positions_3T for s in sequences], dim=1),
        torch.cat([s.vision_T for s in sequences]),
        PackedAttention(bounds),
    )
    alone = torch.cat([s.forward(model) for s in sequences])
    torch.testing.assert_close(model.logits(h_TD), alone, atol=1e-10, rtol=0)


def test_the_vision_mask_changes_the_result() -> None:
    model = language_model(text_config())
    sequence = Sequence(5, 12, Grid(1, 4, 4))
    with_mask = sequence.forward(model)
    sequence.vision_T = torch.zeros_like(sequence.vision_T)
    assert (sequence.forward(model) - with_mask).abs().max() > 0.01


def test_without_the_bank_text_is_the_same_and_vision_tokens_raise() -> None:
    model = language_model(text_config())
    text, mixed = Sequence(6, 9, None), Sequence(7, 12, Grid(1, 4, 4))
    with_bank, mixed_with_bank, bank = text.forward(model), mixed.forward(model), model.vision_bank
    assert bank is not None
    model.detach_vision_bank()
    assert model.vision_bank is None
    assert torch.equal(text.forward(model), with_bank)
    assert torch.equal(
        model.logits(model.forward(text.x_TD, text.positions_3T, None, PackedAttention([0, 9]))), with_bank
    )
    with pytest.raises(ValueError, match="no vision expert bank"):
        mixed.forward(model)
    model.attach_vision_bank(bank)
    assert torch.equal(mixed.forward(model), mixed_with_bank)


def test_a_bank_of_another_layout_is_refused() -> None:
    model = language_model(text_config(), bank=False)
    other = text_config(moe_intermediate_size=(32, 24))
    with pytest.raises(ValueError, match="another model"):
        model.attach_vision_bank(VisionBank(other, torch.float64, empty_bank_buffer(other, torch.float64)))


def test_a_share_needs_its_group_and_its_own_bank() -> None:
    config = text_config()
    share, other = (ExpertShare(even_placement(3, (1, 2), 8, 2), rank) for rank in range(2))
    model = LanguageModel(config, dtype=torch.float64, share=share)
    assert model.expert_rows()["model.language_model.layers.2.mlp.text_moe.experts.down_proj"] == (0, 1, 2, 3)
    assert model.parameters_by_name()["model.language_model.layers.2.mlp.text_moe.gate.weight"].shape == (8, 48)
    with pytest.raises(ValueError, match="dispatcher of its group"):
        Sequence(6, 9, None).forward(model)
    buffer = empty_bank_buffer(config, torch.float64, share=other)
    with pytest.raises(ValueError, match="another share"):
        model.attach_vision_bank(VisionBank(config, torch.float64, buffer, other))
    model.attach_vision_bank(VisionBank(config, torch.float64, buffer, share))


def test_one_dispatch_and_one_combine_per_sparse_layer_whatever_the_mix() -> None:
    calls: list[str] = []

    class Counting(LocalDispatcher):
        def dispatch(self, layer: int, x_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor) -> Any:
            calls.append(f"dispatch {layer}")
            return super().dispatch(layer, x_TD, expert_ids_TK, weights_TK)

        def combine(self, rows_ND: Tensor, metadata: Any) -> Tensor:
            calls.append("combine")
            return super().combine(rows_ND, metadata)

    model = language_model(text_config(), dispatcher=Counting(16))
    for sequence in (Sequence(8, 12, Grid(1, 4, 4)), Sequence(9, 4, None)):
        calls.clear()
        sequence.forward(model)
        assert calls == ["dispatch 1", "combine", "dispatch 2", "combine"]


def test_forward_leaves_its_input_alone() -> None:
    model, sequence = language_model(text_config()), Sequence(0, 12, Grid(1, 4, 4))
    before = sequence.x_TD.clone()
    sequence.forward(model)
    assert torch.equal(sequence.x_TD, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_experts_equal_the_plain_form(dtype: torch.dtype) -> None:
    plain = language_model(text_config(), dtype, experts_form=ExpertsForm.LOOP)
    grouped = language_model(text_config(), dtype, experts_form=ExpertsForm.GROUPED)
    for sequence in (Sequence(1, 15, Grid(1, 4, 4), dtype), Sequence(2, 7, None, dtype)):
        torch.testing.assert_close(sequence.forward(grouped), sequence.forward(plain))


def test_grouped_experts_refuse_float64() -> None:
    with pytest.raises(ValueError, match="float64"):
        LanguageModel(text_config(), dtype=torch.float64, experts_form=ExpertsForm.GROUPED)


def test_native_form_keeps_the_distance_of_bfloat16() -> None:
    """Rounding differs and may tip an expert, so single logits can be far apart; on average they are as near to float64
    as the plain form's."""
    config = text_config()
    try:
        native = language_model(config, torch.bfloat16, experts_form=ExpertsForm.NATIVE)
    except ValueError as error:
        pytest.skip(str(error))
    plain = language_model(config, torch.bfloat16, experts_form=ExpertsForm.LOOP)
    assert plain.kernels is None and native.kernels is not None
    exact = Sequence(3, 40, Grid(1, 4, 4)).forward(language_model(config))
    sequence = Sequence(3, 40, Grid(1, 4, 4), torch.bfloat16)
    errors = [(sequence.forward(model) - exact).abs().mean() for model in (native, plain)]
    assert errors[0] < 1.2 * errors[1]
    assert errors[0] < 0.1 * exact.std()


def test_dtypes() -> None:
    """bfloat16 keeps its distance: most positions agree with float64, and logits are float32."""
    exact = Sequence(3, 40, Grid(1, 4, 4)).forward(language_model(text_config()))
    single = Sequence(3, 40, Grid(1, 4, 4), torch.float32).forward(language_model(text_config(), torch.float32))
    half = Sequence(3, 40, Grid(1, 4, 4), torch.bfloat16).forward(language_model(text_config(), torch.bfloat16))
    assert (exact.dtype, single.dtype, half.dtype) == (torch.float64, torch.float32, torch.float32)
    assert (single - exact).abs().max() < 1e-4
    assert (half - exact).abs().mean() < 0.1 * exact.std()


def test_every_parameter_has_a_place_of_its_own() -> None:
    config = text_config(tie_word_embeddings=False)
    model = LanguageModel(config, dtype=torch.float32)
    views = model.parameters_by_name()
    for view in views.values():
        view.zero_()
    for view in views.values():
        assert not view.any()
        view.fill_(1)
    assert views["lm_head.weight"].data_ptr() != views["model.language_model.embed_tokens.weight"].data_ptr()
    assert model.layers[1].qkv.weight_OI.all()


def test_a_batch_of_no_tokens() -> None:
    model = language_model(text_config())
    nothing = Sequence(0, 0, None)
    assert nothing.forward(model).shape == (0, 128)


def test_shapes_cost_nothing_on_the_meta_device() -> None:
    model = LanguageModel(text_config(vocab_size=10**9), dtype=torch.bfloat16, device="meta")
    assert model.parameters_by_name()["model.language_model.embed_tokens.weight"].shape == (10**9, 48)
