from __future__ import annotations

import math

import pytest
import torch

from actors.ernie.rope import rotate_halves, rotate_pairs, text_rope_tables, vision_rope_tables
from tests.small_models import text_config


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
def test_text_frequencies_take_h_and_w_in_turn_and_t_last(dtype: torch.dtype, tolerance: float) -> None:
    config = text_config()
    t, h, w = 7, 30, 90
    cos_TF, sin_TF = text_rope_tables(torch.tensor([[t], [h], [w]]), config, dtype)
    axes = [h, w, h, w, h, w, t, t]
    angles = [position * 500000.0 ** (-2 * i / 16) for i, position in enumerate(axes)]
    assert cos_TF.dtype == dtype
    assert cos_TF[0].tolist() == pytest.approx([math.cos(a) for a in angles], abs=tolerance)
    assert sin_TF[0].tolist() == pytest.approx([math.sin(a) for a in angles], abs=tolerance)


def test_pairs_rotate_as_complex_numbers() -> None:
    x_THd = torch.randn(5, 2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    angles_TF = torch.arange(20, dtype=torch.float64).view(5, 4)
    turned = torch.view_as_complex(x_THd.view(5, 2, 4, 2)) * torch.exp(1j * angles_TF).unsqueeze(1)
    expected = torch.view_as_real(turned).flatten(-2)
    torch.testing.assert_close(rotate_pairs(x_THd, angles_TF.cos(), angles_TF.sin()), expected)


def test_halves_rotate_as_complex_numbers() -> None:
    x_NHd = torch.randn(5, 2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    angles_NF = torch.arange(20, dtype=torch.float64).view(5, 4)
    turned = torch.complex(x_NHd[..., :4], x_NHd[..., 4:]) * torch.exp(1j * angles_NF).unsqueeze(1)
    expected = torch.cat([turned.real, turned.imag], dim=-1)
    torch.testing.assert_close(rotate_halves(x_NHd, angles_NF.cos(), angles_NF.sin()), expected)


def test_rotation_happens_in_the_dtype_of_the_tables() -> None:
    x_THd = torch.randn(3, 2, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    cos_TF, sin_TF = text_rope_tables(torch.arange(3).expand(3, 3) + 500, text_config(), torch.float32)
    turned = rotate_pairs(x_THd, cos_TF, sin_TF)
    assert turned.dtype == torch.bfloat16
    assert torch.equal(turned, rotate_pairs(x_THd.float(), cos_TF, sin_TF).bfloat16())


def test_vision_frequencies_are_rows_then_columns() -> None:
    cos_NF, sin_NF = vision_rope_tables(torch.tensor([[3], [11]]), 16, 10000.0, torch.float64)
    angles = [position * 10000.0 ** (-2 * j / 8) for position in (3, 11) for j in range(4)]
    assert cos_NF[0].tolist() == pytest.approx([math.cos(a) for a in angles], abs=1e-14)
    assert sin_NF[0].tolist() == pytest.approx([math.sin(a) for a in angles], abs=1e-14)
