from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from actors.ernie.experts_form import ExpertsForm
from actors.ernie.moe import ExpertBank, bank_shapes, route, run_experts
from actors.kernels.compiler import KernelUnavailable
from actors.kernels.cpu import load_cpu_kernels
from tests.small_models import text_config

WIDTH, EXPERTS = 48, 8


def bank(inner: int, seed: int, dtype: torch.dtype = torch.float64) -> ExpertBank:
    generator = torch.Generator().manual_seed(seed)
    shapes = bank_shapes(text_config(), inner, dtype)
    tensors = {name: torch.randn(shape, generator=generator) * shape[-1] ** -0.5 for name, (shape, _) in shapes.items()}
    return ExpertBank(**{name: tensor.to(shapes[name][1]) for name, tensor in tensors.items()})


def tokens(count: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(9)).to(dtype)


def expert(bank: ExpertBank, index: int, x: Tensor) -> Tensor:
    gate, up = bank.gate_up_HFD[index].chunk(2)
    return (F.silu(x @ gate.T) * (x @ up.T)) @ bank.down_HDM[index].T


def test_bias_decides_the_choice_but_not_the_weight() -> None:
    chosen = bank(32, 0)
    chosen.correction_E.zero_()
    chosen.correction_E[5] = 10.0
    x_TD = tokens(6)
    ids_TK, weights_TK = route(x_TD, chosen, None, None, k=3, norm_min=1e-12)
    p_TE = (x_TD @ chosen.router_ED.T).softmax(-1)
    assert (ids_TK[:, 0] == 5).all()
    picked = p_TE.gather(1, ids_TK)
    torch.testing.assert_close(weights_TK, picked / picked.sum(-1, keepdim=True))


def test_norm_min_bounds_the_divisor() -> None:
    x_TD, text = tokens(4), bank(32, 0)
    _, weights_TK = route(x_TD, text, None, None, k=3, norm_min=1e-12)
    _, bounded_TK = route(x_TD, text, None, None, k=3, norm_min=2.0)
    assert (bounded_TK.sum(-1) < 0.5).all()
    torch.testing.assert_close(bounded_TK / bounded_TK.sum(-1, keepdim=True), weights_TK)


def test_each_modality_is_routed_by_its_own_router_into_its_own_ids() -> None:
    text, vision = bank(32, 0), bank(16, 1)
    x_TD, vision_T = tokens(10), torch.arange(10) % 3 == 0
    ids_TK, weights_TK = route(x_TD, text, vision, vision_T, k=3, norm_min=1e-12)
    text_ids, text_weights = route(x_TD[~vision_T], text, None, None, k=3, norm_min=1e-12)
    vision_ids, vision_weights = route(x_TD[vision_T], vision, None, None, k=3, norm_min=1e-12)
    assert torch.equal(ids_TK[~vision_T], text_ids)
    assert torch.equal(ids_TK[vision_T], vision_ids + EXPERTS)
    torch.testing.assert_close(weights_TK[~vision_T], text_weights)
    torch.testing.assert_close(weights_TK[vision_T], vision_weights)


def test_routers_stay_float32_in_bfloat16() -> None:
    text, x_TD = bank(32, 0, torch.bfloat16), tokens(50, torch.bfloat16)
    assert text.router_ED.dtype == text.correction_E.dtype == torch.float32
    ids_TK, weights_TK = route(x_TD, text, None, None, k=3, norm_min=1e-12)
    scores = (x_TD.float() @ text.router_ED.T).softmax(-1) + text.correction_E
    assert torch.equal(ids_TK, scores.topk(3).indices)
    assert weights_TK.dtype == torch.bfloat16


def test_vision_tokens_without_a_bank_raise() -> None:
    with pytest.raises(ValueError, match="vision expert bank"):
        route(tokens(2), bank(32, 0), None, torch.tensor([True, False]), k=3, norm_min=1e-12)


def need(form: ExpertsForm) -> None:
    """Skips where the form cannot be had."""
    if form is ExpertsForm.NATIVE:
        try:
            load_cpu_kernels()
        except KernelUnavailable as error:
            pytest.skip(str(error))


PLAIN_AND_GROUPED = [
    (form, dtype) for form in (ExpertsForm.LOOP, ExpertsForm.GROUPED) for dtype in (torch.float32, torch.bfloat16)
]
COUNTS = [2, 0, 1, 4, 0, 0, 3, 1, 0, 5, 0, 0, 2, 0, 1, 0]


@pytest.mark.parametrize(("form", "dtype"), [*PLAIN_AND_GROUPED, (ExpertsForm.NATIVE, torch.bfloat16)])
@pytest.mark.parametrize("counts", [COUNTS, [0] * 8 + COUNTS[8:], COUNTS[:8] + [0] * 8], ids=["both", "vision", "text"])
def test_every_expert_gets_its_rows(form: ExpertsForm, dtype: torch.dtype, counts: list[int]) -> None:
    need(form)
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    banks = bank(32, 0, dtype), bank(16, 1, dtype)
    rows_ND = tokens(sum(counts), dtype)
    out_ND = run_experts(rows_ND, torch.tensor(counts, dtype=torch.int32), banks, form)
    wide = [ExpertBank(**{f: getattr(b, f).double() for f in ExpertBank.__dataclass_fields__}) for b in banks]
    pieces = torch.split(rows_ND.double(), counts)
    expected = [expert(wide[i // EXPERTS], i % EXPERTS, piece) for i, piece in enumerate(pieces)]
    torch.testing.assert_close(out_ND.double(), torch.cat(expected), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_form_equals_the_plain_form(dtype: torch.dtype) -> None:
    banks = bank(32, 0, dtype), bank(16, 1, dtype)
    rows_ND, counts = tokens(sum(COUNTS), dtype), torch.tensor(COUNTS, dtype=torch.int32)
    plain = run_experts(rows_ND, counts, banks, ExpertsForm.LOOP)
    grouped = run_experts(rows_ND, counts, banks, ExpertsForm.GROUPED)
    torch.testing.assert_close(grouped, plain)


@pytest.mark.parametrize("counts", [COUNTS, [0] * 8 + COUNTS[8:], COUNTS[:8] + [0] * 8], ids=["both", "vision", "text"])
def test_native_form_is_near_the_plain_form(counts: list[int]) -> None:
    """It rounds silu(gate) * up once where the plain form rounds three times, each by 2^-8 of a value of size 1."""
    need(ExpertsForm.NATIVE)
    banks = bank(32, 0, torch.bfloat16), bank(16, 1, torch.bfloat16)
    rows_ND = tokens(sum(counts), torch.bfloat16)
    counts_X = torch.tensor(counts, dtype=torch.int32)
    plain, native = (run_experts(rows_ND, counts_X, banks, form) for form in (ExpertsForm.LOOP, ExpertsForm.NATIVE))
    torch.testing.assert_close(native, plain, atol=3 * 2.0**-8, rtol=3 * 2.0**-8)


def test_native_form_hands_many_rows_to_the_plain_form(monkeypatch: pytest.MonkeyPatch) -> None:
    need(ExpertsForm.NATIVE)
    monkeypatch.setattr(load_cpu_kernels(), "row_limit", 0)
    banks = bank(32, 0, torch.bfloat16), bank(16, 1, torch.bfloat16)
    rows_ND, counts = tokens(sum(COUNTS), torch.bfloat16), torch.tensor(COUNTS, dtype=torch.int32)
    plain = run_experts(rows_ND, counts, banks, ExpertsForm.LOOP)
    assert torch.equal(run_experts(rows_ND, counts, banks, ExpertsForm.NATIVE), plain)


@pytest.mark.parametrize("form", ExpertsForm)
def test_no_rows(form: ExpertsForm) -> None:
    need(form)
    counts = torch.zeros(16, dtype=torch.int32)
    banks = bank(32, 0, torch.bfloat16), bank(16, 1, torch.bfloat16)
    none_ND = torch.empty(0, WIDTH, dtype=torch.bfloat16)
    assert run_experts(none_ND, counts, banks, form).shape == (0, WIDTH)


def test_rows_of_experts_that_are_not_here_raise() -> None:
    with pytest.raises(ValueError, match="9 rows"):
        run_experts(tokens(sum(COUNTS[:8]) + 9), torch.tensor(COUNTS), [bank(32, 0)])


def test_rows_of_experts_that_are_not_here_raise_in_the_native_form() -> None:
    need(ExpertsForm.NATIVE)
    rows_ND, counts = tokens(sum(COUNTS), torch.bfloat16), torch.tensor(COUNTS, dtype=torch.int32)
    with pytest.raises(ValueError, match="counts"):
        run_experts(rows_ND, counts, [bank(32, 0, torch.bfloat16)], ExpertsForm.NATIVE)
