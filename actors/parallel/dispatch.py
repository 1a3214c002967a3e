"""Brings tokens to their experts and the experts' results back: one exchange per MoE layer, for both banks.

Expert ids are one space: 0 .. E-1 the text experts, E .. 2E-1 the vision experts. The experts work on rows grouped by
expert and never learn where the rows came from. ``LocalDispatcher`` is the form of a single rank; those of groups are
in ``group_dispatch``.

T tokens, D hidden, K experts per token, X experts held here of both banks, N rows for them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from actors.kernels.cpu import CpuKernels

MetadataT = TypeVar("MetadataT")


@dataclass(frozen=True, kw_only=True, slots=True)
class Dispatched(Generic[MetadataT]):
    """Rows for the experts held here, and what ``combine`` needs to bring their results home."""

    rows_ND: Tensor
    """One row per (token, chosen expert held here), in the order of experts."""
    rows_per_expert_X: Tensor
    """Rows of each expert held here in local order, text experts first: int32, on the device of the rows."""
    metadata: MetadataT
    text_rows: int | None = None
    """How many rows belong to text experts. None: the tokens given to ``dispatch`` tell."""


class Dispatcher(Protocol[MetadataT]):
    """One ``dispatch`` and one ``combine`` per MoE layer and step, whatever the mix of text and vision tokens."""

    def dispatch(self, layer: int, x_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor) -> Dispatched[MetadataT]:
        """``expert_ids_TK`` is int64 in the space of both banks; ``weights_TK`` has the dtype of ``x_TD``.

        ``layer`` is the index of the decoder layer.
        """
        ...

    def combine(self, rows_ND: Tensor, metadata: MetadataT) -> Tensor:
        """The experts' results, in the order they were dispatched, as the weighted sum of each token: [T, D]."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalMetadata:
    """Where row k of token t went (``row_of_choice_N``, index t * K + k) and its weight."""

    row_of_choice_N: Tensor
    weights_TK: Tensor


class LocalDispatcher:
    """All experts are here: a stable sort by expert id, and its inverse. No host synchronisation, no atomics."""

    def __init__(self, num_experts: int, kernels: CpuKernels | None = None) -> None:
        """``num_experts`` counts both banks; ``kernels`` do the same for bfloat16 on a CPU, None is the plain form."""
        self.num_experts = num_experts
        self.kernels = kernels

    def dispatch(
        self, layer: int, x_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor
    ) -> Dispatched[LocalMetadata]:
        if self.kernels is not None:
            rows_ND, rows_per_expert_X, row_of_choice_N = self.kernels.group_rows(x_TD, expert_ids_TK, self.num_experts)
            metadata = LocalMetadata(row_of_choice_N=row_of_choice_N, weights_TK=weights_TK)
            return Dispatched(rows_ND=rows_ND, rows_per_expert_X=rows_per_expert_X, metadata=metadata)
        ids_N = expert_ids_TK.flatten()
        choice_of_row_N = ids_N.argsort(stable=True)
        row_of_choice_N = torch.empty_like(choice_of_row_N)
        row_of_choice_N[choice_of_row_N] = torch.arange(ids_N.numel(), device=ids_N.device)
        rows_per_expert_X = torch.zeros(self.num_experts, dtype=torch.int32, device=ids_N.device)
        rows_per_expert_X.scatter_add_(0, ids_N, torch.ones_like(ids_N, dtype=torch.int32))
        return Dispatched(
            rows_ND=x_TD.index_select(0, choice_of_row_N // expert_ids_TK.shape[1]),
            rows_per_expert_X=rows_per_expert_X,
            metadata=LocalMetadata(row_of_choice_N=row_of_choice_N, weights_TK=weights_TK),
        )

    def combine(self, rows_ND: Tensor, metadata: LocalMetadata) -> Tensor:
        if self.kernels is not None:
            return self.kernels.combine_rows(rows_ND, metadata.row_of_choice_N, metadata.weights_TK)
        return weighted_sum(rows_ND, metadata.row_of_choice_N, metadata.weights_TK)


def weighted_sum(rows_ND: Tensor, row_of_choice_N: Tensor, weights_TK: Tensor) -> Tensor:
    """Each token's rows times their weights: [T, D]. Choice k of token t is row ``row_of_choice_N[t * K + k]``."""
    tokens, choices = weights_TK.shape
    rows_TKD = rows_ND.index_select(0, row_of_choice_N).view(tokens, choices, rows_ND.shape[1])
    return torch.bmm(weights_TK.unsqueeze(1), rows_TKD).squeeze(1)
