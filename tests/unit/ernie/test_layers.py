from __future__ import annotations

import pytest
import torch

from actors.ernie.layers import GatedMlp, Linear, rms_norm

CPU = torch.device("cpu")


def test_rms_norm_is_computed_wide_and_rounded_before_the_weight() -> None:
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(6, 32, generator=generator).bfloat16()
    weight_D = torch.randn(32, generator=generator).bfloat16()
    wide = x_TD.float()
    expected = weight_D * (wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()).bfloat16()
    assert torch.equal(rms_norm(x_TD, weight_D, 1e-5), expected)


def test_rms_norm_is_float64_in_float64() -> None:
    x_TD = torch.randn(2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    normed = rms_norm(x_TD, torch.ones(8, dtype=torch.float64), 0.0)
    torch.testing.assert_close(normed.square().mean(-1), torch.ones(2, dtype=torch.float64), atol=1e-14, rtol=0)


def test_stacked_parts_are_views_in_order() -> None:
    linear = Linear.empty(5, 3, bias=True, dtype=torch.float32, device=CPU)
    views = linear.parameters({"q": 3, "k": 2})
    assert list(views) == ["q.weight", "q.bias", "k.weight", "k.bias"]
    for value, view in enumerate(views.values()):
        view.fill_(value)
    assert linear.weight_OI[:, 0].tolist() == [0, 0, 0, 2, 2]
    assert linear.bias_O is not None
    assert linear.bias_O.tolist() == [1, 1, 1, 3, 3]


def test_parts_must_cover_the_matrix() -> None:
    linear = Linear.empty(5, 3, bias=False, dtype=torch.float32, device=CPU)
    with pytest.raises(ValueError, match="4 rows of 5"):
        linear.parameters({"q": 3, "k": 1})


def test_gated_mlp_with_biases() -> None:
    mlp = GatedMlp.empty(4, 6, bias=True, dtype=torch.float64, device=CPU)
    generator = torch.Generator().manual_seed(0)
    p = mlp.parameters("m")
    for view in p.values():
        view.copy_(torch.randn(view.shape, generator=generator))
    x = torch.randn(3, 4, dtype=torch.float64, generator=generator)
    gate = x @ p["m.gate_proj.weight"].T + p["m.gate_proj.bias"]
    up = x @ p["m.up_proj.weight"].T + p["m.up_proj.bias"]
    expected = (gate * gate.sigmoid() * up) @ p["m.down_proj.weight"].T + p["m.down_proj.bias"]
    torch.testing.assert_close(mlp(x), expected)
