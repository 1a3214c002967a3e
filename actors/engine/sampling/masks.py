"""Which ids may come next: constraints, allowed ids, bad words, ``min_tokens`` and biases of minus infinity.

N rows, V vocabulary that can be generated, D rows with a packed mask of W words, E pairs of a row and a banned id.

What may come is decided here, before anything reaches the device, so that no row is ever left without a token:
* Structure wins: where a constraint and the request's own masks have no id in common, the request's give way for this
  token and the constraint alone holds. A constraint that allows nothing at all ends the sequence: the checkpoint's end
  tokens alone may come.
* Without a constraint, bad words, ``min_tokens`` and infinite biases give way to ``allowed_token_ids`` where together
  they leave nothing. Bans of the whole vocabulary have no effect.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actors.engine.constraints.constraint import PackedMask
from actors.engine.sampling.penalties import to_device
from actors.engine.sampling.state import Ids, SamplingState

_BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")


class Masks:
    """Of one batch."""

    def __init__(self, states: Sequence[SamplingState], limit_W: PackedMask, end_W: PackedMask) -> None:
        self._rows = [(row, state) for row, state in enumerate(states) if state.may_mask]
        self._limit_W = limit_W
        self._end_W = end_W
        self._restriction: _Restriction | None = None

    def apply(self, logits_NV: Tensor) -> None:
        """Puts minus infinity where no token may come. Asks the constraints, on the host."""
        dense: list[_DenseRow] = []
        sparse: list[tuple[int, Ids]] = []
        for row, state in self._rows:
            banned = state.banned()
            filled_W = self._fill(state)
            if filled_W is not None:
                dense.append(_DenseRow(row, filled_W, state.allowed_W, banned, True))
            elif state.allowed_W is not None:
                dense.append(_DenseRow(row, state.allowed_W, None, banned, False))
            elif banned.size and not self._covers_all(banned, logits_NV.shape[1]):
                sparse.append((row, banned))
        if sparse:
            _ban(logits_NV, sparse)
        if dense:
            self._restrict(logits_NV, dense)

    def _fill(self, state: SamplingState) -> PackedMask | None:
        if state.constraint is None:
            return None
        mask_W = np.zeros_like(self._limit_W)
        return mask_W if state.constraint.fill(mask_W) else None

    def _covers_all(self, banned: Ids, vocabulary: int) -> bool:
        return banned.size >= vocabulary and np.unique(banned).size == vocabulary

    def _restrict(self, logits_NV: Tensor, dense: Sequence[_DenseRow]) -> None:
        # Without a constraint at work the mask is the last one's, but where a ban came or went.
        key = None if any(one.filled for one in dense) else tuple((one.row, one.banned.tobytes()) for one in dense)
        if key is None or self._restriction is None or self._restriction.key != key:
            words_DW = to_device(self._decide(dense), logits_NV.device)
            rows_D = to_device(np.array([one.row for one in dense], dtype=np.int64), logits_NV.device)
            self._restriction = _Restriction(key, rows_D, banned_ids(words_DW, logits_NV.shape[1]))
        _, rows_D, banned_DV = self._restriction
        if len(dense) == logits_NV.shape[0]:
            logits_NV.masked_fill_(banned_DV, -torch.inf)
        else:
            part_DV = logits_NV.index_select(0, rows_D).masked_fill_(banned_DV, -torch.inf)
            logits_NV.index_copy_(0, rows_D, part_DV)

    def _decide(self, rows: Sequence[_DenseRow]) -> NDArray[np.int32]:
        base_DW = np.stack([one.base_W for one in rows]) & self._limit_W
        base_DW[~base_DW.any(axis=1)] = self._end_W
        words_DW = base_DW.copy()
        for at, one in enumerate(rows):
            if one.also_W is not None:
                words_DW[at] &= one.also_W
        sizes = [one.banned.size for one in rows]
        if any(sizes):
            banned_E = np.concatenate([one.banned for one in rows])
            row_E = np.repeat(np.arange(len(rows)), sizes)
            cleared_E = ~(np.uint32(1) << (banned_E & 31).astype(np.uint32))
            np.bitwise_and.at(words_DW.view(np.uint32), (row_E, banned_E >> 5), cleared_E)
        empty_D = ~words_DW.any(axis=1)
        words_DW[empty_D] = base_DW[empty_D]
        return words_DW


class _DenseRow(NamedTuple):
    row: int
    base_W: PackedMask
    """The constraint's mask, or the allowed ids: holds whatever else must give way."""
    also_W: PackedMask | None
    """The allowed ids beside a constraint."""
    banned: Ids
    filled: bool
    """By a constraint."""


class _Restriction(NamedTuple):
    key: tuple[tuple[int, bytes], ...] | None
    """What the mask was made of; None where a constraint had a part in it."""
    rows_D: Tensor
    banned_DV: Tensor


def _ban(logits_NV: Tensor, bans: Sequence[tuple[int, Ids]]) -> None:
    rows_E = np.repeat([row for row, _ in bans], [ids.size for _, ids in bans])
    ids_E = np.concatenate([ids for _, ids in bans])
    rows_and_ids = to_device(np.stack((rows_E, ids_E)), logits_NV.device)
    logits_NV[rows_and_ids[0], rows_and_ids[1]] = -torch.inf


def banned_ids(words_DW: Tensor, size: int) -> Tensor:
    """bool [D, size]: where packed bits (the lowest first) are not set."""
    banned_256 = to_device((1 - _BITS).view(np.int64).reshape(256), words_DW.device)
    octets = words_DW.view(torch.uint8).flatten().int()
    return banned_256.index_select(0, octets).view(torch.bool).view(words_DW.shape[0], -1)[:, :size]
