"""Draws one token per row of logits, all rows in one pass.

N rows, V vocabulary, H head (the most likely tokens of a row, sorted), S sampled (not greedy) rows.

Media ids are masked out. Then, per row: temperature, top-k, top-p, and the inverse of the cumulative distribution at
one uniform number. That number is a pure function of (seed, choice, output index), so a row's token depends on nothing
else in the batch and can be drawn again anywhere. Rows cut by top-k or top-p are walked from the most likely token
down, ties by id; rows that keep the whole vocabulary are walked by id, which needs no sort.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from actors.types import SamplingParams

HEAD = 1024
"""Rows whose kept tokens are among this many most likely ones need no sort of the whole vocabulary."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Draw:
    """One row to sample: how, and the key of its randomness."""

    params: SamplingParams
    seed: int
    choice: int
    index: int
    """Of the token among the outputs of all attempts."""


def uniforms(seeds: npt.ArrayLike, choices: npt.ArrayLike, indices: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """One number in [0, 1) with 53 random bits per key (seed, choice, index), all unsigned 64 bits.

    ``mix((mix(mix(seed + G) ^ choice) + G) ^ index) >> 11`` over 2 ** 53, where G is 2 ** 64 over the golden ratio
    and mix the finaliser of splitmix64 (Steele, Lea, Flood 2014: fast splittable pseudorandom number generators).
    """
    golden = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        state = _mix(np.asarray(seeds, dtype=np.uint64) + golden)
        state = _mix(state ^ np.asarray(choices, dtype=np.uint64))
        state = _mix((state + golden) ^ np.asarray(indices, dtype=np.uint64))
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Sampler:
    """Stateless but for the vocabulary's bound."""

    def __init__(self, im_patch_id: int) -> None:
        self.im_patch_id = im_patch_id

    @torch.inference_mode()
    def sample(self, logits_NV: Tensor, draws: Sequence[Draw]) -> list[int]:
        """One id per row, always below ``im_patch_id``. float32 or float64 logits; they are not changed.

        Raises FloatingPointError if a row is no distribution (NaN, nothing finite): a defect of weights or kernels.
        """
        logits_NV = logits_NV[:, : self.im_patch_id]
        best_N = logits_NV.max(dim=1)
        if not bool(torch.isfinite(best_N.values).all()):
            raise FloatingPointError("logits hold NaN or infinity")
        rows = [row for row, draw in enumerate(draws) if draw.params.temperature > 0]
        ids_N = best_N.indices
        if rows:
            chosen = [draws[row] for row in rows]
            rows_S = torch.tensor(rows, device=logits_NV.device)
            ids_N = ids_N.index_copy(0, rows_S, self._draw(logits_NV[rows_S], chosen))
        return [int(token) for token in ids_N.tolist()]

    def _draw(self, logits_SV: Tensor, draws: Sequence[Draw]) -> Tensor:
        device, dtype, vocabulary = logits_SV.device, logits_SV.dtype, logits_SV.shape[1]
        u = uniforms([d.seed for d in draws], [d.choice for d in draws], [d.index for d in draws])
        u_S = torch.from_numpy(u).to(device)
        top_k = [min(d.params.top_k or vocabulary, vocabulary) for d in draws]
        temperature_S = torch.tensor([d.params.temperature for d in draws], dtype=dtype, device=device)
        top_p_S = torch.tensor([d.params.top_p for d in draws], dtype=torch.float64, device=device)
        # The maximum becomes 0 before the division, so that no temperature can overflow.
        scaled_SV = (logits_SV - logits_SV.amax(dim=1, keepdim=True)) / temperature_S[:, None]

        whole = [k == vocabulary and d.params.top_p >= 1.0 for k, d in zip(top_k, draws, strict=True)]
        ids_S = torch.empty(len(draws), dtype=torch.int64, device=device)
        for rows, pick in (
            ([row for row, keep in enumerate(whole) if keep], self._draw_whole),
            ([row for row, keep in enumerate(whole) if not keep], self._draw_cut),
        ):
            if rows:
                at_S = torch.tensor(rows, device=device)
                k_S = torch.tensor([top_k[row] for row in rows], device=device)
                ids_S[at_S] = pick(scaled_SV[at_S], k_S, top_p_S[at_S], u_S[at_S])
        return ids_S

    def _draw_whole(self, scaled_SV: Tensor, k_S: Tensor, top_p_S: Tensor, u_S: Tensor) -> Tensor:
        return _invert(scaled_SV.softmax(dim=1).cumsum(dim=1, dtype=torch.float64), u_S)

    def _draw_cut(self, scaled_SV: Tensor, k_S: Tensor, top_p_S: Tensor, u_S: Tensor) -> Tensor:
        """Rows with a real top-k or top-p."""
        vocabulary = scaled_SV.shape[1]
        head = min(HEAD, vocabulary)
        values_SH, ids_SH = _sorted_head(scaled_SV, head)
        # Probabilities after top-k: over the kept tokens where k cuts, else over the whole vocabulary.
        total_S = torch.where(
            k_S < vocabulary,
            _kept_weights(values_SH, k_S).sum(dim=1),
            scaled_SV.exp().sum(dim=1, dtype=torch.float64),
        )
        reached_S = values_SH.exp().sum(dim=1, dtype=torch.float64) >= top_p_S * total_S
        inside_S = (k_S <= head) | ((k_S == vocabulary) & reached_S)
        ids_S = _walk(values_SH, ids_SH, k_S, top_p_S * total_S, u_S)
        outside = (~inside_S).nonzero().flatten()
        if outside.numel():
            values, ids = scaled_SV[outside].sort(dim=1, descending=True, stable=True)
            k = k_S[outside]
            mass = top_p_S[outside] * _kept_weights(values, k).sum(dim=1)
            ids_S[outside] = _walk(values, ids, k, mass, u_S[outside])
        return ids_S


def _sorted_head(scaled_SV: Tensor, head: int) -> tuple[Tensor, Tensor]:
    """Values and ids of the ``head`` largest entries of each row, descending, ties by id."""
    ids_SH = scaled_SV.topk(head, dim=1, sorted=False).indices.sort(dim=1).values
    values_SH, order_SH = scaled_SV.gather(1, ids_SH).sort(dim=1, descending=True, stable=True)
    return values_SH, ids_SH.gather(1, order_SH)


def _kept_weights(values_SH: Tensor, k_S: Tensor) -> Tensor:
    """float64 exp of the first k sorted values of each row, 0 beyond."""
    rank_H = torch.arange(values_SH.shape[1], device=values_SH.device)
    return values_SH.exp().double() * (rank_H[None] < k_S[:, None])


def _walk(values_SH: Tensor, ids_SH: Tensor, k_S: Tensor, mass_S: Tensor, u_S: Tensor) -> Tensor:
    """Keeps sorted tokens until their weight reaches ``mass`` (at least one), then picks at ``u`` among them."""
    weights_SH = _kept_weights(values_SH, k_S)
    before_SH = weights_SH.cumsum(dim=1) - weights_SH
    weights_SH = weights_SH * (before_SH < mass_S[:, None])
    return ids_SH.gather(1, _invert(weights_SH.cumsum(dim=1), u_S)[:, None]).squeeze(1)


def _invert(cumulative_SV: Tensor, u_S: Tensor) -> Tensor:
    """First position where the cumulative weight exceeds u times the total; always one with weight of its own."""
    total_S = cumulative_SV[:, -1]
    # The product may round up to the total itself, beyond which nothing lies.
    target_S = torch.minimum(u_S * total_S, torch.nextafter(total_S, torch.zeros_like(total_S)))
    return torch.searchsorted(cumulative_SV, target_S[:, None], right=True).squeeze(1)
