from __future__ import annotations

import pytest
import torch

from actors.kernels.compiler import KernelUnavailable
from actors.kernels.cpu import load_cpu_kernels
from actors.parallel.dispatch import LocalDispatcher

IDS_TK = torch.tensor([[3, 0], [5, 3], [0, 1], [3, 5]])


def test_rows_are_grouped_by_ascending_expert_id_and_keep_token_order() -> None:
    x_TD = torch.arange(4.0).unsqueeze(1).expand(4, 2)
    sent = LocalDispatcher(6).dispatch(1, x_TD, IDS_TK, torch.ones(4, 2))
    assert sent.rows_per_expert_X.tolist() == [2, 1, 0, 3, 0, 2]
    assert sent.rows_per_expert_X.dtype == torch.int32
    assert sent.rows_ND[:, 0].tolist() == [0, 2, 2, 0, 1, 3, 1, 3]


def test_combine_weighs_each_choice_and_brings_it_home() -> None:
    """Experts that multiply by their id + 1."""
    x_TD = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weights_TK = torch.rand(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    dispatcher = LocalDispatcher(6)
    sent = dispatcher.dispatch(1, x_TD, IDS_TK, weights_TK)
    factor_N1 = torch.repeat_interleave(torch.arange(1, 7), sent.rows_per_expert_X.long()).unsqueeze(1)
    out_TD = dispatcher.combine(sent.rows_ND * factor_N1, sent.metadata)
    torch.testing.assert_close(out_TD, x_TD * (weights_TK * (IDS_TK + 1)).sum(1, keepdim=True))


def test_no_tokens() -> None:
    dispatcher = LocalDispatcher(6)
    sent = dispatcher.dispatch(1, torch.empty(0, 3), torch.empty(0, 2, dtype=torch.int64), torch.empty(0, 2))
    assert sent.rows_ND.shape == (0, 3)
    assert sent.rows_per_expert_X.tolist() == [0] * 6
    assert dispatcher.combine(sent.rows_ND, sent.metadata).shape == (0, 3)


@pytest.mark.parametrize("tokens", [0, 1, 70])
def test_kernels_equal_the_plain_form(tokens: int) -> None:
    try:
        native = LocalDispatcher(12, load_cpu_kernels())
    except KernelUnavailable as error:
        pytest.skip(str(error))
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(tokens, 40, generator=generator).bfloat16()
    ids_TK = torch.rand(tokens, 12, generator=generator).argsort(-1)[:, :3].contiguous()
    weights_TK = torch.rand(tokens, 3, generator=generator).bfloat16()
    plain = LocalDispatcher(12)
    sent, expected = native.dispatch(1, x_TD, ids_TK, weights_TK), plain.dispatch(1, x_TD, ids_TK, weights_TK)
    assert torch.equal(sent.rows_ND, expected.rows_ND)
    assert torch.equal(sent.rows_per_expert_X, expected.rows_per_expert_X)
    rows_ND = torch.randn(tokens * 3, 40, generator=generator).bfloat16()
    home = native.combine(rows_ND, sent.metadata)
    torch.testing.assert_close(home, plain.combine(rows_ND, expected.metadata))
