"""What was weighed for a choice, kept to tell why. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

MOST_TOLD = 4
"""Candidates of a choice that are remembered, and as many that were left out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A place, or a pair of engines, that could have been taken. ``terms`` make up its cost, in tokens of prefill."""

    name: str
    terms: Mapping[str, float]
    last_for: str = ""
    """Why it comes behind all for which this is empty."""
    excluded: str = ""
    """Why it could not be taken at all; it then has no terms."""

    @property
    def cost(self) -> float:
        return sum(self.terms.values())

    def told(self) -> dict[str, Any]:
        """As JSON values; terms that are nothing are left out."""
        told: dict[str, Any] = {"name": self.name}
        if self.excluded:
            return told | {"excluded": self.excluded}
        told["cost"] = round(self.cost, 1)
        told["terms"] = {name: round(value, 1) for name, value in self.terms.items() if value}
        if self.last_for:
            told["last_for"] = self.last_for
        return told


def to_tell(ranked: Iterable[Candidate]) -> tuple[Candidate, ...]:
    """The few that are remembered. ``ranked``: the taken one first."""
    able: list[Candidate] = []
    unable: list[Candidate] = []
    for candidate in ranked:
        few = unable if candidate.excluded else able
        if len(few) < MOST_TOLD:
            few.append(candidate)
    return (*able, *unable)
