"""Compiled kernels against float64 and against the plain forms they stand for.

Products: inputs are exact in bfloat16, sums are float32, so a result is off by half a unit in the last place (2^-8 of
its size) and by float32 noise of the sum; an expert rounds its inner values as well.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from actors.ernie.layers import rms_norm
from actors.ernie.moe import ExpertBank, route
from actors.ernie.rope import rotate_halves, rotate_pairs
from actors.kernels.cpu import CpuKernels, kernel_problem

HALF_UNIT = 2.0**-8


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 5, 6, 7, 13, 64, 65, 131])
@pytest.mark.parametrize(("inputs", "outputs"), [(96, 48), (31, 17), (33, 1), (160, 34)])
@pytest.mark.parametrize("bias", [False, True])
def test_linear(kernels: CpuKernels, rows: int, inputs: int, outputs: int, bias: bool) -> None:
    x, weight = noise(rows, inputs), noise(outputs, inputs, seed=1)
    bias_O = noise(outputs, seed=2) if bias else None
    expected = F.linear(x.double(), weight.double(), None if bias_O is None else bias_O.double())
    out = kernels.linear(x, weight, bias_O)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), expected, rtol=HALF_UNIT, atol=1e-4)


@pytest.mark.parametrize("counts", [[3, 0, 1, 7], [0, 0, 0, 1], [70, 2, 0, 0], [0, 0, 0, 0]])
@pytest.mark.parametrize(("width", "inner"), [(96, 48), (40, 25)])
def test_experts(kernels: CpuKernels, counts: list[int], width: int, inner: int) -> None:
    x = noise(sum(counts), width)
    gate_up, down = noise(4, 2 * inner, width, seed=1) * width**-0.5, noise(4, width, inner, seed=2) * inner**-0.5
    out = kernels.experts(x, torch.tensor(counts, dtype=torch.int32), gate_up, down)
    expected = []
    for rows, w1, w2 in zip(x.double().split(counts), gate_up.double(), down.double(), strict=True):
        gate, up = F.linear(rows, w1).chunk(2, dim=-1)
        expected.append(F.linear(F.silu(gate) * up, w2))
    torch.testing.assert_close(out.double(), torch.cat(expected), rtol=2 * HALF_UNIT, atol=4 * HALF_UNIT)


def test_gated_mlp_is_one_expert(kernels: CpuKernels) -> None:
    x, gate_up, down = noise(5, 64), noise(48, 64, seed=1), noise(64, 24, seed=2)
    counts = torch.tensor([5], dtype=torch.int32)
    assert torch.equal(kernels.gated_mlp(x, gate_up, down), kernels.experts(x, counts, gate_up[None], down[None]))


def test_silu_is_right_far_from_zero(kernels: CpuKernels) -> None:
    """Gate and up are the inputs themselves, down is one: the result is silu(g) * u."""
    gates = torch.tensor([-1e4, -120.0, -88.0, -30.0, -5.0, -0.25, 0.0, 0.25, 5.0, 30.0, 120.0, 1e4]).bfloat16()
    x = torch.stack([gates, torch.ones_like(gates)], dim=1)
    out = kernels.gated_mlp(x, torch.eye(2).bfloat16(), torch.ones(2, 1).bfloat16())
    expected = F.silu(gates.double())
    torch.testing.assert_close(out[:, 0].double(), expected, rtol=2 * HALF_UNIT, atol=1e-30)


def test_not_a_number_stays_one(kernels: CpuKernels) -> None:
    x = noise(2, 32)
    x[1, 3] = torch.nan
    out = kernels.linear(x, noise(4, 32, seed=1))
    assert out[1].isnan().all() and out[0].isfinite().all()


@pytest.mark.parametrize("rows", [0, 1, 40])
def test_rms_norm_equals_the_plain_form(kernels: CpuKernels, rows: int) -> None:
    for width in (96, 50):
        x, weight = noise(rows, width), noise(width, seed=1)
        torch.testing.assert_close(kernels.rms_norm(x, weight, 1e-5), rms_norm(x, weight, 1e-5))


@pytest.mark.parametrize("rows", [0, 1, 40])
def test_rotation_equals_the_plain_form(kernels: CpuKernels, rows: int) -> None:
    qkv = noise(rows, 7, 16)
    cos, sin = torch.randn(2, rows, 8, generator=torch.Generator().manual_seed(1))
    part = qkv[:, :5]
    torch.testing.assert_close(kernels.rotate_pairs(part, cos, sin), rotate_pairs(part, cos, sin))


def test_rotation_of_halves_equals_the_plain_form(kernels: CpuKernels) -> None:
    qkv = noise(9, 6, 12)
    cos, sin = torch.randn(2, 9, 6, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(kernels.rotate_halves(qkv[:, :4], cos, sin), rotate_halves(qkv[:, :4], cos, sin))


def test_quick_gelu(kernels: CpuKernels) -> None:
    x = torch.cat([noise(3000) * 4, torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4]).bfloat16()])
    expected = x.double() * torch.sigmoid(1.702 * x.double())
    torch.testing.assert_close(kernels.quick_gelu(x).double(), expected, rtol=HALF_UNIT, atol=1e-30)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("queries", "keys", "heads", "kv_heads", "width"),
    [
        (0, 1, 1, 1, 16),
        (1, 1, 2, 1, 16),
        (7, 7, 4, 2, 16),
        (70, 70, 2, 2, 80),
        (25, 700, 6, 2, 128),
        (3, 1100, 1, 1, 256),
    ],
)
def test_attention(
    kernels: CpuKernels, queries: int, keys: int, heads: int, kv_heads: int, width: int, causal: bool
) -> None:
    """Weights are rounded to bfloat16 before the values are summed, as torch does: another unit in the last place."""
    if not kernels.attends(width):
        pytest.skip("no 512-bit bfloat16 instructions")
    q = noise(queries, heads + 1, width)[:, :heads] * 2
    k, v = noise(keys, 2 * kv_heads, width, seed=1).chunk(2, dim=1)
    mask = torch.arange(keys) <= torch.arange(keys - queries, keys)[:, None] if causal else None
    wide = (x.double().transpose(0, 1)[None] for x in (q, k, v))
    expected = F.scaled_dot_product_attention(*wide, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1)
    out = kernels.attention(q, k, v, causal=causal)
    torch.testing.assert_close(out.double(), expected, rtol=2 * HALF_UNIT, atol=2 * HALF_UNIT)


def test_attention_survives_large_scores(kernels: CpuKernels) -> None:
    """The running maximum moves by more than a float32 exponent holds."""
    if not kernels.attends(16):
        pytest.skip("no 512-bit bfloat16 instructions")
    k = torch.linspace(-200, 200, 1200)[:, None, None].expand(-1, 1, 16).bfloat16()
    v = noise(1200, 1, 16)
    q = torch.ones(2, 1, 16).bfloat16() * torch.tensor([1.0, -1.0]).bfloat16()[:, None, None]
    out = kernels.attention(q, k, v, causal=False)
    wide = (x.double().transpose(0, 1)[None] for x in (q, k, v))
    expected = F.scaled_dot_product_attention(*wide)[0].transpose(0, 1)
    torch.testing.assert_close(out.double(), expected, rtol=2 * HALF_UNIT, atol=2 * HALF_UNIT)


def test_attention_refuses_what_it_cannot_do(kernels: CpuKernels) -> None:
    q, k = noise(4, 4, 16), noise(4, 2, 16)
    for arguments in ((q, k[:3], k[:3]), (q, k, k[:3]), (q[:, :3], k, k), (q[..., :8], k[..., :8], k[..., :8])):
        with pytest.raises(ValueError):
            kernels.attention(*arguments, causal=True)


def banks(width: int, experts: int) -> tuple[ExpertBank, ExpertBank]:
    def bank(seed: int) -> ExpertBank:
        unused = torch.empty(0)
        router = noise(experts, width, seed=seed).float() * width**-0.5
        return ExpertBank(
            router_ED=router, correction_E=0.1 * noise(experts).float(), gate_up_HFD=unused, down_HDM=unused
        )

    return bank(1), bank(2)


@pytest.mark.parametrize("norm_min", [1e-12, 0.9])
@pytest.mark.parametrize("mixed", [False, True])
def test_routing_equals_the_plain_form(kernels: CpuKernels, mixed: bool, norm_min: float) -> None:
    text, vision = banks(100, 12)
    x, mask = noise(30, 100), torch.arange(30) % 3 == 0 if mixed else None
    plain = route(x, text, vision, mask, k=4, norm_min=norm_min)
    ids, weights = route(x, text, vision, mask, k=4, norm_min=norm_min, kernels=kernels)
    assert torch.equal(ids, plain[0])
    torch.testing.assert_close(weights, plain[1])


def test_routing_needs_the_bank_of_its_tokens(kernels: CpuKernels) -> None:
    text, _ = banks(100, 12)
    with pytest.raises(ValueError, match="vision expert bank"):
        route(noise(2, 100), text, None, torch.tensor([True, False]), k=4, norm_min=0.0, kernels=kernels)


def test_threads_change_nothing(kernels: CpuKernels) -> None:
    x, weight = noise(9, 320), noise(640, 320, seed=1)
    alone = kernels.linear(x, weight)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        assert torch.equal(kernels.linear(x, weight), alone)
    finally:
        torch.set_num_threads(before)


def test_misuse_is_refused(kernels: CpuKernels) -> None:
    x, weight = noise(4, 32), noise(8, 32)
    gate_up, down = noise(2, 16, 32), noise(2, 32, 8)
    for call in (
        lambda: kernels.linear(x.float(), weight),
        lambda: kernels.linear(x, weight[:, :16]),
        lambda: kernels.linear(x.t(), noise(8, 4)),
        lambda: kernels.linear(x, weight, noise(7)),
        lambda: kernels.experts(x, torch.tensor([1, 2], dtype=torch.int32), gate_up, down),
        lambda: kernels.experts(x, torch.tensor([5, -1], dtype=torch.int32), gate_up, down),
        lambda: kernels.experts(x, torch.tensor([2, 2]), gate_up, down),
        lambda: kernels.experts(x, torch.tensor([2, 2], dtype=torch.int32), gate_up, noise(2, 16, 8)),
        lambda: kernels.rms_norm(x, noise(31), 1e-5),
        lambda: kernels.rotate_pairs(x[None].transpose(1, 2), torch.zeros(1, 2), torch.zeros(1, 2)),
        lambda: kernels.group_rows(x, torch.tensor([[0], [1], [2], [9]]), 9),
        lambda: kernels.group_rows(x, torch.tensor([[0], [1]]), 9),
    ):
        with pytest.raises(ValueError):
            call()


AVX2 = frozenset({"avx2", "fma", "sse2"})


@pytest.mark.parametrize(
    ("device", "dtype", "flags", "compiler", "problem"),
    [
        ("cpu", torch.bfloat16, AVX2, "/usr/bin/cc", None),
        ("cuda", torch.bfloat16, AVX2, "/usr/bin/cc", "on cuda"),
        ("cpu", torch.float32, AVX2, "/usr/bin/cc", "not float32"),
        ("cpu", torch.bfloat16, frozenset({"avx2"}), "/usr/bin/cc", "lacks fma"),
        ("cpu", torch.bfloat16, AVX2, None, "no C compiler"),
    ],
)
def test_where_the_kernels_can_serve(
    device: str, dtype: torch.dtype, flags: frozenset[str], compiler: str | None, problem: str | None
) -> None:
    found = kernel_problem(device, dtype, flags, compiler)
    assert found is None if problem is None else problem in (found or "")
