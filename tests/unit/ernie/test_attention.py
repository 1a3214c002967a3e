from __future__ import annotations

import pytest
import torch

from actors.ernie.attention import PackedAttention


def test_packed_sequences_attend_causally_to_themselves() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(9, heads, 4, dtype=torch.float64, generator=generator) for heads in (6, 2, 2))
    out = PackedAttention([0, 4, 4, 9]).attend(0, q, k, v)
    sequence = torch.tensor([0] * 4 + [1] * 5)
    allowed = (sequence[:, None] == sequence) & (torch.arange(9)[:, None] >= torch.arange(9))
    for head in range(6):
        scores = (q[:, head] @ k[:, head // 3].T / 2).masked_fill(~allowed, -torch.inf)
        torch.testing.assert_close(out[:, head], scores.softmax(-1) @ v[:, head // 3])


@pytest.mark.parametrize("bounds", [[], [1, 3], [0, 3, 2]])
def test_bounds_must_ascend_from_zero(bounds: list[int]) -> None:
    with pytest.raises(ValueError, match="ascend"):
        PackedAttention(bounds)


def test_token_count_must_match() -> None:
    x = torch.zeros(3, 1, 4)
    with pytest.raises(ValueError, match="3 tokens"):
        PackedAttention([0, 4]).attend(0, x, x, x)
