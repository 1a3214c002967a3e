"""What an engine needs of the ranks that compute its steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from actors.engine.constraints.constraint import TokenConstraint
from actors.engine.plan import LayerPart, StepPlan, StepResult
from actors.types import EngineRole


class StepRunner(Protocol):
    """Called on the step thread only, but for ``watch``."""

    @property
    def block_counts(self) -> tuple[int, ...]:
        """KV blocks of each rank."""
        ...

    kv_written: Callable[[int, LayerPart], None]
    """Set by whoever runs steps. Called in the midst of a step with prompts, for each rank part by part of the layers,
    when it is known that the keys and values of all its tokens are in the rank's cache; or for none of a rank's parts.
    """

    def watch(self, on_lost: Callable[[Exception], None]) -> None:
        """``on_lost`` is called once, on any thread, when a rank is lost: no step can be run any more."""
        ...

    def run(self, plan: StepPlan) -> StepResult:
        """Executes a plan on all ranks."""
        ...

    def set_role(self, role: EngineRole) -> None:
        """Makes all ranks ready for a role, while no sequence is here; ``block_counts`` are others then."""
        ...

    def supply_embedding(self, rank: int, id: int, media_index: int, unit_index: int, embedding: Tensor) -> None:
        """Keeps the embedding [tokens of the unit, D] on a rank until the unit is computed or the sequence ended."""
        ...

    def supply_constraint(self, id: int, constraint: TokenConstraint) -> None:
        """Bounds the tokens of a sequence until it ended; comes before the first slice that samples, and may come
        before it has a rank.
        """
        ...
