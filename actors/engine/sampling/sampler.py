"""Draws one token per row of logits, all rows in one pass, and keeps what sampling must remember of each sequence.

N rows, V vocabulary that can be generated (ids below ``im_patch_id``: media ids are never drawn), S sampled (not
greedy) rows, P rows whose logits are changed, L rows with log-probabilities.

Order of operations, vLLM's:
1. Log-probabilities and ranks are taken from the model's own logits.
2. Masks: constraint, ``allowed_token_ids``, bad words, ``min_tokens``; then ``logit_bias``; then repetition, frequency
   and presence penalties. (A masked logit stays minus infinity under all that follows, so masks are put on last.)
   ``masks`` says what gives way where masks leave nothing: no request can make a step fail.
3. Greedy rows (temperature below 1e-5) take the largest logit, ties by id.
4. Others: temperature, then min-p, then top-k, then top-p, then the draw (``drawing``).

Bad words match within the output only; repetition counts prompt and output, presence and frequency the output.

Randomness is a pure function of (seed, choice, output index), and everything remembered can be rebuilt from the tokens
(``admit``). So a row's token depends on its own logits and tokens only: in float64 the same seed gives the same tokens
whatever else is in the batch and after a restart at any position. In float32 and bfloat16 the same holds of this module
given the same logits, but logits are not the same: a matrix product rounds differently in a batch of another size or a
prompt cut into other chunks (1e-6 in float32; in bfloat16 1e-2, enough to swap two near-equal tokens, or an expert). A
resumed or rebatched bfloat16 reply may then go on differently, sampled or greedy, and so may a row whose uniform number
falls on the border of two tokens; ranks and log-probabilities vary by as much.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from actors.engine.constraints.constraint import TokenConstraint, mask_words
from actors.engine.plan import NewSequence
from actors.engine.sampling.batch import SamplingBatch
from actors.engine.sampling.drawing import UNSETTLED, draw_sorted
from actors.engine.sampling.logprobs import RowLogprobs, row_logprobs
from actors.engine.sampling.state import SamplingState, packed
from actors.types import TokenLogprobs

BROKEN = -1
"""In place of a token: the row's logits were not finite."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Samples:
    """Of one step, row by row."""

    tokens: list[int]
    logprobs: list[TokenLogprobs | None]
    """None where not asked for."""


class Sampler:
    """State of every admitted sequence, by its number. Not thread-safe."""

    def __init__(self, im_patch_id: int, *, vocab_size: int, eos_token_ids: Collection[int]) -> None:
        self.im_patch_id = im_patch_id
        self._words = mask_words(vocab_size)
        self._eos_ids = frozenset(eos_token_ids)
        self._limit_W = packed(range(im_patch_id), im_patch_id, self._words)
        self._end_W = packed(self._eos_ids, im_patch_id, self._words)
        self._states: dict[int, SamplingState] = {}
        self._early: dict[int, TokenConstraint] = {}
        self._batch: SamplingBatch | None = None

    @property
    def sequence_ids(self) -> frozenset[int]:
        """Sequences of which anything is kept: all that were admitted or constrained and not forgotten since."""
        return frozenset(self._states.keys() | self._early.keys())

    def admit(self, new: NewSequence) -> None:
        """Takes a sequence from its introduction; outputs it already has count as if drawn here.

        Raises ValueError if it is here already.
        """
        if new.id in self._states:
            raise ValueError(f"sequence {new.id} was admitted before")
        state = SamplingState.of(new, self.im_patch_id, self._words, self._eos_ids)
        constraint = self._early.pop(new.id, None)
        if constraint is not None:
            state.constrain(constraint)
        self._states[new.id] = state

    def constrain(self, id: int, constraint: TokenConstraint) -> None:
        """Bounds the tokens of a sequence from now on; ``constraint`` is at its start and is told earlier outputs here.

        May come before ``admit``. Replaces an earlier one.
        """
        state = self._states.get(id)
        if state is None:
            self._early[id] = constraint
            return
        state.constrain(constraint)
        self._drop_batch(id)

    def forget(self, id: int) -> None:
        """Frees all that is kept of a sequence. Unknown ones are ignored."""
        self._states.pop(id, None)
        self._early.pop(id, None)
        self._drop_batch(id)

    def _drop_batch(self, id: int) -> None:
        if self._batch is not None and id in self._batch.ids:
            self._batch = None

    @torch.inference_mode()
    def sample(self, logits_NV: Tensor, ids: Sequence[int]) -> Samples:
        """Draws the next token of each sequence and takes it as said.

        ``logits_NV``: float32 or float64, one row per sequence, at least ``im_patch_id`` wide; scratch, changed in
        place. Raises FloatingPointError if a row is no distribution (NaN, nothing finite): a defect of weights or
        kernels, never of a request.
        """
        logits_NV = logits_NV[:, : self.im_patch_id]
        batch = self._batch_of(ids, logits_NV)
        raw_LV = batch.raw(logits_NV)
        best_N, best_ids_N = logits_NV.max(dim=1)
        finite_N = torch.isfinite(best_N)
        if batch.is_processed:
            best_N, best_ids_N = batch.process(logits_NV, best_N, best_ids_N)
            finite_N &= torch.isfinite(best_N)
        tokens_N = batch.draw(logits_NV, best_N, best_ids_N)
        tokens_N = torch.where(finite_N, tokens_N, BROKEN)
        logprobs = None if raw_LV is None else self._logprobs(batch, raw_LV, tokens_N)
        tokens = tokens_N.tolist()
        if BROKEN in tokens:
            raise FloatingPointError("logits hold NaN or infinity")
        if UNSETTLED in tokens:
            self._settle(batch, logits_NV, best_N, tokens)
            if raw_LV is not None:
                logprobs = self._logprobs(batch, raw_LV, torch.tensor(tokens, device=logits_NV.device))
        batch.advance(tokens)
        entries: list[TokenLogprobs | None] = [None] * len(tokens)
        if logprobs is not None:
            fetched = logprobs.fetch([tokens[row] for row in batch.logprob_rows], batch.logprob_counts)
            for row, entry in zip(batch.logprob_rows, fetched, strict=True):
                entries[row] = entry
        return Samples(tokens=tokens, logprobs=entries)

    @torch.inference_mode()
    def prompt_logprobs(self, logits_RV: Tensor, token_ids: Sequence[int], count: int) -> list[TokenLogprobs]:
        """Of given tokens, one per row of raw logits, each with the ``count`` most likely ones.

        Raises ValueError for a token that cannot be generated (at or above ``im_patch_id``).
        """
        if not token_ids:
            return []
        if not (0 <= min(token_ids) and max(token_ids) < self.im_patch_id):
            raise ValueError("only tokens that can be generated have a log-probability")
        tokens_R = torch.tensor(token_ids, device=logits_RV.device)
        found = row_logprobs(logits_RV[:, : self.im_patch_id], tokens_R, count)
        return found.fetch(token_ids, [count] * len(token_ids))

    def _batch_of(self, ids: Sequence[int], logits_NV: Tensor) -> SamplingBatch:
        key = tuple(ids)
        if self._batch is None or self._batch.ids != key or self._batch.kind != (logits_NV.device, logits_NV.dtype):
            states = [self._states[id] for id in key]
            self._batch = SamplingBatch(key, states, logits_NV, self._limit_W, self._end_W)
        return self._batch

    def _logprobs(self, batch: SamplingBatch, raw_LV: Tensor, tokens_N: Tensor) -> RowLogprobs:
        return row_logprobs(raw_LV, batch.of_logprob_rows(tokens_N).clamp(min=0), max(batch.logprob_counts))

    def _settle(self, batch: SamplingBatch, logits_NV: Tensor, best_N: Tensor, tokens: list[int]) -> None:
        """Draws those rows again whose head was too short."""
        rows = [row for row, token in enumerate(tokens) if token == UNSETTLED]
        rows_S = torch.tensor(rows, device=logits_NV.device)
        cuts, u_S = batch.cuts_of(rows)
        drawn = draw_sorted(logits_NV.index_select(0, rows_S), best_N[rows_S], cuts, u_S).tolist()
        for row, token in zip(rows, drawn, strict=True):
            tokens[row] = token
