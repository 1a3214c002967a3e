"""Which rank of a group holds which experts: plain values, the same on every rank.

Every MoE layer has a layout of its own. Ranks wait for each other in every layer (dispatch and combine), and an expert
of one layer has nothing to do with that of the same number in another: a layout for all layers could only even out
their sum, and each layer would wait for its own busiest rank all the same.

E experts of one bank. Ids of both banks are one space: 0 .. E-1 text, E .. 2E-1 vision.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

Held = tuple[tuple[int, ...], ...]
"""Expert ids of one bank (0 .. E-1) by rank, in the order in which the rank stores them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertLayout:
    """One MoE layer. Raises ValueError unless each expert of each bank is held by exactly one rank."""

    text: Held
    vision: Held

    def __post_init__(self) -> None:
        if not self.text or len(self.text) != len(self.vision):
            raise ValueError(f"text experts on {len(self.text)} ranks, vision experts on {len(self.vision)}")
        for bank, held in (("text", self.text), ("vision", self.vision)):
            if sorted(e for ids in held for e in ids) != list(range(self.num_experts)):
                raise ValueError(
                    f"{bank} experts 0 .. {self.num_experts - 1} are not each held by exactly one rank: {held}"
                )

    @property
    def ranks(self) -> int:
        return len(self.text)

    @property
    def num_experts(self) -> int:
        """Of one bank."""
        return sum(map(len, self.text))

    def held(self, rank: int) -> tuple[int, ...]:
        """Ids in the space of both banks; the position is the local index: text experts, then vision experts."""
        return self.text[rank] + tuple(self.num_experts + e for e in self.vision[rank])

    def places(self) -> tuple[tuple[int, int], ...]:
        """(rank, local index) of each expert, by id in the space of both banks."""
        found = {e: (rank, i) for rank in range(self.ranks) for i, e in enumerate(self.held(rank))}
        return tuple(found[e] for e in range(2 * self.num_experts))


def even_layout(num_experts: int, ranks: int) -> ExpertLayout:
    """Runs of neighbouring ids; if they do not divide, the first ranks hold one more."""
    if ranks < 1:
        raise ValueError(f"a group has at least one rank, not {ranks}")
    size, more = divmod(num_experts, ranks)
    starts = [rank * size + min(rank, more) for rank in range(ranks + 1)]
    held = tuple(tuple(range(starts[rank], starts[rank + 1])) for rank in range(ranks))
    return ExpertLayout(text=held, vision=held)


@dataclass(frozen=True, slots=True)
class ExpertPlacement:
    """The layouts of all layers of a model, by layer index; dense layers have None."""

    layers: tuple[ExpertLayout | None, ...]

    def __post_init__(self) -> None:
        sizes = {(layout.ranks, layout.num_experts) for layout in self.layers if layout is not None}
        if len(sizes) > 1:
            raise ValueError(f"layers disagree on the number of ranks and experts: {sorted(sizes)}")

    def layout(self, layer: int) -> ExpertLayout:
        """Raises ValueError for a dense layer."""
        found = self.layers[layer]
        if found is None:
            raise ValueError(f"layer {layer} has no experts")
        return found

    @property
    def sparse_layers(self) -> tuple[int, ...]:
        return tuple(i for i, layout in enumerate(self.layers) if layout is not None)

    @property
    def ranks(self) -> int:
        """1 for a model without experts."""
        return max((layout.ranks for layout in self.layers if layout is not None), default=1)


def even_placement(num_layers: int, sparse_layers: Collection[int], num_experts: int, ranks: int) -> ExpertPlacement:
    """The even layout in every sparse layer."""
    layout = even_layout(num_experts, ranks)
    return ExpertPlacement(tuple(layout if i in sparse_layers else None for i in range(num_layers)))


@dataclass(frozen=True, slots=True)
class ExpertShare:
    """One rank's part of a placement."""

    placement: ExpertPlacement
    rank: int

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.placement.ranks:
            raise ValueError(f"rank {self.rank} of a placement over {self.placement.ranks} ranks")

    def text(self, layer: int) -> tuple[int, ...]:
        """Text experts held here, in storage order."""
        return self.placement.layout(layer).text[self.rank]

    def vision(self, layer: int) -> tuple[int, ...]:
        """Vision experts held here, 0 .. E-1, in storage order."""
        return self.placement.layout(layer).vision[self.rank]
