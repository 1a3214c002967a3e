"""The experts of one rank of a group, as its runner uses them: which dispatch a step takes, their load, their moves."""

from __future__ import annotations

import threading

import torch

from actors.engine.plan import StepShape
from actors.ernie.moe import SparseMlp
from actors.ernie.text import LanguageModel
from actors.parallel.group import ExpertGroup, GroupStep
from actors.parallel.group_dispatch import AllToAllDispatcher, FixedShapeDispatcher
from actors.parallel.layout import ExpertPlacement
from actors.parallel.moves import MoveReport
from actors.parallel.placement import ExpertMemory

FIXED_ROOM = 256
"""Most tokens of a rank that travel in fixed shapes.

Every rank then gets every token, padded to the fullest rank, in two collectives instead of three and without asking the
host for counts. Replies are even over the ranks and few, so that there is little to pad; a prompt lives on one rank
alone, and the others would pad up to its length.
"""


class ExpertSteps:
    """A share of the experts and the group it belongs to. Every method but ``close`` is a collective, or precedes one:
    all ranks call the same ones in the same order.
    """

    def __init__(self, model: LanguageModel, group: ExpertGroup) -> None:
        if model.share != group.share:
            raise ValueError("the model does not hold the share of the experts that its group knows")
        self.group = group
        self._model = model
        self.fixed = FixedShapeDispatcher(group)
        self.variable = AllToAllDispatcher(group)

    def begin(self, shape: StepShape) -> None:
        """Before every forward pass, also without tokens here. Chooses by ``shape`` alone, which all ranks share."""
        self.group.begin_step(GroupStep(number=shape.step, most_tokens=shape.max_tokens, vision=shape.vision))
        is_fixed = shape.decodes and shape.max_tokens <= FIXED_ROOM
        self._model.dispatcher = self.fixed if is_fixed else self.variable

    def meet(self, mark: str, timeout_s: float, stop: threading.Event | None = None) -> None:
        """Waits until all ranks are here, for longer than in a collective. Each mark once. Raises WorldError."""
        self.group.world.meet(mark, timeout_s=timeout_s, stop=stop)

    def largest(self, value: int) -> int:
        """Over all ranks."""
        world = self.group.world
        found = torch.empty(world.size, dtype=torch.int64, device=world.device)
        world.all_gather(found, torch.tensor([value], device=world.device), layer=None, what="comparing ranks")
        return int(found.max())

    def take_load(self) -> dict[int, tuple[int, ...]]:
        """Rows of every expert since the last call or move, by layer and id."""
        return self.group.take_load()

    def move(self, wanted: ExpertPlacement) -> MoveReport:
        """Between steps."""
        return self._model.move_experts(self.group, wanted)

    def memory(self) -> ExpertMemory:
        """Of one layer; each rank has room for the experts it holds. No collective."""
        config, placement = self._model.config, self.group.placement
        mlp = next(layer.mlp for layer in self._model.layers if isinstance(layer.mlp, SparseMlp))
        text = sum(tensor[0].nbytes for tensor in mlp.text.experts)
        vision = text * config.moe_intermediate_size[1] // config.moe_intermediate_size[0]
        sizes = ExpertMemory(text_expert=text, vision_expert=vision, room=())
        used = sizes.used(placement.layout(placement.sparse_layers[0]))
        return ExpertMemory(text_expert=text, vision_expert=vision, room=used)

    def close(self) -> None:
        """Leaves the world; whoever waits for this rank in a collective learns of it. Idempotent."""
        self.group.world.close()
