"""How prompts share the tokens of a step. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Want(NamedTuple):
    """What one prompt could use: ``available`` tokens now, of ``remaining`` until it decodes."""

    available: int
    remaining: int


def share_budget(budget: int, wants: Sequence[Want]) -> list[int]:
    """Tokens for each of ``wants``, which are in their order; together at most ``budget``.

    The first that can use any has a right to half of the budget (rounded up), so that nothing keeps it from finishing.
    The others share what it leaves, those first that have the least to go: a short prompt does not wait for a long one.
    What then is left goes to the first.
    """
    grants = [0] * len(wants)
    first = next((number for number, want in enumerate(wants) if want.available > 0), None)
    if first is None or budget <= 0:
        return grants
    grants[first] = min(wants[first].available, (budget + 1) // 2)
    budget -= grants[first]
    others = sorted(range(first + 1, len(wants)), key=lambda number: wants[number].remaining)
    for number in others:
        grants[number] = max(0, min(wants[number].available, budget))
        budget -= grants[number]
    grants[first] += min(wants[first].available - grants[first], budget)
    return grants
