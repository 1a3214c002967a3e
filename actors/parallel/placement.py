"""Where experts should be, decided from the load they had. Pure: no tensors of weights, no clock, no chance.

All ranks wait in every layer for the one with most work. Steps mix the modalities differently, and many have text
alone (all decoding, most prompts), so evening out the sum is not enough: a rank with the busy text experts and another
with the busy vision experts would look even and be idle by turns. The cost of a layout is therefore the most work of
a rank in text experts plus the most in vision experts, which bounds the busiest rank of every mix. Work is rows times
the size of the expert; a vision expert of the 28B model is a third of a text expert.

X experts of both banks, R ranks, P candidates for a change.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actors.parallel.layout import ExpertLayout, ExpertPlacement, Held, even_layout

_SAME = 1e-12
"""Of the whole work: smaller differences are rounding."""

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertMemory:
    """Sizes in bytes of one layer: an expert of each bank, and what each rank has for its experts of both."""

    text_expert: int
    vision_expert: int
    room: tuple[int, ...]

    def used(self, layout: ExpertLayout) -> tuple[int, ...]:
        """By rank."""
        return tuple(
            len(text) * self.text_expert + len(vision) * self.vision_expert
            for text, vision in zip(layout.text, layout.vision, strict=True)
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class PlacementPlan:
    """A layout for one layer. Costs are shares of the layer's whole work, 0 where there was none."""

    layout: ExpertLayout
    moved: tuple[int, ...]
    """Experts that change their rank, in the space of both banks."""
    cost_before: float
    cost: float


def plan_placement(
    load: Sequence[int],
    ranks: int,
    memory: ExpertMemory,
    *,
    present: ExpertLayout | None = None,
    least_gain: float = 0.0,
    exchange_only: bool = False,
) -> PlacementPlan:
    """A layout for the rows each expert had: ``load`` [X], ids of both banks. Never costs more than ``present``.

    Experts change places one pair at a time, or one alone where the room allows and not ``exchange_only`` (storage of
    a running group does not grow). An expert moves only if the plan as a whole saves ``least_gain`` of the present cost
    for each expert moved. Who stays keeps its place in storage. Without ``present`` the even layout is where it starts,
    or one that fits, and moving is free.

    Raises ValueError if the experts do not fit, ``present`` not either, or the arguments disagree about sizes.
    """
    if len(memory.room) != ranks or len(load) % 2 or min(load, default=0) < 0:
        raise ValueError(f"load of {len(load)} experts and room of {len(memory.room)} ranks for a group of {ranks}")
    start = present or _fitting_layout(len(load) // 2, ranks, memory)
    if start.ranks != ranks or 2 * start.num_experts != len(load):
        raise ValueError(f"a layout of {start.num_experts} experts on {start.ranks} ranks is not that of this load")
    if any(used > room for used, room in zip(memory.used(start), memory.room, strict=True)):
        raise ValueError(f"the present layout takes {memory.used(start)} bytes of {memory.room}")
    search = _Search(load, start, memory, exchange_only=exchange_only)
    if search.cost == 0:
        return PlacementPlan(layout=start, moved=(), cost_before=0.0, cost=0.0)
    before, best_net, chosen = search.cost, 0.0, search.owner_X.copy()
    cost = before
    for owner_X, reached in search.improve():
        moves = int((owner_X != search.start_X).sum()) if present is not None else 0
        net = (before - reached) / before - least_gain * moves
        if reached < before and net > best_net + _SAME:
            best_net, chosen, cost = net, owner_X.copy(), reached
    moved = tuple(int(e) for e in np.flatnonzero(chosen != search.start_X))
    return PlacementPlan(layout=_arranged(start, chosen), moved=moved, cost_before=before, cost=cost)


def plan_layers(
    load: Mapping[int, Sequence[int]], present: ExpertPlacement, memory: ExpertMemory, *, least_gain: float
) -> ExpertPlacement:
    """``plan_placement`` for every layer of a running group whose load is given; the others stay."""
    layers = list(present.layers)
    for layer, rows in load.items():
        layout = present.layout(layer)
        plan = plan_placement(rows, present.ranks, memory, present=layout, least_gain=least_gain, exchange_only=True)
        layers[layer] = plan.layout
    return ExpertPlacement(tuple(layers))


def skew(load: Sequence[int], layout: ExpertLayout) -> tuple[float, float]:
    """Rows of the busiest rank over the mean of ranks, of text and of vision experts: 1 is even, and no rows are."""
    experts = layout.num_experts

    def of_bank(rows: Sequence[int], held: Held) -> float:
        busiest = max(sum(rows[e] for e in ids) for ids in held)
        return busiest * layout.ranks / sum(rows) if busiest else 1.0

    return of_bank(load[:experts], layout.text), of_bank(load[experts:], layout.vision)


class _Search:
    """Steepest descent over swaps and moves. ``owner_X``: rank of each expert."""

    def __init__(self, load: Sequence[int], start: ExpertLayout, memory: ExpertMemory, *, exchange_only: bool) -> None:
        experts, self.ranks = start.num_experts, start.ranks
        size_X = np.repeat([memory.text_expert, memory.vision_expert], experts)
        work_X = np.asarray(load, dtype=np.float64) * size_X
        self.work_X: Floats = work_X / max(float(work_X.sum()), 1.0)
        self.size_X: Ints = size_X.astype(np.int64)
        self.bank_X: Ints = np.repeat([0, 1], experts)
        self.start_X: Ints = np.asarray([rank for rank, _ in start.places()], dtype=np.int64)
        self.owner_X = self.start_X.copy()
        self.room: Ints = np.asarray(memory.room, dtype=np.int64) - np.asarray(memory.used(start), dtype=np.int64)
        self.exchange_only = exchange_only
        self.sums_2R: Floats = np.zeros((2, self.ranks))
        np.add.at(self.sums_2R, (self.bank_X, self.owner_X), self.work_X)
        within = [np.triu_indices(experts, 1) for _ in range(2)]
        self.pairs = np.concatenate([np.stack(pair) + bank * experts for bank, pair in enumerate(within)], axis=1)

    @property
    def cost(self) -> float:
        return float(_costs(self.sums_2R[None])[0])

    def improve(self) -> Iterator[tuple[Ints, float]]:
        """Owners and cost after each change, until none helps. What is yielded changes with the next step."""
        cost, squares = self.cost, float(_squares(self.sums_2R[None])[0])
        while True:
            changes = [self._swaps()] if self.exchange_only else [self._swaps(), self._moves()]
            expert_P, partner_P, target_P = (np.concatenate(parts) for parts in zip(*changes, strict=True))
            if not len(expert_P):
                return
            sums_P2R = self._sums_after(expert_P, partner_P, target_P)
            costs_P, squares_P = _costs(sums_P2R), _squares(sums_P2R)
            least = costs_P.min()
            ties = np.flatnonzero(costs_P <= least + _SAME)
            best = int(ties[squares_P[ties].argmin()])
            # At equal cost the sum of squares falls, so that two ranks that are busiest together do not end the search.
            if not (least < cost - _SAME or (least < cost + _SAME and squares_P[best] < squares - _SAME)):
                return
            self._apply(int(expert_P[best]), int(partner_P[best]), int(target_P[best]))
            cost, squares = float(costs_P[best]), float(squares_P[best])
            yield self.owner_X, cost

    def _swaps(self) -> tuple[Ints, Ints, Ints]:
        """Expert, partner and the partner's rank, of every pair of a bank on two ranks."""
        first, second = self.pairs
        apart = self.owner_X[first] != self.owner_X[second]
        first, second = first[apart], second[apart]
        return first, second, self.owner_X[second]

    def _moves(self) -> tuple[Ints, Ints, Ints]:
        """Expert, -1 and the target, of every expert and rank with room for it."""
        fits = (self.size_X[:, None] <= self.room[None]) & (self.owner_X[:, None] != np.arange(self.ranks)[None])
        expert, target = np.nonzero(fits)
        return expert, np.full(len(expert), -1), target

    def _sums_after(self, expert_P: Ints, partner_P: Ints, target_P: Ints) -> Floats:
        back_P = np.where(partner_P >= 0, self.work_X[partner_P], 0.0)
        gained_P = self.work_X[expert_P] - back_P
        candidates, bank_P = np.arange(len(expert_P)), self.bank_X[expert_P]
        sums_P2R: Floats = np.repeat(self.sums_2R[None], len(expert_P), axis=0)
        sums_P2R[candidates, bank_P, self.owner_X[expert_P]] -= gained_P
        sums_P2R[candidates, bank_P, target_P] += gained_P
        return sums_P2R

    def _apply(self, expert: int, partner: int, target: int) -> None:
        source = int(self.owner_X[expert])
        self.owner_X[expert] = target
        if partner >= 0:
            self.owner_X[partner] = source
        else:
            self.room[source] += self.size_X[expert]
            self.room[target] -= self.size_X[expert]
        self.sums_2R[:] = 0
        np.add.at(self.sums_2R, (self.bank_X, self.owner_X), self.work_X)


def _costs(sums_P2R: Floats) -> Floats:
    return np.asarray(sums_P2R.max(2).sum(1))


def _squares(sums_P2R: Floats) -> Floats:
    return np.asarray((sums_P2R**2).sum((1, 2)))


def _fitting_layout(experts: int, ranks: int, memory: ExpertMemory) -> ExpertLayout:
    even = even_layout(experts, ranks)
    if all(used <= room for used, room in zip(memory.used(even), memory.room, strict=True)):
        return even
    left = list(memory.room)
    held: list[list[list[int]]] = []
    for size in (memory.text_expert, memory.vision_expert):
        bank: list[list[int]] = [[] for _ in range(ranks)]
        for expert in range(experts):
            rank = max(range(ranks), key=lambda r: left[r])
            if left[rank] < size:
                raise ValueError(f"{experts} experts of each bank do not fit into {memory.room} bytes")
            left[rank] -= size
            bank[rank].append(expert)
        held.append(bank)
    text, vision = (tuple(tuple(ids) for ids in bank) for bank in held)
    return ExpertLayout(text=text, vision=vision)


def _arranged(start: ExpertLayout, owner_X: NDArray[Any]) -> ExpertLayout:
    """Who stays keeps its place, newcomers take those of the leavers, the rest moves up."""
    experts = start.num_experts

    def bank(held: Held, owner_E: NDArray[Any]) -> Held:
        result = []
        for rank, ids in enumerate(held):
            newcomers = [int(e) for e in np.flatnonzero(owner_E == rank) if int(e) not in ids]
            places = [e if owner_E[e] == rank else newcomers.pop(0) if newcomers else None for e in ids]
            result.append(tuple(e for e in (*places, *newcomers) if e is not None))
        return tuple(result)

    return ExpertLayout(text=bank(start.text, owner_X[:experts]), vision=bank(start.vision, owner_X[experts:]))
