"""Which attempt keys may be submitted: not those that are active, ended lately, or cancelled before they came."""

from __future__ import annotations

from collections import OrderedDict

from actors.errors import AlreadyExists, Unavailable
from actors.types import SequenceKey


class KeyRegistry:
    """Not thread-safe: callers hold the engine's lock."""

    def __init__(self, memory_s: float) -> None:
        self.memory_s = memory_s
        self.active: set[SequenceKey] = set()
        self._ended: OrderedDict[SequenceKey, float] = OrderedDict()

    def claim(self, key: SequenceKey, now: float) -> None:
        """Makes a key active. Raises AlreadyExists if it is, Unavailable with reason ENDED if it lately was."""
        if key in self.active:
            raise AlreadyExists(f"attempt {key} is active already")
        if self.has_ended(key, now):
            raise Unavailable(f"attempt {key} has ended", reason="ENDED")
        self.active.add(key)

    def retire(self, key: SequenceKey, now: float) -> None:
        """Remembers a key as ended, whether it was ever active or not."""
        self.active.discard(key)
        self._ended[key] = now + self.memory_s
        self._ended.move_to_end(key)
        self._purge(now)

    def has_ended(self, key: SequenceKey, now: float) -> bool:
        self._purge(now)
        return key in self._ended

    def _purge(self, now: float) -> None:
        while self._ended:
            key, expiry = next(iter(self._ended.items()))
            if expiry > now:
                return
            del self._ended[key]
