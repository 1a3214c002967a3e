"""What sampling remembers of one sequence. Plain numpy and lists; rebuilt from the tokens alone."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from actors.engine.constraints.constraint import PackedMask, TokenConstraint
from actors.engine.plan import NewSequence
from actors.types import SamplingParams

Ids = NDArray[np.int64]

NO_IDS: Ids = np.empty(0, dtype=np.int64)


class SeenTokens:
    """Ids that penalties touch, in order of first sight, and how often each is in the output."""

    def __init__(self, prompt_ids: Ids, output_ids: Ids) -> None:
        outputs, times = np.unique(output_ids, return_counts=True)
        only_prompt = np.setdiff1d(prompt_ids, outputs)
        self._ids = np.concatenate((outputs, only_prompt))
        self._counts = np.concatenate((times, np.zeros(only_prompt.size, dtype=np.int64)))
        self.size = int(self._ids.size)
        self._place = dict(zip(self._ids.tolist(), range(self.size), strict=True))

    @property
    def ids(self) -> Ids:
        return self._ids[: self.size]

    @property
    def counts(self) -> Ids:
        return self._counts[: self.size]

    def add(self, token: int) -> int:
        """Counts one more output. Its place, which is ``size - 1`` after growth for one not seen before."""
        place: int = self._place.setdefault(token, self.size)
        if place == self.size:
            if self.size == self._ids.size:
                more = np.zeros(max(64, self.size), dtype=np.int64)
                self._ids = np.concatenate((self._ids, more))
                self._counts = np.concatenate((self._counts, more))
            self._ids[place] = token
            self.size += 1
        self._counts[place] += 1
        return place


class BadWords:
    """Bad words of two tokens or more, found by the token before their last."""

    def __init__(self, words: Collection[tuple[int, ...]]) -> None:
        self._by_last_but_one: dict[int, list[tuple[list[int], int]]] = {}
        for word in words:
            self._by_last_but_one.setdefault(word[-2], []).append((list(word[:-1]), word[-1]))

    def banned(self, outputs: list[int]) -> list[int]:
        """Ids that would complete a word after these outputs."""
        if not outputs:
            return []
        candidates = self._by_last_but_one.get(outputs[-1], ())
        return [last for start, last in candidates if outputs[-len(start) :] == start]


@dataclass(kw_only=True, slots=True, eq=False)
class SamplingState:
    """One sequence. Fields that a plain request has no use for are empty or None."""

    params: SamplingParams
    seed: int
    choice: int
    outputs: list[int]
    bias_ids: Ids
    bias_values: NDArray[np.float64]
    """Finite ones."""
    allowed_W: PackedMask | None
    banned_ids: Ids
    """At every position: bad words of one token and biases of minus infinity."""
    early_banned_ids: Ids
    """The same and all end tokens: while fewer than ``min_tokens`` are out."""
    bad_words: BadWords | None
    seen: SeenTokens | None
    constraint: TokenConstraint | None = None

    @classmethod
    def of(cls, new: NewSequence, limit: int, words: int, eos_ids: Collection[int]) -> SamplingState:
        """``limit`` bounds the ids that can be generated; packed masks have ``words`` words."""
        params = new.sampling
        outputs = list(new.token_ids[new.prompt_length :])
        biases: dict[int, float] = {}
        for token, bias in params.logit_bias:
            biases[token] = biases.get(token, 0.0) + bias
        finite = {token: bias for token, bias in biases.items() if bias > -np.inf}
        banned = {word[0] for word in params.bad_words_ids if len(word) == 1} | (biases.keys() - finite.keys())
        longer = [word for word in params.bad_words_ids if len(word) > 1 and word[-1] < limit]
        ends = {*eos_ids, *params.stop_token_ids} if params.min_tokens > len(outputs) else set()
        return cls(
            params=params,
            seed=new.seed,
            choice=new.choice,
            outputs=outputs,
            bias_ids=np.array(list(finite), dtype=np.int64),
            bias_values=np.array(list(finite.values()), dtype=np.float64),
            allowed_W=None if params.allowed_token_ids is None else packed(params.allowed_token_ids, limit, words),
            banned_ids=_below(banned, limit),
            early_banned_ids=_below(banned | ends, limit),
            bad_words=BadWords(longer) if longer else None,
            seen=_seen(new, outputs, limit),
        )

    def constrain(self, constraint: TokenConstraint) -> None:
        """Takes a constraint at its start and brings it to here."""
        self.constraint = constraint
        for token in self.outputs:
            constraint.accept(token)

    @property
    def may_mask(self) -> bool:
        """Some position may have ids masked."""
        return bool(
            self.constraint is not None
            or self.allowed_W is not None
            or self.early_banned_ids.size
            or self.bad_words is not None
        )

    @property
    def is_processed(self) -> bool:
        """Its logits may change before the draw."""
        return self.may_mask or bool(self.bias_ids.size) or self.seen is not None

    def banned(self) -> Ids:
        """Ids the request bans at the next position, besides what ``allowed_token_ids`` leaves out."""
        banned = self.early_banned_ids if len(self.outputs) < self.params.min_tokens else self.banned_ids
        completing = () if self.bad_words is None else self.bad_words.banned(self.outputs)
        return np.concatenate((banned, np.array(completing, dtype=np.int64))) if completing else banned

    def advance(self, token: int) -> int | None:
        """Takes the drawn token; the place among the seen ones where they are kept."""
        self.outputs.append(token)
        if self.constraint is not None:
            self.constraint.accept(token)
        return None if self.seen is None else self.seen.add(token)


def _seen(new: NewSequence, outputs: list[int], limit: int) -> SeenTokens | None:
    params = new.sampling
    if params.repetition_penalty != 1.0:
        prompt = np.array(new.token_ids[: new.prompt_length], dtype=np.int64)
        prompt = prompt[prompt < limit]
    elif params.presence_penalty != 0.0 or params.frequency_penalty != 0.0:
        prompt = NO_IDS
    else:
        return None
    return SeenTokens(prompt, np.array(outputs, dtype=np.int64))


def packed(ids: Collection[int], limit: int, words: int) -> PackedMask:
    """A row of packed bits with those of ``ids`` set that lie below ``limit``."""
    bits = np.zeros(words * 32, dtype=np.uint8)
    bits[_below(ids, limit)] = 1
    return np.packbits(bits, bitorder="little").view(np.int32)


def _below(ids: Collection[int], limit: int) -> Ids:
    if not ids:
        return NO_IDS
    array = np.fromiter(ids, dtype=np.int64, count=len(ids))
    return np.sort(array[array < limit])
