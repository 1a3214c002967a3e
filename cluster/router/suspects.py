"""Which choices may have killed an engine, and which engines try one of them now.

Whatever an engine computed when it died is a suspect. An engine gets one suspect at a time, beside whatever else it
does, until the suspect is past the token where the death fell; so the second death under a suspect is that one's, and
it is refused. Unless the engine had not begun with it: a whole node dies in one moment, and what one of its engines
lost may have been sent to another that was dead already. Then that moment is given time to pass, and the suspect one
chance more. A router only knows its own choices: with several routers an engine could have a suspect of each, and an
innocent one could be refused with the guilty.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import NamedTuple

TOKENS_BEYOND = 2
"""A suspect is cleared by the token at which the death fell and the one after: the first of a resumed choice comes from
an engine that prefills, and the death may have fallen in decoding."""

SETTLE_S = 0.5
"""By then every death of the same moment is known."""


class ChoiceKey(NamedTuple):
    """A choice over all its attempts."""

    request_id: str
    choice: int


@dataclass(slots=True)
class _Suspect:
    cleared_at: int
    spared: bool = False
    engines: frozenset[str] = frozenset()


class Suspects:
    """Engines by incarnation. Decides without waiting; only ``changed`` does."""

    def __init__(self) -> None:
        self._suspects: dict[ChoiceKey, _Suspect] = {}
        self._changed = asyncio.Event()

    def __contains__(self, choice: ChoiceKey) -> bool:
        return choice in self._suspects

    @property
    def count(self) -> int:
        return len(self._suspects)

    def accuse(self, choice: ChoiceKey, engine: str, token_count: int, *, computed: bool) -> bool:
        """``engine`` died with a choice that had ``token_count`` tokens. True: the choice is refused.

        ``computed``: the engine is known to have begun with it.
        """
        known = self._suspects.get(choice)
        again = known is not None and engine in known.engines
        if known is not None and again and (computed or known.spared):
            self.drop(choice)
            return True
        self.rest(choice)
        self._suspects[choice] = _Suspect(token_count + TOKENS_BEYOND, spared=again)
        return False

    def is_spared(self, choice: ChoiceKey) -> bool:
        """A second engine died with it and had not begun: it must not be tried for ``SETTLE_S``."""
        suspect = self._suspects.get(choice)
        return suspect is not None and suspect.spared

    def may_try(self, choice: ChoiceKey, engine: str) -> bool:
        """Whoever is no suspect may go anywhere."""
        return choice not in self._suspects or not any(
            engine in suspect.engines for other, suspect in self._suspects.items() if other != choice
        )

    def begin(self, choice: ChoiceKey, engines: frozenset[str]) -> None:
        """An attempt starts on engines it may try."""
        if choice in self._suspects:
            self._suspects[choice].engines = engines

    def rest(self, choice: ChoiceKey) -> None:
        """The attempt ended, and says nothing of the choice."""
        suspect = self._suspects.get(choice)
        if suspect is not None and suspect.engines:
            suspect.engines = frozenset()
            self._tell()

    def advance(self, choice: ChoiceKey, token_count: int) -> None:
        """The choice has so many tokens now."""
        suspect = self._suspects.get(choice)
        if suspect is not None and token_count >= suspect.cleared_at:
            self.drop(choice)

    def drop(self, choice: ChoiceKey) -> None:
        """The choice is cleared, or over. Idempotent."""
        if self._suspects.pop(choice, None) is not None:
            self._tell()

    async def changed(self) -> None:
        """Returns when an engine may have become free for another suspect."""
        await self._changed.wait()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
