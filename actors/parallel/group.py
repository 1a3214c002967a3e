"""What the dispatchers of a group share on one rank: its world, the present placement, the present step, the load.

X experts of both banks, L layers of the model, H experts of both banks held here (by layer).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from actors.parallel.layout import ExpertPlacement, ExpertShare
from actors.parallel.world import World


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupStep:
    """What a plan tells every rank about a step, the same on all."""

    number: int
    most_tokens: int
    """The largest token count of a rank."""
    vision: bool
    """Whether any rank has vision tokens. Only steps of static shapes ask."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerTables:
    """One layer's layout as tensors on the device. They are filled anew, never replaced: recorded graphs keep them."""

    rank_of_X: Tensor
    """int64."""
    local_of_X: Tensor
    """int32: index among the experts of the rank that holds it."""
    here_X: Tensor
    """int32, one longer than X: the local index of an expert held here, H for any other and for no expert (id X)."""
    text_here: int
    held_here: int
    """H. Both numbers stay when experts move."""


class ExpertGroup:
    """``begin_step`` before every forward pass; ``place`` after experts have moved."""

    def __init__(self, world: World, placement: ExpertPlacement) -> None:
        if placement.ranks != world.size:
            raise ValueError(f"a placement over {placement.ranks} ranks for a group of {world.size}")
        self.world = world
        self.share = ExpertShare(placement, world.rank)
        self.step: GroupStep | None = None
        self.tables = {layer: self._empty_tables(layer) for layer in placement.sparse_layers}
        """By layer index."""
        self._rows_H = {
            layer: torch.zeros(tables.held_here, dtype=torch.int64, device=world.device)
            for layer, tables in self.tables.items()
        }
        for layer in self.tables:
            self._fill(layer)

    @property
    def placement(self) -> ExpertPlacement:
        return self.share.placement

    def begin_step(self, step: GroupStep) -> None:
        self.step = step
        self.world.step = step.number

    def need_step(self) -> GroupStep:
        if self.step is None:
            raise ValueError("a group's ranks compute in steps: begin_step comes first")
        return self.step

    @torch.inference_mode()
    def place(self, placement: ExpertPlacement) -> None:
        """Takes over a placement with as many experts of each bank on each rank as now. The load starts anew."""
        require_same_sizes(self.placement, placement)
        self.share = ExpertShare(placement, self.world.rank)
        for layer in self.tables:
            self._fill(layer)
            self._rows_H[layer].zero_()

    def count(self, layer: int, rows_per_expert_H: Tensor) -> None:
        """Adds to the load of the experts held here, which see the tokens of all ranks."""
        self._rows_H[layer] += rows_per_expert_H

    @torch.inference_mode()
    def take_load(self) -> dict[int, tuple[int, ...]]:
        """Rows of every expert of the group since the last call or move, by layer and id. A collective."""
        world, placement = self.world, self.placement
        layers = list(self.tables)
        load: dict[int, tuple[int, ...]] = {}
        if not layers:
            return load
        mine = torch.cat([self._rows_H[layer] for layer in layers])
        counts = [sum(len(placement.layout(layer).held(r)) for layer in layers) for r in range(world.size)]
        widest = max(counts)
        padded = torch.zeros(widest, dtype=torch.int64, device=world.device)
        padded[: mine.numel()] = mine
        gathered = torch.empty(world.size * widest, dtype=torch.int64, device=world.device)
        world.all_gather(gathered, padded, layer=None, what="gathering the load of experts")
        by_rank = gathered.view(world.size, widest).tolist()
        starts = [0] * world.size
        for layer in layers:
            layout = placement.layout(layer)
            rows_X = [0] * (2 * layout.num_experts)
            for rank in range(world.size):
                for place, expert in enumerate(layout.held(rank), start=starts[rank]):
                    rows_X[expert] = by_rank[rank][place]
                starts[rank] += len(layout.held(rank))
            load[layer] = tuple(rows_X)
            self._rows_H[layer].zero_()
        return load

    def _empty_tables(self, layer: int) -> LayerTables:
        experts, device = 2 * self.placement.layout(layer).num_experts, self.world.device
        return LayerTables(
            rank_of_X=torch.empty(experts, dtype=torch.int64, device=device),
            local_of_X=torch.empty(experts, dtype=torch.int32, device=device),
            here_X=torch.empty(experts + 1, dtype=torch.int32, device=device),
            text_here=len(self.share.text(layer)),
            held_here=len(self.share.text(layer)) + len(self.share.vision(layer)),
        )

    def _fill(self, layer: int) -> None:
        tables, me = self.tables[layer], self.world.rank
        places = self.placement.layout(layer).places()
        tables.rank_of_X.copy_(torch.tensor([rank for rank, _ in places]))
        tables.local_of_X.copy_(torch.tensor([local for _, local in places]))
        here = [local if rank == me else tables.held_here for rank, local in places]
        tables.here_X.copy_(torch.tensor([*here, tables.held_here]))


def require_same_sizes(present: ExpertPlacement, wanted: ExpertPlacement) -> None:
    """Storage does not grow: raises ValueError if a rank would hold another number of experts of a bank in a layer."""

    def sizes(placement: ExpertPlacement) -> list[object]:
        return [
            None if layout is None else [[len(ids) for ids in held] for held in (layout.text, layout.vision)]
            for layout in placement.layers
        ]

    if sizes(present) != sizes(wanted):
        raise ValueError("experts can only change places: every rank keeps its number of experts of each bank")
