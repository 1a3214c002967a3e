"""Log-probabilities of given tokens and of the most likely ones, from raw logits.

L rows, V vocabulary that can be generated, n most likely tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from actors.types import TokenLogprobs


@dataclass(frozen=True, kw_only=True, slots=True)
class RowLogprobs:
    """Computed on the device, fetched once."""

    logprob_L: Tensor
    rank_L: Tensor
    top_ids_Ln: Tensor
    top_logprobs_Ln: Tensor

    def fetch(self, tokens: Sequence[int], counts: Sequence[int]) -> list[TokenLogprobs]:
        """One entry per row, each with its own number of most likely tokens."""
        logprobs, ranks = self.logprob_L.tolist(), self.rank_L.tolist()
        top_ids, top_logprobs = self.top_ids_Ln.tolist(), self.top_logprobs_Ln.tolist()
        return [
            TokenLogprobs(
                token_id=token,
                logprob=logprobs[row],
                rank=ranks[row],
                top=tuple(zip(top_ids[row][:count], top_logprobs[row][:count], strict=True)),
            )
            for row, (token, count) in enumerate(zip(tokens, counts, strict=True))
        ]


def row_logprobs(logits_LV: Tensor, tokens_L: Tensor, count: int) -> RowLogprobs:
    """Of one token a row (int64, in 0 .. V - 1) and of the ``count`` most likely ones, descending, ties by id.

    The rank of a token is its place in that order, from 1.
    """
    count = min(count, logits_LV.shape[1])
    norm_L1 = logits_LV.logsumexp(dim=1, keepdim=True)
    own_L1 = logits_LV.gather(1, tokens_L[:, None])
    id_V = torch.arange(logits_LV.shape[1], device=logits_LV.device)
    before_LV = (logits_LV > own_L1) | ((logits_LV == own_L1) & (id_V < tokens_L[:, None]))
    top_ids_Ln = _most_likely(logits_LV, count)
    return RowLogprobs(
        logprob_L=(own_L1 - norm_L1).squeeze(1),
        rank_L=before_LV.sum(dim=1) + 1,
        top_ids_Ln=top_ids_Ln,
        top_logprobs_Ln=logits_LV.gather(1, top_ids_Ln) - norm_L1,
    )


def _most_likely(logits_LV: Tensor, count: int) -> Tensor:
    """Ids [L, count] of the largest logits, descending, ties by id, also those at the end (topk leaves them open)."""
    if count == 0:
        return torch.empty((logits_LV.shape[0], 0), dtype=torch.int64, device=logits_LV.device)
    top = logits_LV.topk(count, dim=1)
    last_L1 = top.values[:, -1:]
    # The lowest ids among those equal to the last value stand in for whichever topk has picked.
    vocabulary = logits_LV.shape[1]
    id_V = torch.arange(vocabulary, device=logits_LV.device)
    tied_Ln = torch.where(logits_LV == last_L1, id_V, vocabulary).topk(count, dim=1, largest=False).values
    above_Ln = torch.where(top.values > last_L1, top.indices, vocabulary)
    ids_Lm = torch.cat((above_Ln, tied_Ln), dim=1).sort(dim=1).values
    absent_Lm = ids_Lm == vocabulary
    ids_Lm.clamp_(max=vocabulary - 1)
    values_Lm = logits_LV.gather(1, ids_Lm).masked_fill_(absent_Lm, -torch.inf)
    return ids_Lm.gather(1, values_Lm.argsort(dim=1, descending=True, stable=True)[:, :count])
