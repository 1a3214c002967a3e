"""Mixture of experts with two banks: every token is routed inside the bank of its modality.

T tokens, D hidden, E experts of one bank, H of them held here (all, unless a group of ranks shares them), K experts per
token, M width inside an expert, F = 2 M (gate over up), N rows for the experts held here, X experts of both banks held
here. Expert ids of the vision bank are offset by E.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from actors.ernie.config import TextConfig
from actors.ernie.experts_form import ExpertsForm
from actors.ernie.layers import GatedMlp, silu_and_multiply, wide_dtype
from actors.kernels.cpu import CpuKernels, load_cpu_kernels
from actors.parallel.dispatch import Dispatcher


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertBank:
    """Router and experts of one modality in one layer. The router is float32 (float64 in a float64 model).

    The router knows all experts, also those that other ranks hold.
    """

    router_ED: Tensor
    correction_E: Tensor
    """Added to probabilities for selection only."""
    gate_up_HFD: Tensor
    down_HDM: Tensor

    def parameters(self, prefix: str) -> dict[str, Tensor]:
        return {
            f"{prefix}.gate.weight": self.router_ED,
            f"{prefix}.gate.moe_statics.e_score_correction_bias": self.correction_E.unsqueeze(0),
            **dict(zip(expert_tensor_names(prefix), self.experts, strict=True)),
        }

    @property
    def experts(self) -> tuple[Tensor, Tensor]:
        """The tensors that hold one expert per row."""
        return self.gate_up_HFD, self.down_HDM


def expert_tensor_names(prefix: str) -> tuple[str, str]:
    """Canonical names of ``ExpertBank.experts``."""
    return f"{prefix}.experts.gate_up_proj", f"{prefix}.experts.down_proj"


def bank_shapes(
    config: TextConfig, inner: int, dtype: torch.dtype, held: int | None = None
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each field of an ExpertBank whose experts are ``inner`` wide, in storage order.

    ``held``: how many experts are held here; None = all.
    """
    experts, width, wide = config.moe_num_experts, config.hidden_size, wide_dtype(dtype)
    held = experts if held is None else held
    return {
        "router_ED": ((experts, width), wide),
        "correction_E": ((experts,), wide),
        "gate_up_HFD": ((held, 2 * inner, width), dtype),
        "down_HDM": ((held, width, inner), dtype),
    }


def route(
    x_TD: Tensor,
    text: ExpertBank,
    vision: ExpertBank | None,
    vision_T: Tensor | None,
    *,
    k: int,
    norm_min: float,
    kernels: CpuKernels | None = None,
) -> tuple[Tensor, Tensor]:
    """Expert ids [T, K] (int64, both banks' space) and weights [T, K] (dtype of ``x_TD``).

    softmax over the bank of the token's modality; top k of probability + correction; weights are the uncorrected
    probabilities over max(their sum, ``norm_min``). Both routers see all tokens: they are small, and choosing
    afterwards needs no synchronisation.
    """
    if kernels is not None and x_TD.shape[0] <= kernels.row_limit:
        routers = [(bank.router_ED, bank.correction_E) for bank in (text, vision) if bank is not None]
        return kernels.route(x_TD, routers[0], routers[-1] if vision else None, vision_T, k=k, norm_min=norm_min)
    wide_TD = x_TD.to(text.router_ED.dtype)
    probabilities_TE = F.linear(wide_TD, text.router_ED).softmax(-1)
    scores_TE = probabilities_TE + text.correction_E
    offset_T1: Tensor | None = None
    if vision_T is not None:
        if vision is None:
            raise ValueError("vision tokens need the vision expert bank")
        vision_T1 = vision_T.unsqueeze(1)
        vision_TE = F.linear(wide_TD, vision.router_ED).softmax(-1)
        probabilities_TE = torch.where(vision_T1, vision_TE, probabilities_TE)
        scores_TE = torch.where(vision_T1, vision_TE + vision.correction_E, scores_TE)
        offset_T1 = vision_T1 * text.router_ED.shape[0]
    ids_TK = scores_TE.topk(k, dim=-1).indices
    weights_TK = probabilities_TE.gather(1, ids_TK)
    weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True).clamp(min=norm_min)
    return (ids_TK if offset_T1 is None else ids_TK + offset_T1), weights_TK.to(x_TD.dtype)


def run_experts(
    rows_ND: Tensor,
    rows_per_expert_X: Tensor,
    banks: Sequence[ExpertBank],
    form: ExpertsForm = ExpertsForm.LOOP,
    text_rows: int | None = None,
) -> Tensor:
    """Applies each expert to its rows, which lie in the order of local experts over ``banks``: [N, D].

    ``rows_per_expert_X`` may count further experts after those of ``banks``; they must have no rows. ``text_rows``:
    how many rows are those of the first bank, if the host knows it.
    """
    if len(banks) == 1 and text_rows not in (None, rows_ND.shape[0]):
        raise ValueError("vision tokens need the vision expert bank")
    run = {ExpertsForm.LOOP: _run_loop, ExpertsForm.GROUPED: _run_grouped, ExpertsForm.NATIVE: _run_native}[form]
    parts: list[Tensor] = []
    start = first = 0
    for index, bank in enumerate(banks):
        experts = bank.gate_up_HFD.shape[0]
        counts_H = rows_per_expert_X[first : first + experts]
        # Only a batch of both modalities has to learn where the second bank's rows begin.
        if index == len(banks) - 1:
            end = rows_ND.shape[0]
        else:
            end = start + int(counts_H.sum()) if text_rows is None else text_rows
        if end > start:
            parts.append(run(rows_ND[start:end], counts_H, bank))
        start, first = end, first + experts
    return parts[0] if len(parts) == 1 else torch.cat(parts) if parts else torch.empty_like(rows_ND)


def _run_loop(rows_ND: Tensor, counts_H: Tensor, bank: ExpertBank) -> Tensor:
    out_ND = torch.empty_like(rows_ND)
    start = 0
    for expert, count in enumerate(counts_H.tolist()):
        if count:
            hidden_NM = silu_and_multiply(F.linear(rows_ND[start : start + count], bank.gate_up_HFD[expert]))
            torch.mm(hidden_NM, bank.down_HDM[expert].t(), out=out_ND[start : start + count])
            start += count
    if start != rows_ND.shape[0]:
        raise ValueError(f"{rows_ND.shape[0] - start} rows belong to experts that are not held here")
    return out_ND


def _run_grouped(rows_ND: Tensor, counts_H: Tensor, bank: ExpertBank) -> Tensor:
    ends_H = counts_H.cumsum(0, dtype=torch.int32)
    hidden_NF = F.grouped_mm(rows_ND, bank.gate_up_HFD.transpose(1, 2), offs=ends_H)
    return F.grouped_mm(silu_and_multiply(hidden_NF), bank.down_HDM.transpose(1, 2), offs=ends_H)


def _run_native(rows_ND: Tensor, counts_H: Tensor, bank: ExpertBank) -> Tensor:
    kernels = load_cpu_kernels()
    if rows_ND.shape[0] > kernels.row_limit * bank.gate_up_HFD.shape[0]:
        return _run_loop(rows_ND, counts_H, bank)
    return kernels.experts(rows_ND, counts_H, bank.gate_up_HFD, bank.down_HDM)


class SparseMlp:
    """Routed experts of both banks plus the shared experts every token passes."""

    def __init__(
        self,
        config: TextConfig,
        index: int,
        dtype: torch.dtype,
        device: torch.device,
        kernels: CpuKernels | None = None,
        held: int | None = None,
    ) -> None:
        """``index`` of the decoder layer; ``held``: how many text experts are held here, None = all."""
        inner = config.moe_intermediate_size[0]
        self.index = index
        self.kernels = kernels
        self.k = config.moe_k
        self.norm_min = config.moe_norm_min
        shapes = bank_shapes(config, inner, dtype, held)
        self.text = ExpertBank(
            **{name: torch.empty(shape, dtype=kind, device=device) for name, (shape, kind) in shapes.items()}
        )
        self.shared: GatedMlp | None = None
        if config.moe_num_shared_experts:
            shared = config.shared_intermediate_size
            self.shared = GatedMlp.empty(
                config.hidden_size,
                shared,
                bias=config.use_bias,
                dtype=dtype,
                device=device,
                kernels=kernels,
            )

    def __call__(
        self,
        x_TD: Tensor,
        vision_T: Tensor | None,
        vision: ExpertBank | None,
        dispatcher: Dispatcher[Any],
        form: ExpertsForm,
    ) -> Tensor:
        ids_TK, weights_TK = route(
            x_TD, self.text, vision, vision_T, k=self.k, norm_min=self.norm_min, kernels=self.kernels
        )
        sent = dispatcher.dispatch(self.index, x_TD, ids_TK, weights_TK)
        text_rows = sent.text_rows
        if text_rows is None and vision_T is None:
            text_rows = sent.rows_ND.shape[0]
        banks = (self.text,) if vision is None or text_rows == sent.rows_ND.shape[0] else (self.text, vision)
        rows_ND = run_experts(sent.rows_ND, sent.rows_per_expert_X, banks, form, text_rows)
        out_TD = dispatcher.combine(rows_ND, sent.metadata)
        return out_TD if self.shared is None else out_TD + self.shared(x_TD)

    def parameters(self, prefix: str) -> dict[str, Tensor]:
        views = self.text.parameters(f"{prefix}.text_moe")
        return views if self.shared is None else views | self.shared.parameters(f"{prefix}.shared_experts")
