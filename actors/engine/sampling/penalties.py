"""Logit biases, then repetition, frequency and presence penalties, only where a row has seen or named a token.

N rows, V vocabulary that can be generated, P penalised rows, E entries: pairs of a row and an id.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from actors.engine.sampling.state import SamplingState

GROWTH = 32
"""Tokens not seen before that each penalised row may add until the entries are laid out anew."""


class Biases:
    """Of one batch; constant."""

    def __init__(self, states: Sequence[SamplingState], device: torch.device, dtype: torch.dtype) -> None:
        sizes = [state.bias_ids.size for state in states]
        rows = np.repeat(np.arange(len(states)), sizes)
        self._rows_E = to_device(rows, device)
        self._ids_E = to_device(np.concatenate([state.bias_ids for state in states]), device)
        self._values_E = to_device(np.concatenate([state.bias_values for state in states]), device).to(dtype)

    def apply(self, logits_NV: Tensor) -> None:
        at = (self._rows_E, self._ids_E)
        logits_NV[at] = logits_NV[at] + self._values_E


class Penalties:
    """Of one batch; follows its rows token by token."""

    def __init__(self, states: Sequence[SamplingState], device: torch.device, dtype: torch.dtype) -> None:
        self._states = states
        self._device = device
        self._dtype = dtype
        params = [state.params for state in states]
        self._repetition_N = torch.tensor([p.repetition_penalty for p in params], dtype=dtype, device=device)
        self._frequency_N = torch.tensor([p.frequency_penalty for p in params], dtype=dtype, device=device)
        self._presence_N = torch.tensor([p.presence_penalty for p in params], dtype=dtype, device=device)
        self._lay_out()

    def _lay_out(self) -> None:
        seen = [state.seen for state in self._states]
        sizes = [0 if one is None else one.size for one in seen]
        self._start = np.cumsum([0, *sizes])[:-1].tolist()
        self._sizes = sizes
        self._added: list[list[int]] = [[] for _ in seen]
        self._used = sum(sizes)
        self._capacity = self._used + GROWTH * sum(one is not None for one in seen)
        # rows, ids, counts
        entries_3E = np.zeros((3, self._capacity), dtype=np.int64)
        entries_3E[0, : self._used] = np.repeat(np.arange(len(seen)), sizes)
        for start, one in zip(self._start, seen, strict=True):
            if one is not None:
                entries_3E[1, start : start + one.size] = one.ids
                entries_3E[2, start : start + one.size] = one.counts
        self._entries_3E = to_device(entries_3E, self._device)

    def apply(self, logits_NV: Tensor) -> None:
        rows_E, ids_E, counts_E = self._entries_3E[:, : self._used].unbind()
        repetition_E = self._repetition_N[rows_E]
        values_E = logits_NV[rows_E, ids_E]
        values_E = torch.where(values_E > 0, values_E / repetition_E, values_E * repetition_E)
        values_E -= self._frequency_N[rows_E] * counts_E
        values_E -= self._presence_N[rows_E] * (counts_E > 0)
        # An extreme penalty must not make a row infinite or empty.
        largest = torch.finfo(self._dtype).max / 8
        logits_NV[rows_E, ids_E] = values_E.clamp_(-largest, largest)

    def advance(self, tokens: Sequence[int], places: Sequence[int | None]) -> None:
        """Takes one drawn token per row and its place among the row's seen ones (None: not penalised)."""
        changes: list[tuple[int, int, int, int]] = []
        for row, place in enumerate(places):
            seen = self._states[row].seen
            if place is None or seen is None:
                continue
            added = self._added[row]
            new = place - self._sizes[row]
            if new >= len(added):
                if self._used == self._capacity:
                    self._lay_out()
                    return
                added.append(self._used)
                self._used += 1
            at = self._start[row] + place if new < 0 else added[new]
            changes.append((at, row, tokens[row], int(seen.counts[place])))
        if changes:
            at_and_entries = to_device(np.array(changes, dtype=np.int64).T.copy(), self._device)
            self._entries_3E[:, at_and_entries[0]] = at_and_entries[1:]


def to_device(array: NDArray[np.generic], device: torch.device) -> Tensor:
    """A tensor of the array; the copy to a GPU does not wait for the work queued there."""
    tensor = torch.from_numpy(array)
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
