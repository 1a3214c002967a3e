"""Which rank a sequence lives on, from its admission until it ends or loses its blocks. Pure.

A rank with a free seat and room for the whole sequence is eligible. A choice goes where other choices of its request
live, whose prompt blocks it shares. Otherwise the eligible rank with the least work is taken, in tokens: those still to
be computed there, this sequence's own among them (what the prefix cache holds need not be), and what its replies and
their contexts cost in the steps to come. Ranks compute their steps side by side: the largest makes the others wait.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

SEQUENCE_TOKENS = 64
"""A sequence weighs as much as so many tokens to compute: it takes one of every step for as long as it is there."""
HELD_TOKENS = 16
"""So many tokens of KV weigh as much as one to compute: attention reads them in every step."""


class RankView(NamedTuple):
    """A rank, and what a sequence would mean for it."""

    room: int | None
    """Blocks that may be given out; None without a free seat."""
    needed: int
    """Blocks the sequence takes of these."""
    uncached: int
    """Tokens of it that would have to be computed here."""
    queued: int
    """Tokens to be computed here before it came."""
    active: int
    """Sequences that take part here."""
    held: int
    """Tokens that the blocks in use have room for."""
    has_sibling: bool
    """Another choice of its request lives here."""

    @property
    def eligible(self) -> bool:
        return self.room is not None and self.needed <= self.room

    @property
    def work(self) -> int:
        """In tokens to compute."""
        return self.queued + self.uncached + SEQUENCE_TOKENS * self.active + self.held // HELD_TOKENS


def choose_rank(views: Sequence[RankView]) -> int | None:
    """Index of the rank; None while none has room. Of equals the one with the most room left, then the first."""
    eligible = [number for number, view in enumerate(views) if view.eligible]
    if not eligible:
        return None

    def preference(number: int) -> tuple[bool, int, int, int]:
        view = views[number]
        return not view.has_sibling, view.work, view.needed - (view.room or 0), number

    return min(eligible, key=preference)
