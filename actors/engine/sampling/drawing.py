"""From processed logits to one token per row: temperature, min-p, top-k, top-p, and one uniform number.

S sampled rows, V vocabulary that can be generated, H head (the most likely tokens of a row, sorted), B blocks.

A token is the inverse of the cumulative distribution at a uniform number that is a pure function of (seed, choice,
output index). Rows cut by top-k or top-p are walked from the most likely token down, ties by id; all others are walked
by id, which needs no sort. A cut row is settled from its head alone wherever that is sure to give the same token as a
sort of the whole vocabulary would; the caller draws the others again with ``draw_sorted``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

HEAD = 1024
"""Most tokens of a row that are sorted at first."""
BLOCK = 512
"""Tokens whose weights are summed as one before the block that holds the drawn token is looked into."""
UNSETTLED = -2
"""In place of a token: the head was too short to tell."""
GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def stream_keys(seeds: npt.ArrayLike, choices: npt.ArrayLike) -> npt.NDArray[np.uint64]:
    """What ``uniforms`` needs of (seed, choice), both unsigned 64 bits: ``mix(mix(seed + G) ^ choice) + G``."""
    with np.errstate(over="ignore"):
        return _mix(_mix(np.asarray(seeds, dtype=np.uint64) + GOLDEN) ^ np.asarray(choices, dtype=np.uint64)) + GOLDEN


def uniforms(keys: npt.NDArray[np.uint64], indices: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """One number in [0, 1) with 53 random bits per ``stream_keys`` entry and output index.

    ``mix(key ^ index) >> 11`` over 2 ** 53. G is 2 ** 64 over the golden ratio, mix the finaliser of splitmix64
    (Steele, Lea, Flood 2014: fast splittable pseudorandom number generators).
    """
    with np.errstate(over="ignore"):
        state = _mix(keys ^ np.asarray(indices, dtype=np.uint64))
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def draw_whole(logits_SV: Tensor, best_S: Tensor, temperature_S: Tensor, min_p_S: Tensor | None, u_S: Tensor) -> Tensor:
    """Tokens [S] of rows that no top-k or top-p cuts. ``best`` is the largest logit of each row."""
    rows, vocabulary = logits_SV.shape
    blocks = -(-vocabulary // BLOCK)
    weights_SP = logits_SV.new_empty(rows, blocks * BLOCK)
    weights_SP[:, vocabulary:] = 0
    weights_SV = weights_SP[:, :vocabulary]
    # The maximum becomes 0 before the division, so that no temperature can overflow.
    torch.sub(logits_SV, best_S[:, None], out=weights_SV)
    weights_SV.div_(temperature_S[:, None]).exp_()
    if min_p_S is not None:
        weights_SV.mul_(weights_SV >= min_p_S[:, None])
    weights_SBb = weights_SP.view(rows, blocks, BLOCK)
    cumulative_SB = weights_SBb.sum(dim=2).double().cumsum(dim=1)
    target_S = _below(u_S * cumulative_SB[:, -1], cumulative_SB[:, -1])
    # Only a broken row, which the caller finds, points beyond the last.
    block_S1 = torch.searchsorted(cumulative_SB, target_S[:, None], right=True).clamp_(max=blocks - 1)
    before_SB = torch.nn.functional.pad(cumulative_SB, (1, 0))
    rest_S = target_S - before_SB.gather(1, block_S1).squeeze(1)
    inner_Sb = weights_SBb.gather(1, block_S1[:, :, None].expand(rows, 1, BLOCK)).squeeze(1).double().cumsum(dim=1)
    at_S1 = torch.searchsorted(inner_Sb, _below(rest_S, inner_Sb[:, -1])[:, None], right=True)
    return (block_S1 * BLOCK + at_S1).squeeze(1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Cuts:
    """How rows are cut. ``top_k_S`` is V where it keeps all; temperature and min-p have the dtype of the logits."""

    temperature_S: Tensor
    min_p_S: Tensor
    top_k_S: Tensor
    top_p_S: Tensor
    """float64."""
    head: int
    """Tokens to sort at first."""
    needs_total: bool
    """Some row has a top-p and no top-k: its mass is a share of the whole vocabulary's."""

    def rows(self, rows: Tensor) -> Cuts:
        """Those of some rows, given by number."""
        return Cuts(
            temperature_S=self.temperature_S[rows],
            min_p_S=self.min_p_S[rows],
            top_k_S=self.top_k_S[rows],
            top_p_S=self.top_p_S[rows],
            head=self.head,
            needs_total=self.needs_total,
        )


def draw_cut(logits_SV: Tensor, best_S: Tensor, cuts: Cuts, u_S: Tensor) -> Tensor:
    """Tokens [S] of rows that top-k or top-p cuts, UNSETTLED where the head does not tell."""
    vocabulary = logits_SV.shape[1]
    head = min(cuts.head, vocabulary)
    ids_SH = logits_SV.topk(head, dim=1, sorted=False).indices.sort(dim=1).values
    values_SH, order_SH = logits_SV.gather(1, ids_SH).sort(dim=1, descending=True, stable=True)
    # Among equal logits at the end of the head any may have been left out, so the last value is not trusted.
    trusted_SH = torch.ones_like(ids_SH, dtype=torch.bool) if head == vocabulary else values_SH > values_SH[:, -1:]
    total_S = _total(logits_SV, best_S, cuts) if cuts.needs_total else None
    at_S1, settled_S = _walk(values_SH, trusted_SH, best_S, total_S, cuts, u_S, vocabulary)
    return torch.where(settled_S, ids_SH.gather(1, order_SH.gather(1, at_S1)).squeeze(1), UNSETTLED)


def draw_sorted(logits_SV: Tensor, best_S: Tensor, cuts: Cuts, u_S: Tensor) -> Tensor:
    """The plain form of ``draw_cut``: sorts everything and settles every row."""
    if logits_SV.device.type == "cpu":
        # Many times faster than torch's, which sorts ids along.
        values_SV = torch.from_numpy(np.sort(logits_SV.numpy(), axis=1)).flip(1)
    else:
        values_SV = logits_SV.sort(dim=1, descending=True).values
    trusted_SV = torch.ones_like(values_SV, dtype=torch.bool)
    at_S1, _ = _walk(values_SV, trusted_SV, best_S, None, cuts, u_S, logits_SV.shape[1])
    value_S1 = values_SV.gather(1, at_S1)
    # The id: as many equal logits come before it by id as before it in the sorted row.
    nth_S1 = at_S1 - (values_SV > value_S1).sum(dim=1, keepdim=True)
    equal_SV = logits_SV == value_S1
    return (equal_SV & (equal_SV.cumsum(dim=1) > nth_S1)).max(dim=1).indices


def _total(logits_SV: Tensor, best_S: Tensor, cuts: Cuts) -> Tensor:
    """Weight of all tokens that min-p keeps."""
    weights_SV = ((logits_SV - best_S[:, None]) / cuts.temperature_S[:, None]).exp_()
    return weights_SV.mul_(weights_SV >= cuts.min_p_S[:, None]).sum(dim=1, dtype=torch.float64)


def _walk(
    values_SH: Tensor,
    trusted_SH: Tensor,
    best_S: Tensor,
    total_S: Tensor | None,
    cuts: Cuts,
    u_S: Tensor,
    vocabulary: int,
) -> tuple[Tensor, Tensor]:
    """Keeps sorted tokens until their weight reaches top-p of all that top-k and min-p keep, then picks at ``u``: the
    place [S, 1] picked, and whether it is settled [S].

    A row is settled when what top-k and min-p keep ends within its trusted values, or top-p's mass does.
    """
    weights_SH = ((values_SH - best_S[:, None]) / cuts.temperature_S[:, None]).exp_()
    rank_H = torch.arange(values_SH.shape[1], device=values_SH.device)
    kept_SH = (rank_H < cuts.top_k_S[:, None]) & (weights_SH >= cuts.min_p_S[:, None]) & (weights_SH > 0)
    ended_S = ~(kept_SH & ~trusted_SH).any(dim=1)
    kept_weights_SH = weights_SH.double() * kept_SH
    through_SH = kept_weights_SH.cumsum(dim=1)
    mass_S = through_SH[:, -1]
    if total_S is not None:
        mass_S = torch.where(ended_S, mass_S, total_S)
    mass_S = cuts.top_p_S * mass_S
    reached_S = (through_SH * trusted_SH).amax(dim=1) >= mass_S
    before_SH = through_SH - kept_weights_SH
    final_SH = (kept_weights_SH * (before_SH < mass_S[:, None])).cumsum(dim=1)
    at_S1 = torch.searchsorted(final_SH, _below(u_S * final_SH[:, -1], final_SH[:, -1])[:, None], right=True)
    at_S1.clamp_(max=values_SH.shape[1] - 1)
    settled_S = ended_S | (reached_S & (cuts.top_k_S >= vocabulary))
    return at_S1, settled_S


def _below(target_S: Tensor, total_S: Tensor) -> Tensor:
    """``target``, made smaller than ``total``: rounding may lift it up to there, beyond which nothing lies."""
    return torch.minimum(target_S, torch.nextafter(total_S, torch.zeros_like(total_S)))
