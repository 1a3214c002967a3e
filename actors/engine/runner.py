"""Executes one rank's part of a step: plan -> flat tensors -> model -> sampled tokens.

T tokens of the step, D hidden, N slices that sample. Decoding slices come first in the flat batch, sorted by context.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from actors.engine.attention import PagedAttention, SliceSpan
from actors.engine.kv_cache import KvCache
from actors.engine.plan import NewSequence, Slice, StepPlan
from actors.engine.sampler import Draw, Sampler
from actors.ernie.config import ErnieConfig, Rules
from actors.ernie.positions import prompt_positions
from actors.ernie.text import LanguageModel


class StepRunner(Protocol):
    """What an engine needs of its ranks. Called on the step thread only."""

    @property
    def block_count(self) -> int:
        """KV blocks there are."""
        ...

    def run(self, plan: StepPlan) -> Mapping[int, int]:
        """Execute a plan; returns the new token of each slice that samples, by sequence number."""
        ...

    def supply_embedding(self, id: int, media_index: int, unit_index: int, embedding: Tensor) -> None:
        """Keep the embedding [tokens of the unit, D] until the unit is computed or the sequence ended."""
        ...


@dataclass(kw_only=True, slots=True)
class _Resident:
    """A sequence as its rank knows it."""

    new: NewSequence
    tokens: npt.NDArray[np.int64]
    """Grows in steps; ``count`` are in use."""
    count: int
    positions_3n: npt.NDArray[np.int32]
    """Of the tokens known at the start."""
    next_position: int
    """Of the first token after the prompt."""
    vision: npt.NDArray[np.bool_] | None
    """Which of the tokens known at the start go to the vision experts; None when none does."""
    blocks: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty(0, dtype=np.int64))

    def append(self, token: int) -> None:
        if self.count == len(self.tokens):
            self.tokens = np.concatenate((self.tokens, np.zeros(max(64, self.count), dtype=np.int64)))
        self.tokens[self.count] = token
        self.count += 1

    def positions(self, first: int, count: int) -> npt.NDArray[np.int32]:
        """[3, count] positions; after the prompt all rows count up from ``next_position``."""
        known = self.positions_3n.shape[1]
        if first + count <= known:
            return self.positions_3n[:, first : first + count]
        if first < known:
            raise ValueError("a slice cannot span known and generated tokens")
        start = self.next_position + first - self.new.prompt_length
        row = np.arange(start, start + count, dtype=np.int32)
        return np.broadcast_to(row, (3, count))


class Runner:
    """One rank's model, cache and residents. Not thread-safe: the step thread's own."""

    def __init__(
        self,
        model: LanguageModel,
        config: ErnieConfig,
        rules: Rules,
        cache: KvCache,
        *,
        batched_decode: bool = True,
    ) -> None:
        self.model = model
        self.config = config
        self.rules = rules
        self.cache = cache
        self.batched_decode = batched_decode
        self.sampler = Sampler(config.im_patch_id)
        self._residents: dict[int, _Resident] = {}
        self._embeddings: dict[int, dict[tuple[int, int], Tensor]] = {}

    @property
    def block_count(self) -> int:
        return self.cache.block_count

    @property
    def resident_count(self) -> int:
        """Sequences with any memory here."""
        return len(self._residents.keys() | self._embeddings.keys())

    def supply_embedding(self, id: int, media_index: int, unit_index: int, embedding: Tensor) -> None:
        at_home = embedding.to(device=self.model.device, dtype=self.model.dtype)
        self._embeddings.setdefault(id, {})[(media_index, unit_index)] = at_home

    @torch.inference_mode()
    def run(self, plan: StepPlan) -> Mapping[int, int]:
        for id in plan.ended:
            self._residents.pop(id, None)
            self._embeddings.pop(id, None)
        for new in plan.new:
            self._residents[new.id] = self._settle(new)
        if not plan.slices:
            return {}
        for part in plan.slices:
            resident = self._residents[part.id]
            if part.new_blocks:
                resident.blocks = np.concatenate((resident.blocks, np.array(part.new_blocks, dtype=np.int64)))
        decodes = sorted((part for part in plan.slices if part.count == 1), key=lambda part: part.first)
        parts = [*decodes, *(part for part in plan.slices if part.count > 1)]
        starts = np.cumsum([0, *(part.count for part in parts)]).tolist()
        h_TD = self._forward(parts, starts, len(decodes))
        return self._sample(parts, starts, h_TD)

    def _forward(self, parts: Sequence[Slice], starts: Sequence[int], decode_count: int) -> Tensor:
        residents = [self._residents[part.id] for part in parts]
        pairs = list(zip(residents, parts, strict=True))
        ids = np.concatenate([resident.tokens[part.first : part.first + part.count] for resident, part in pairs])
        positions = np.concatenate([resident.positions(part.first, part.count) for resident, part in pairs], axis=1)
        x_TD = self.model.embed(self._to_device(ids))
        spans = [
            SliceSpan(start=start, first=part.first, count=part.count, blocks=resident.blocks)
            for (resident, part), start in zip(pairs, starts, strict=False)
        ]
        vision: npt.NDArray[np.bool_] | None = None
        for (resident, part), start in zip(pairs, starts, strict=False):
            self._place_embeddings(x_TD, part, start, resident)
            if resident.vision is not None and part.first < len(resident.vision):
                if vision is None:
                    vision = np.zeros(len(ids), dtype=bool)
                vision[start : start + part.count] = resident.vision[part.first : part.first + part.count]
        vision_T = self._to_device(vision) if vision is not None and vision.any() else None
        attention = PagedAttention(self.cache, spans, decode_count, batched=self.batched_decode)
        return self.model.forward(x_TD, self._to_device(positions), vision_T, attention)

    def _sample(self, parts: Sequence[Slice], starts: Sequence[int], h_TD: Tensor) -> dict[int, int]:
        sampling = [(part, start + part.count - 1) for part, start in zip(parts, starts, strict=False) if part.sample]
        if not sampling:
            return {}
        last_N = self._to_device(np.array([at for _, at in sampling], dtype=np.int64))
        logits_NV = self.model.logits(h_TD.index_select(0, last_N))
        residents = [self._residents[part.id] for part, _ in sampling]
        draws = [
            Draw(
                params=resident.new.sampling,
                seed=resident.new.seed,
                choice=resident.new.choice,
                index=resident.count - resident.new.prompt_length,
            )
            for resident in residents
        ]
        tokens = self.sampler.sample(logits_NV, draws)
        for resident, token in zip(residents, tokens, strict=True):
            resident.append(token)
        return {part.id: token for (part, _), token in zip(sampling, tokens, strict=True)}

    def _place_embeddings(self, x_TD: Tensor, part: Slice, start: int, resident: _Resident) -> None:
        """Overwrites the placeholder rows of the slice; drops each embedding with the last token of its unit."""
        stop = part.first + part.count
        for media_index, (offset, grid) in enumerate(resident.new.spans):
            size = grid.tokens_per_unit
            if offset >= stop or offset + grid.tokens <= part.first:
                continue
            first_unit = max(0, part.first - offset) // size
            last_unit = (min(stop, offset + grid.tokens) - 1 - offset) // size
            for unit_index in range(first_unit, last_unit + 1):
                begin = offset + unit_index * size
                low, high = max(begin, part.first), min(begin + size, stop)
                embedding = self._embeddings[part.id][(media_index, unit_index)]
                x_TD[start + low - part.first : start + high - part.first] = embedding[low - begin : high - begin]
                if high == begin + size:
                    del self._embeddings[part.id][(media_index, unit_index)]

    def _settle(self, new: NewSequence) -> _Resident:
        tokens = np.array(new.token_ids, dtype=np.int64)
        positions, next_position = prompt_positions(new.prompt_length, new.spans, self.rules.positions)
        outputs = len(tokens) - new.prompt_length
        tail = np.arange(next_position, next_position + outputs, dtype=np.int32)
        vision = self.rules.vision_tokens(tokens, self.config).astype(np.bool_)
        return _Resident(
            new=new,
            tokens=tokens,
            count=len(tokens),
            positions_3n=np.concatenate((positions, np.broadcast_to(tail, (3, outputs))), axis=1),
            next_position=next_position,
            vision=vision if vision.any() else None,
        )

    def _to_device(self, array: npt.NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(array).to(self.model.device)
