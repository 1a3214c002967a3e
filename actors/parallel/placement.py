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
    """Steepest descent over swaps and moves. ``owner_X``: rank of each expert.

    The cost is that of the busiest rank of each bank, so only what takes work from one of these can lower it. At equal
    cost the sum of squares falls, so that two ranks that are busiest together do not end the search.
    """

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
        self._add_up()

    @property
    def cost(self) -> float:
        return float(self.sums_2R.max(1).sum())

    def improve(self) -> Iterator[tuple[Ints, float]]:
        """Owners and cost after each change, until none helps. What is yielded changes with the next step."""
        while True:
            changes = [change for bank in range(2) for change in self._changes(bank)]
            expert_P, partner_P, target_P = (np.concatenate(parts) for parts in zip(*changes, strict=True))
            if not len(expert_P):
                return
            gains_P, squares_P = self._gains(expert_P, partner_P, target_P)
            most = gains_P.max()
            ties = np.flatnonzero(gains_P >= most - _SAME)
            best = int(ties[squares_P[ties].argmin()])
            if not (most > _SAME or (most > -_SAME and squares_P[best] < -_SAME)):
                return
            self._apply(int(expert_P[best]), int(partner_P[best]), int(target_P[best]))
            yield self.owner_X, self.cost

    def _changes(self, bank: int) -> Iterator[tuple[Ints, Ints, Ints]]:
        """Expert, partner (-1: none) and target, for experts of the busiest ranks of a bank."""
        sums_R = self.sums_2R[bank]
        is_busiest_X = (self.bank_X == bank) & (sums_R >= sums_R.max() - _SAME)[self.owner_X]
        expert_B, partner_Y = np.flatnonzero(is_busiest_X), np.flatnonzero(self.bank_X == bank)
        apart = self.owner_X[expert_B, None] != self.owner_X[None, partner_Y]
        first, second = np.nonzero(apart & (self.work_X[expert_B, None] > self.work_X[None, partner_Y]))
        yield expert_B[first], partner_Y[second], self.owner_X[partner_Y[second]]
        if not self.exchange_only:
            fits = (self.size_X[expert_B, None] <= self.room) & (self.owner_X[expert_B, None] != np.arange(self.ranks))
            first, target = np.nonzero(fits)
            yield expert_B[first], np.full(len(first), -1), target

    def _gains(self, expert_P: Ints, partner_P: Ints, target_P: Ints) -> tuple[Floats, Floats]:
        """What each change takes from the cost, and adds to the sum of squares."""
        source_P, bank_P = self.owner_X[expert_P], self.bank_X[expert_P]
        shift_P = self.work_X[expert_P] - np.where(partner_P >= 0, self.work_X[partner_P], 0.0)
        source_sums_P, target_sums_P = self.sums_2R[bank_P, source_P], self.sums_2R[bank_P, target_P]
        squares_P = 2 * shift_P * (shift_P + target_sums_P - source_sums_P)
        others_P = self._most_of_others()[bank_P, source_P, target_P]
        after_P = np.maximum(others_P, np.maximum(source_sums_P - shift_P, target_sums_P + shift_P))
        return self.sums_2R.max(1)[bank_P] - after_P, squares_P

    def _most_of_others(self) -> Floats:
        """[2, R, R]: the most work of a rank other than two."""
        most: Floats = np.zeros((2, self.ranks, self.ranks))
        for bank, sums_R in enumerate(self.sums_2R):
            order = [int(rank) for rank in sums_R.argsort()[:-4:-1]]
            for rank in reversed(order):
                is_other = np.arange(self.ranks) != rank
                most[bank][np.ix_(is_other, is_other)] = sums_R[rank]
        return most

    def _apply(self, expert: int, partner: int, target: int) -> None:
        source = int(self.owner_X[expert])
        self.owner_X[expert] = target
        if partner >= 0:
            self.owner_X[partner] = source
        else:
            self.room[source] += self.size_X[expert]
            self.room[target] -= self.size_X[expert]
        self._add_up()

    def _add_up(self) -> None:
        self.sums_2R[:] = 0
        np.add.at(self.sums_2R, (self.bank_X, self.owner_X), self.work_X)


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
