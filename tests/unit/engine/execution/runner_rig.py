"""Drives a runner by hand-made plans and knows what it must answer: every sequence alone, computed anew, no cache."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from actors.engine.execution.kv_cache import KvCache
from actors.engine.execution.runner import Runner
from actors.engine.plan import NewSequence, RankPlan, Slice, StepResult, StepShape
from actors.ernie.attention import PackedAttention
from actors.ernie.config import Rules
from actors.ernie.positions import prompt_positions
from actors.ernie.text import LanguageModel
from actors.types import Grid, SamplingParams
from tests.unit.engine.harness import IMAGE, ernie_config, kv_layout, media_request

RULES = Rules.original()


@dataclass
class Driven:
    """A sequence under way."""

    new: NewSequence
    tokens: list[int]
    embeddings: dict[tuple[int, int], torch.Tensor]
    computed: int = 0
    blocks: list[int] = field(default_factory=list)


class RunnerRig:
    """Greedy sequences on a runner; ``free`` blocks are handed out in a scrambled order."""

    def __init__(self, model: LanguageModel, *, blocks: int, block_size: int, seed: int = 0, **options: Any) -> None:
        self.model = model
        self.config = ernie_config(model.config)
        self.cache = KvCache.allocate(kv_layout(model, block_size), blocks, model.device)
        self.runner = Runner(model, self.config, RULES, self.cache, **options)
        self.random = np.random.default_rng(seed)
        self.free = self.random.permutation(blocks).tolist()
        self.driven: dict[int, Driven] = {}
        self._new: list[NewSequence] = []
        self._ended: list[int] = []
        self._next = 0
        self.steps = 0
        self.tokens_elsewhere = 0
        """What the other ranks compute, of those that have the most, in the steps to come."""
        self.prompts_elsewhere = False
        self.vision_elsewhere = False

    def add(self, length: int, *, media: bool = False, outputs: int = 0, **sampling: Any) -> int:
        """A new sequence, told with the next step: a random prompt, or one with a picture and a video."""
        id, self._next = self._next, self._next + 1
        spans: tuple[tuple[int, Grid], ...] = ()
        embeddings: dict[tuple[int, int], torch.Tensor] = {}
        prompt = self.random.integers(3, 100, length).tolist()
        if media:
            request, embeddings = media_request(id)
            prompt, spans = list(request.prompt_ids), tuple((span.offset, span.grid) for span in request.media)
        tokens = [*prompt, *self.random.integers(3, 100, outputs).tolist()]
        params = SamplingParams(**({"temperature": 0.0, "max_tokens": 1000} | sampling))
        new = NewSequence(
            id=id,
            token_ids=tuple(tokens),
            prompt_length=len(prompt),
            spans=spans,
            sampling=params,
            seed=0,
            choice=0,
        )
        self._new.append(new)
        self.driven[id] = Driven(new, tokens, embeddings)
        return id

    def end(self, id: int) -> None:
        driven = self.driven.pop(id)
        self.free += driven.blocks
        self._new = [new for new in self._new if new.id != id]
        self._ended.append(id)

    def _of(self, part: Slice) -> list[int]:
        return self.driven[part.id].tokens[part.first : part.first + part.count]

    def step(self, counts: dict[int, int]) -> StepResult:
        """Computes so many further tokens of each sequence; the last known token of one samples the next."""
        slices = []
        for id, count in counts.items():
            driven = self.driven[id]
            stop = driven.computed + count
            assert stop <= len(driven.tokens)
            need = -(-stop // self.cache.layout.block_size) - len(driven.blocks)
            fresh, self.free = self.free[: max(0, need)], self.free[max(0, need) :]
            driven.blocks += fresh
            sample = stop == len(driven.tokens)
            slices.append(Slice(id=id, first=driven.computed, count=count, new_blocks=tuple(fresh), sample=sample))
        for new in self._new:
            for (media, unit), embedding in self.driven[new.id].embeddings.items():
                self.runner.supply_embedding(new.id, media, unit, embedding)
        shape = StepShape(
            step=self.steps,
            max_tokens=max(sum(counts.values()), self.tokens_elsewhere),
            decodes=not self.prompts_elsewhere
            and all(part.count == 1 and part.first >= self.driven[part.id].new.prompt_length for part in slices),
            vision=self.vision_elsewhere or any(max(self._of(part)) >= IMAGE for part in slices),
        )
        plan = RankPlan(shape=shape, ended=tuple(self._ended), new=tuple(self._new), slices=tuple(slices))
        self._ended, self._new = [], []
        self.steps += 1
        result = self.runner.run(plan)
        assert result.tokens.keys() == {part.id for part in slices if part.sample}
        for part in slices:
            self.driven[part.id].computed += part.count
        for id, token in result.tokens.items():
            self.driven[id].tokens.append(token)
        return result

    @torch.inference_mode()
    def wanted(self, id: int) -> list[int]:
        """The greedy token behind each output so far, and the prompt."""
        driven = self.driven[id]
        new, model = driven.new, self.model
        known = np.array(driven.tokens[:-1])
        positions, following = prompt_positions(new.prompt_length, new.spans, RULES.positions)
        tail = np.arange(following, following + len(known) - new.prompt_length)
        positions = np.concatenate((positions, np.broadcast_to(tail, (3, len(tail)))), axis=1)
        vision = torch.from_numpy(RULES.vision_tokens(known, self.config))
        x_TD = model.embed(torch.from_numpy(known))
        for media, (offset, grid) in enumerate(new.spans):
            size = grid.tokens_per_unit
            for unit in range(grid.units):
                x_TD[offset + unit * size : offset + (unit + 1) * size] = driven.embeddings[(media, unit)]
        h_TD = model.forward(x_TD, torch.from_numpy(positions), vision, PackedAttention([0, len(known)]))
        logits = model.logits(h_TD)[:, : self.config.im_patch_id]
        return logits.argmax(dim=1).tolist()[len(new.token_ids) - 1 :]

    def check(self, id: int) -> None:
        """The outputs of a sequence are those of the reference."""
        driven = self.driven[id]
        assert driven.tokens[len(driven.new.token_ids) :] == self.wanted(id)
