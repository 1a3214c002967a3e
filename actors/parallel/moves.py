"""Experts change their ranks between two steps: weights travel over the group's own world, into the storage they leave.

H experts of a bank held here.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from actors.parallel.group import ExpertGroup, require_same_sizes
from actors.parallel.layout import ExpertPlacement, Held


@dataclass(frozen=True, kw_only=True, slots=True)
class BankStorage:
    """The tensors [H, ...] of one layer that hold an expert per row; a bank that is not loaded has none."""

    text: tuple[Tensor, ...]
    vision: tuple[Tensor, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class MoveReport:
    """What one rank did. ``experts`` counts those that came from other ranks."""

    experts: int
    bytes_sent: int
    seconds: float


@torch.inference_mode()
def move_experts(group: ExpertGroup, wanted: ExpertPlacement, storage: Mapping[int, BankStorage]) -> MoveReport:
    """Brings every rank's experts (``storage`` by layer) into the order of ``wanted``, and the group's tables too.

    A collective: all ranks call it with the same placement, no step running. Tensors keep their addresses; beside them
    there are never more than the moving experts of one tensor of one layer, once on their way out and once in.

    Raises ValueError, before anything moves, if a rank would hold another number of experts of a bank; WorldError if
    the group breaks, which then has lost these weights.
    """
    require_same_sizes(group.placement, wanted)
    started = time.monotonic()
    experts = sent = 0
    for layer in wanted.sparse_layers:
        before, after = group.placement.layout(layer), wanted.layout(layer)
        banks = ((before.text, after.text, storage[layer].text), (before.vision, after.vision, storage[layer].vision))
        for held, asked, tensors in banks:
            if held != asked:
                for tensor in tensors:
                    sent += _move(group, layer, held, asked, tensor)
                if tensors:
                    experts += len(set(asked[group.world.rank]) - set(held[group.world.rank]))
    group.place(wanted)
    return MoveReport(experts=experts, bytes_sent=sent, seconds=time.monotonic() - started)


def _move(group: ExpertGroup, layer: int, held: Held, asked: Held, tensor: Tensor) -> int:
    """One tensor of one layer; bytes that left this rank."""
    me = group.world.rank
    leaving = [_between(held, asked, me, rank) for rank in range(group.world.size)]
    coming = [_between(held, asked, rank, me) for rank in range(group.world.size)]
    outgoing = tensor.index_select(0, _places(held[me], leaving, tensor.device))
    incoming = tensor.new_empty(sum(map(len, coming)), *tensor.shape[1:])
    group.world.all_to_all(
        incoming,
        [len(ids) for ids in coming],
        outgoing,
        [len(ids) for ids in leaving],
        layer=layer,
        what="moving experts",
    )
    tensor.index_copy_(0, _places(asked[me], coming, tensor.device), incoming)
    return sum(len(ids) for rank, ids in enumerate(leaving) if rank != me) * tensor[:1].nbytes


def _between(held: Held, asked: Held, source: int, target: int) -> list[int]:
    """Experts that ``target`` gets from ``source``, in its order; within one rank those that change their place."""
    here, there = held[source], asked[target]
    return [e for i, e in enumerate(there) if e in here and (source != target or here.index(e) != i)]


def _places(order: Sequence[int], groups: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    return torch.tensor([order.index(e) for ids in groups for e in ids], dtype=torch.int64, device=device)
