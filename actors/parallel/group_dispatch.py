"""Dispatch within a group of ranks. Each token goes once to each rank that holds some of its experts.

``AllToAllDispatcher`` moves only what must move and asks the host how much: prefill. ``FixedShapeDispatcher`` moves
every token to every rank in shapes that follow from the plan alone: decode, where tokens are few. A step must use the
same form on all ranks.

A token travels as one packed row: hidden state, experts, weights. The rank that computes its experts adds up their
weighted results, so that one row per token and rank comes back.

T tokens of this rank, D hidden, K experts per token, X experts of both banks, R ranks, M packed rows that arrived here,
H experts of both banks held here, N rows for them, C token room per rank, S rows sent, B bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from actors.parallel.dispatch import Dispatched, weighted_sum
from actors.parallel.group import ExpertGroup

_NOT_HERE = -1
_ALIGNMENT = 8
_HEADER = 3
"""Tokens, choices of text experts, choices of vision experts."""


class PackedRows:
    """How a token is laid out in bytes, so that one collective carries all of it."""

    def __init__(self, width: int, choices: int, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._ids_at = _padded(width * dtype.itemsize)
        self._weights_at = _padded(self._ids_at + choices * torch.int32.itemsize)
        self.bytes = _padded(self._weights_at + choices * dtype.itemsize)
        self._width = width
        self._choices = choices

    def empty(self, rows: int, device: torch.device) -> Tensor:
        return torch.empty(rows, self.bytes, dtype=torch.uint8, device=device)

    def x(self, packed_MB: Tensor) -> Tensor:
        """[M, D], a view."""
        return packed_MB[:, : self._width * self.dtype.itemsize].view(self.dtype)

    def ids(self, packed_MB: Tensor) -> Tensor:
        """int32 [M, K], a view."""
        return packed_MB[:, self._ids_at : self._ids_at + self._choices * torch.int32.itemsize].view(torch.int32)

    def weights(self, packed_MB: Tensor) -> Tensor:
        """[M, K], a view."""
        end = self._weights_at + self._choices * self.dtype.itemsize
        return packed_MB[:, self._weights_at : end].view(self.dtype)


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


@dataclass(frozen=True, kw_only=True, slots=True)
class Grouped:
    """Tokens that arrived, as rows by local expert, and the way back to one row per token."""

    rows_ND: Tensor
    rows_per_expert_H: Tensor
    row_of_choice_N: Tensor
    """By choice of the arrived tokens, index m * K + k. A choice that is not here points to a row of the same token."""
    weights_MK: Tensor
    """0 for a choice that is not here."""
    foreign_M1: Tensor
    """True where none of a token's choices is here; its row points anywhere."""


def group_by_expert(x_MD: Tensor, local_MK: Tensor, weights_MK: Tensor, held: int, rows: int | None) -> Grouped:
    """``local_MK``: int32 local indices, ``held`` for a choice that is not here. ``rows``: how many are here.

    ``rows`` None keeps all M * K rows, so that shapes do not depend on the routing; those of no expert here come last.
    """
    tokens, choices = local_MK.shape
    local_MKflat = local_MK.flatten()
    choice_of_row_N = local_MKflat.argsort(stable=True)[:rows]
    row_of_choice = torch.full((tokens * choices,), _NOT_HERE, dtype=torch.int64, device=x_MD.device)
    row_of_choice[choice_of_row_N] = torch.arange(choice_of_row_N.numel(), device=x_MD.device)
    here_MK = local_MK < held
    row_MK = row_of_choice.view(tokens, choices).masked_fill(~here_MK, _NOT_HERE)
    any_row_M1 = row_MK.amax(1, keepdim=True)
    rows_per_expert = torch.zeros(held + 1, dtype=torch.int32, device=x_MD.device)
    rows_per_expert.scatter_add_(0, local_MKflat.long(), torch.ones_like(local_MKflat))
    return Grouped(
        rows_ND=x_MD.index_select(0, choice_of_row_N // choices),
        rows_per_expert_H=rows_per_expert[:held],
        row_of_choice_N=torch.where(here_MK, row_MK, any_row_M1).clamp(min=0).flatten(),
        weights_MK=weights_MK.masked_fill(~here_MK, 0),
        foreign_M1=any_row_M1 < 0,
    )


def sum_choices(rows_ND: Tensor, grouped: Grouped) -> Tensor:
    """What the experts held here contribute to each arrived token: [M, D]."""
    tokens = grouped.weights_MK.shape[0]
    if rows_ND.shape[0] == 0:
        return rows_ND.new_zeros(tokens, rows_ND.shape[1])
    return weighted_sum(rows_ND, grouped.row_of_choice_N, grouped.weights_MK).masked_fill_(grouped.foreign_M1, 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class AllToAllMetadata:
    layer: int
    tokens: int
    token_of_row_S: Tensor
    """By destination rank, ascending within one."""
    sent_R: list[int]
    arrived_R: list[int]
    grouped: Grouped


class AllToAllDispatcher:
    """Counts travel first, then rows; results come back the same way. Waits for the host, so it cannot be recorded."""

    def __init__(self, group: ExpertGroup) -> None:
        self.group = group

    def dispatch(
        self, layer: int, x_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor
    ) -> Dispatched[AllToAllMetadata]:
        world, tables = self.group.world, self.group.tables[layer]
        tokens, width = x_TD.shape
        rank_TK = tables.rank_of_X[expert_ids_TK]
        goes_RTK = rank_TK == torch.arange(world.size, device=x_TD.device).view(-1, 1, 1)
        is_text_TK = expert_ids_TK < tables.rank_of_X.numel() // 2
        header_R3 = torch.stack(
            (goes_RTK.any(2).sum(1), (goes_RTK & is_text_TK).sum((1, 2)), (goes_RTK & ~is_text_TK).sum((1, 2))), 1
        )
        heard_R3 = torch.empty_like(header_R3)
        ones = [1] * world.size
        world.all_to_all(heard_R3, ones, header_R3, ones, layer=layer, what="dispatch of counts")
        sent_R = header_R3[:, 0].tolist()
        heard = heard_R3.tolist()
        arrived_R = [row[0] for row in heard]
        text_rows, vision_rows = sum(row[1] for row in heard), sum(row[2] for row in heard)

        rank_of_row_S, token_of_row_S = goes_RTK.any(2).nonzero().unbind(1)
        form = PackedRows(width, expert_ids_TK.shape[1], x_TD.dtype)
        packed_SB = form.empty(token_of_row_S.numel(), x_TD.device)
        form.x(packed_SB).copy_(x_TD.index_select(0, token_of_row_S))
        there_SK = rank_TK.index_select(0, token_of_row_S) == rank_of_row_S.unsqueeze(1)
        local_SK = tables.local_of_X[expert_ids_TK].index_select(0, token_of_row_S)
        form.ids(packed_SB).copy_(local_SK.masked_fill_(~there_SK, _NOT_HERE))
        form.weights(packed_SB).copy_(weights_TK.index_select(0, token_of_row_S))
        packed_MB = form.empty(sum(arrived_R), x_TD.device)
        world.all_to_all(packed_MB, arrived_R, packed_SB, sent_R, layer=layer, what="dispatch of tokens")

        ids_MK = form.ids(packed_MB)
        local_MK = ids_MK.masked_fill(ids_MK == _NOT_HERE, tables.held_here)
        grouped = group_by_expert(
            form.x(packed_MB), local_MK, form.weights(packed_MB), tables.held_here, text_rows + vision_rows
        )
        self.group.count(layer, grouped.rows_per_expert_H)
        metadata = AllToAllMetadata(
            layer=layer,
            tokens=tokens,
            token_of_row_S=token_of_row_S,
            sent_R=sent_R,
            arrived_R=arrived_R,
            grouped=grouped,
        )
        return Dispatched(
            rows_ND=grouped.rows_ND,
            rows_per_expert_X=grouped.rows_per_expert_H,
            metadata=metadata,
            text_rows=text_rows,
        )

    def combine(self, rows_ND: Tensor, metadata: AllToAllMetadata) -> Tensor:
        part_MD = sum_choices(rows_ND, metadata.grouped)
        back_SD = rows_ND.new_empty(metadata.token_of_row_S.numel(), rows_ND.shape[1])
        self.group.world.all_to_all(
            back_SD, metadata.sent_R, part_MD, metadata.arrived_R, layer=metadata.layer, what="combine"
        )
        out_TD = rows_ND.new_zeros(metadata.tokens, rows_ND.shape[1])
        # Within one rank's rows every token occurs once: the order of additions is that of ranks, on any device.
        start = 0
        for count in metadata.sent_R:
            out_TD.index_add_(0, metadata.token_of_row_S[start : start + count], back_SD[start : start + count])
            start += count
        return out_TD


@dataclass(frozen=True, kw_only=True, slots=True)
class FixedShapeMetadata:
    layer: int
    tokens: int
    room: int
    grouped: Grouped


class FixedShapeDispatcher:
    """All tokens go to all ranks, each rank's padded to the plan's ``most_tokens``; results are summed going back."""

    def __init__(self, group: ExpertGroup, *, static_rows: bool = False) -> None:
        """``static_rows``: also the rows for experts keep one shape and the host waits for nothing, as recording wants.

        They are then R * C * K, those of no expert here last; only the grouped form of experts leaves such rows alone.
        """
        self.group = group
        self.static_rows = static_rows

    def dispatch(
        self, layer: int, x_TD: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor
    ) -> Dispatched[FixedShapeMetadata]:
        world, tables, step = self.group.world, self.group.tables[layer], self.group.need_step()
        tokens, width = x_TD.shape
        if tokens > step.most_tokens:
            raise ValueError(f"{tokens} tokens on a rank in a step whose plan tells at most {step.most_tokens}")
        form = PackedRows(width, expert_ids_TK.shape[1], x_TD.dtype)
        packed_CB = form.empty(step.most_tokens, x_TD.device)
        packed_CB[tokens:] = 0
        form.x(packed_CB)[:tokens] = x_TD
        form.ids(packed_CB)[:tokens] = expert_ids_TK
        form.ids(packed_CB)[tokens:] = tables.rank_of_X.numel()
        form.weights(packed_CB)[:tokens] = weights_TK
        packed_MB = form.empty(world.size * step.most_tokens, x_TD.device)
        world.all_gather(packed_MB, packed_CB, layer=layer, what="dispatch")

        local_MK = tables.here_X[form.ids(packed_MB).long()]
        rows = None if self.static_rows else int((local_MK < tables.held_here).sum())
        grouped = group_by_expert(form.x(packed_MB), local_MK, form.weights(packed_MB), tables.held_here, rows)
        self.group.count(layer, grouped.rows_per_expert_H)
        # Where the host may not wait, only the plan tells; elsewhere a wrong plan is noticed.
        text_rows = grouped.rows_ND.shape[0]
        if step.vision or not self.static_rows:
            text_rows = int(grouped.rows_per_expert_H[: tables.text_here].sum())
        return Dispatched(
            rows_ND=grouped.rows_ND,
            rows_per_expert_X=grouped.rows_per_expert_H,
            metadata=FixedShapeMetadata(layer=layer, tokens=tokens, room=step.most_tokens, grouped=grouped),
            text_rows=text_rows,
        )

    def combine(self, rows_ND: Tensor, metadata: FixedShapeMetadata) -> Tensor:
        part_MD = sum_choices(rows_ND, metadata.grouped)
        out_CD = rows_ND.new_empty(metadata.room, rows_ND.shape[1])
        self.group.world.reduce_scatter(out_CD, part_MD, layer=metadata.layer, what="combine")
        return out_CD[: metadata.tokens]
