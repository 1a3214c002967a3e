"""Parameters of the rows of a step as tensors, kept while the same sequences are sampled in the same order.

N rows, V vocabulary that can be generated, S sampled (not greedy) rows, W whole ones among them, C cut ones (a real
top-k or top-p), P rows whose logits are changed, L rows with log-probabilities.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from actors.engine.constraints.constraint import PackedMask
from actors.engine.sampling.drawing import HEAD, Cuts, draw_cut, draw_whole, stream_keys, uniforms
from actors.engine.sampling.masks import Masks
from actors.engine.sampling.penalties import Biases, Penalties, to_device
from actors.engine.sampling.state import SamplingState

GREEDY_BELOW = 1e-5
"""A temperature below this is greedy."""


class Rows:
    """Some rows of a batch, with no copy where they are all of them."""

    def __init__(self, rows: Sequence[int], total: int, device: torch.device) -> None:
        self.numbers = rows
        self._all = len(rows) == total
        self._index = to_device(np.array(rows, dtype=np.int64), device)

    def __bool__(self) -> bool:
        return bool(self.numbers)

    def of(self, x: Tensor) -> Tensor:
        """Their part of ``x``, a copy unless they are all rows."""
        return x if self._all else x.index_select(0, self._index)

    def put(self, x: Tensor, part: Tensor) -> Tensor:
        """``x`` with their part replaced."""
        return part if self._all else x.index_copy(0, self._index, part)


class SamplingBatch:
    """See the module."""

    def __init__(
        self,
        ids: tuple[int, ...],
        states: Sequence[SamplingState],
        logits_NV: Tensor,
        limit_W: PackedMask,
        end_W: PackedMask,
    ) -> None:
        count, vocabulary = logits_NV.shape
        if count != len(ids):
            raise ValueError(f"{count} rows of logits for {len(ids)} sequences")
        device, dtype = logits_NV.device, logits_NV.dtype
        self.ids = ids
        self.kind = (device, dtype)
        self._states = states
        self._device = device
        params = [state.params for state in states]
        self._keys = stream_keys([s.seed for s in states], [s.choice for s in states])
        self._indices = np.array([len(state.outputs) for state in states], dtype=np.uint64)
        self._u: np.ndarray[tuple[int], np.dtype[np.float64]] = np.empty(0)

        top_k = [min(p.top_k or vocabulary, vocabulary) for p in params]
        drawn = [row for row, p in enumerate(params) if p.temperature >= GREEDY_BELOW]
        cut = [row for row in drawn if top_k[row] < vocabulary or params[row].top_p < 1]
        is_cut = set(cut)
        self._whole = Rows([row for row in drawn if row not in is_cut], count, device)
        self._cut = Rows(cut, count, device)
        largest = torch.finfo(dtype).max
        temperature = [min(p.temperature, largest) for p in params]
        if self._whole:
            numbers = self._whole.numbers
            self._whole_temperature_W = torch.tensor([temperature[r] for r in numbers], dtype=dtype, device=device)
            min_p = [params[row].min_p for row in numbers]
            self._whole_min_p_W = torch.tensor(min_p, dtype=dtype, device=device) if any(min_p) else None
        if cut:
            unbounded = [row for row in cut if top_k[row] == vocabulary]
            # Twice as many as are wanted leaves room for equal logits at the end.
            longest = HEAD if unbounded else 2 * max(top_k[row] for row in cut)
            self._cuts = Cuts(
                temperature_S=torch.tensor([temperature[row] for row in cut], dtype=dtype, device=device),
                min_p_S=torch.tensor([params[row].min_p for row in cut], dtype=dtype, device=device),
                top_k_S=torch.tensor([top_k[row] for row in cut], device=device),
                top_p_S=torch.tensor([params[row].top_p for row in cut], dtype=torch.float64, device=device),
                head=min(HEAD, longest),
                needs_total=bool(unbounded),
            )

        self.logprob_rows = [row for row, p in enumerate(params) if p.logprobs is not None]
        self.logprob_counts = [p.logprobs for p in params if p.logprobs is not None]
        self._logprob = Rows(self.logprob_rows, count, device)

        processed = [row for row, state in enumerate(states) if state.is_processed]
        self.is_processed = bool(processed)
        self._processed = Rows(processed, count, device)
        self._biases = Biases(states, device, dtype) if any(s.bias_ids.size for s in states) else None
        self._penalties = Penalties(states, device, dtype) if any(s.seen is not None for s in states) else None
        self._masks = Masks(states, limit_W, end_W) if any(s.may_mask for s in states) else None

    def raw(self, logits_NV: Tensor) -> Tensor | None:
        """Logits of the rows with log-probabilities, before they are changed; None if there are none."""
        if not self._logprob:
            return None
        raw_LV = self._logprob.of(logits_NV)
        return raw_LV.clone() if raw_LV is logits_NV and self.is_processed else raw_LV

    def of_logprob_rows(self, x_N: Tensor) -> Tensor:
        """Entries of the rows with log-probabilities."""
        return self._logprob.of(x_N)

    def process(self, logits_NV: Tensor, best_N: Tensor, best_ids_N: Tensor) -> tuple[Tensor, Tensor]:
        """Changes the logits as asked; the largest of each row and their ids, of which some are now others."""
        if self._biases is not None:
            self._biases.apply(logits_NV)
        if self._penalties is not None:
            self._penalties.apply(logits_NV)
        if self._masks is not None:
            self._masks.apply(logits_NV)
        best_P, best_ids_P = self._processed.of(logits_NV).max(dim=1)
        return self._processed.put(best_N, best_P), self._processed.put(best_ids_N, best_ids_P)

    def draw(self, logits_NV: Tensor, best_N: Tensor, best_ids_N: Tensor) -> Tensor:
        """One token per row, or UNSETTLED; greedy rows take the best."""
        if not (self._whole or self._cut):
            return best_ids_N
        self._u = uniforms(self._keys, self._indices)
        u_N = to_device(self._u, self._device)
        tokens_N = best_ids_N
        if self._whole:
            logits_WV, best_W = self._whole.of(logits_NV), self._whole.of(best_N)
            drawn = draw_whole(logits_WV, best_W, self._whole_temperature_W, self._whole_min_p_W, self._whole.of(u_N))
            tokens_N = self._whole.put(tokens_N, drawn)
        if self._cut:
            logits_CV, best_C = self._cut.of(logits_NV), self._cut.of(best_N)
            tokens_N = self._cut.put(tokens_N, draw_cut(logits_CV, best_C, self._cuts, self._cut.of(u_N)))
        return tokens_N

    def cuts_of(self, rows: Sequence[int]) -> tuple[Cuts, Tensor]:
        """Cuts and uniform numbers of some of the cut rows, as in the draw just made."""
        place = {row: at for at, row in enumerate(self._cut.numbers)}
        at_C = to_device(np.array([place[row] for row in rows], dtype=np.int64), self._device)
        return self._cuts.rows(at_C), to_device(self._u[list(rows)], self._device)

    def advance(self, tokens: Sequence[int]) -> None:
        """Takes the drawn tokens."""
        places = [state.advance(token) for state, token in zip(self._states, tokens, strict=True)]
        self._indices += np.uint64(1)
        if self._penalties is not None:
            self._penalties.advance(tokens, places)
