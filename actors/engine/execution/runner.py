"""Executes one rank's part of a step: plan -> flat tensors -> model -> sampled tokens.

T tokens of the part, D hidden, N slices that sample, R rows whose prompt log-probabilities are wanted. In a step that
only decodes nothing here is done per sequence, but for reading the plan and writing the result. A part without slices
runs the model all the same, with T = 0, when other ranks have tokens: they meet in its layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from actors.engine.constraints.constraint import TokenConstraint
from actors.engine.execution.attention import PagedAttention, PlainAttention
from actors.engine.execution.attention_varlen import VarlenAttention
from actors.engine.execution.decode_graphs import DecodeGraphs
from actors.engine.execution.embedding_store import EmbeddingStore
from actors.engine.execution.expert_steps import ExpertSteps
from actors.engine.execution.forms import AttentionForm
from actors.engine.execution.kv_cache import KvCache
from actors.engine.execution.residents import Known, Residents
from actors.engine.execution.step_batch import Chunk, StepBatch, StepLayout, build_batch
from actors.engine.execution.vision_tail import FillBank, VisionTail
from actors.engine.plan import LayerPart, RankPlan, StepResult, StepShape
from actors.engine.sampling.sampler import Sampler
from actors.ernie.attention import Attention
from actors.ernie.config import ErnieConfig, Rules
from actors.ernie.text import LanguageModel
from actors.types import EngineRole, TokenLogprobs

KV_PARTS = 4
"""Of the layers: their keys and values may leave one after the other. More parts hide more of a transfer, and each
costs the two engines four messages.
"""
PROMPT_LOGPROB_ROWS = 256
"""Rows of logits at once: a row of a large vocabulary has 400 KB."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RoleChange:
    """What a rank needs to change its role."""

    tail: VisionTail
    fill: FillBank
    """From the files, once more."""


class Runner:
    """One rank's model, cache and residents. Not thread-safe: one thread's own."""

    def __init__(
        self,
        model: LanguageModel,
        config: ErnieConfig,
        rules: Rules,
        cache: KvCache,
        *,
        attention: AttentionForm = AttentionForm.PAGED,
        graphs: DecodeGraphs | None = None,
        experts: ExpertSteps | None = None,
        roles: RoleChange | None = None,
    ) -> None:
        """``graphs`` runs the steps that only decode, as far as it has a batch size for them. ``experts``: where the
        model holds a share of them; graphs do not go with it. ``roles``: None keeps the role it was loaded for.
        """
        if experts is not None and graphs is not None:
            raise ValueError("decode graphs of a group of ranks are not built")
        self.model = model
        self.config = config
        self.cache = cache
        self.attention = attention
        self.graphs = graphs
        self.experts = experts
        self.roles = roles
        self.sampler = Sampler(
            config.im_patch_id, vocab_size=config.text.vocab_size, eos_token_ids=config.eos_token_ids
        )
        self.kv_written: Callable[[LayerPart], None] | None = None
        """See ``StepRunner``, of the tokens of this rank. None where nobody wants to know."""
        self._residents = Residents(config, rules)
        self._embeddings = EmbeddingStore()

    @property
    def block_count(self) -> int:
        """KV blocks there are at present."""
        return self.cache.block_count if self.roles is None else self.roles.tail.block_count

    @property
    def resident_count(self) -> int:
        """Sequences with any memory here."""
        return len({*self._residents.ids, *self._embeddings.ids, *self.sampler.sequence_ids})

    def set_role(self, role: EngineRole) -> None:
        """Reads the vision experts, or gives their room to KV blocks. Between steps, with nothing in the blocks of the
        tail. Raises ValueError where the role is fixed, OSError or ValueError if the checkpoint cannot be read again.
        """
        if self.roles is None:
            raise ValueError("the role of this rank is fixed")
        if role.prefills:
            self.roles.tail.hold_bank(self.roles.fill)
        else:
            self.roles.tail.hold_blocks()

    def need_experts(self) -> ExpertSteps:
        """Raises ValueError where all experts are here."""
        if self.experts is None:
            raise ValueError("this rank shares no experts with others")
        return self.experts

    def close(self) -> None:
        """Leaves the group's world, if there is one. Idempotent."""
        if self.experts is not None:
            self.experts.close()

    def supply_embedding(self, id: int, media_index: int, unit_index: int, embedding: Tensor) -> None:
        """Keeps the embedding [tokens of the unit, D] until the unit is computed or the sequence ended."""
        at_home = embedding.to(device=self.model.device, dtype=self.model.dtype)
        self._embeddings.supply(id, media_index, unit_index, at_home)

    def supply_constraint(self, id: int, constraint: TokenConstraint) -> None:
        """Bounds the tokens of a sequence until it ended; comes before the first slice that samples."""
        self.sampler.constrain(id, constraint)

    @torch.inference_mode()
    def run(self, plan: RankPlan) -> StepResult:
        """Raises ValueError for tokens of the vision experts in a step that is to have none on any rank."""
        for id in plan.ended:
            self._residents.remove(id)
            self._embeddings.forget(id)
            self.sampler.forget(id)
        for new in plan.new:
            self._residents.add(new)
            self.sampler.admit(new)
        if not plan.shape.max_tokens:
            return StepResult(tokens={})
        self._residents.append_blocks(plan.slices)
        if self.experts is not None:
            self.experts.begin(plan.shape)
        batch = build_batch(self._residents, plan.slices, self.cache.layout.block_size)
        h_TD = self._forward(batch, plan.shape)
        prompt_logprobs = self._prompt_logprobs(batch, h_TD)
        tokens, logprobs = self._sample(batch, h_TD)
        return StepResult(tokens=tokens, logprobs=logprobs, prompt_logprobs=prompt_logprobs)

    def _forward(self, batch: StepBatch, shape: StepShape) -> Tensor:
        if self.graphs is not None and shape.decodes and self.graphs.fits(batch.layout):
            return self.graphs.run(batch)
        x_TD = self.model.embed(self._to_device(batch.ids_T))
        for known, chunk in zip(batch.known, batch.layout.chunks, strict=True):
            if known.new.spans:
                self._embeddings.place(x_TD, known, chunk)
        positions_3T, attention = self._to_device(batch.positions_3T), self._attention(batch.layout)
        if not shape.decodes and self.kv_written is not None:
            attention = _Watched(attention, len(self.model.layers), self.kv_written)
        return self.model.forward(x_TD, positions_3T, self._vision(batch, shape), attention)

    def _vision(self, batch: StepBatch, shape: StepShape) -> Tensor | None:
        """On every rank alike: with tokens of the vision experts on one, their rows may come to all."""
        if batch.vision_T is not None:
            if not shape.vision:
                raise ValueError(f"step {shape.step} was planned without tokens for the vision experts and has some")
            return self._to_device(batch.vision_T)
        if shape.vision:
            return torch.zeros(len(batch.ids_T), dtype=torch.bool, device=self.model.device)
        return None

    def _attention(self, layout: StepLayout) -> Attention:
        if self.attention is AttentionForm.VARLEN:
            return VarlenAttention.of_layout(self.cache, layout)
        if self.attention is AttentionForm.PAGED:
            return PagedAttention(self.cache, layout)
        return PlainAttention(self.cache, layout)

    def _sample(self, batch: StepBatch, h_TD: Tensor) -> tuple[dict[int, int], dict[int, TokenLogprobs]]:
        sampling = batch.sampling
        if not len(sampling):
            return {}, {}
        last_N = self._to_device(batch.ends[sampling] - 1)
        ids = [batch.parts[index].id for index in sampling]
        samples = self.sampler.sample(self.model.logits(h_TD.index_select(0, last_N)), ids)
        self._residents.append_tokens(batch.slots[sampling], samples.tokens)
        entries = zip(ids, samples.logprobs, strict=True)
        return dict(zip(ids, samples.tokens, strict=True)), {id: entry for id, entry in entries if entry is not None}

    def _prompt_logprobs(self, batch: StepBatch, h_TD: Tensor) -> dict[int, tuple[TokenLogprobs | None, ...]]:
        """Of the prompt tokens that follow those of each chunk that asks, None where they cannot be generated."""
        found: dict[int, tuple[TokenLogprobs | None, ...]] = {}
        for known, chunk in zip(batch.known, batch.layout.chunks, strict=True):
            count = known.new.sampling.prompt_logprobs
            if count is not None and chunk.first < known.new.prompt_length:
                entries = self._following_logprobs(known, chunk, count, h_TD)
                if entries:
                    found[known.new.id] = entries
        return found

    def _following_logprobs(
        self, known: Known, chunk: Chunk, count: int, h_TD: Tensor
    ) -> tuple[TokenLogprobs | None, ...]:
        stop = min(chunk.context, known.new.prompt_length - 1)
        following = known.new.token_ids[chunk.first + 1 : stop + 1]
        scored = [at for at, token in enumerate(following) if token < self.config.im_patch_id]
        entries: list[TokenLogprobs | None] = [None] * len(following)
        for low in range(0, len(scored), PROMPT_LOGPROB_ROWS):
            piece = scored[low : low + PROMPT_LOGPROB_ROWS]
            rows_R = self._to_device(np.array(piece, dtype=np.int64) + chunk.start)
            logits_RV = self.model.logits(h_TD.index_select(0, rows_R))
            wanted = self.sampler.prompt_logprobs(logits_RV, [following[at] for at in piece], count)
            for at, entry in zip(piece, wanted, strict=True):
                entries[at] = entry
        return (None, *entries) if chunk.first == 0 else tuple(entries)

    def _to_device(self, array: npt.NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(array).to(self.model.device)


class _Watched:
    """Attention that tells when keys and values are kept, part after part of the layers."""

    def __init__(self, inner: Attention, layer_count: int, kv_written: Callable[[LayerPart], None]) -> None:
        self._inner = inner
        self._kv_written = kv_written
        count = min(KV_PARTS, layer_count)
        parts = [LayerPart(index, count) for index in range(count)]
        self._ends = {part.layers(layer_count)[-1]: part for part in parts}

    def attend(self, layer: int, q_THd: Tensor, k_TKd: Tensor, v_TKd: Tensor) -> Tensor:
        out_THd = self._inner.attend(layer, q_THd, k_TKd, v_TKd)
        if layer in self._ends:
            self._kv_written(self._ends[layer])
        return out_THd
