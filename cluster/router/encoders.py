"""What a router knows of vision encoders beside the registry: what it had encoded where, and what it waits for."""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from actors.types import PromptMedia
from cluster.policy.views import EncoderView
from cluster.registry import EncoderEntry

MOST_UNITS = 16_384
"""Units remembered of each encoder: a few megabytes of keys. Encoders forget by bytes, which routers do not know."""


def patches_of(media: Iterable[PromptMedia]) -> tuple[tuple[bytes, int], ...]:
    """(content key, patches) of every distinct unit."""
    return tuple({key: item.grid.unit.patches for item in media for key in item.content_keys}.items())


class EncoderBook:
    """Encoders by incarnation. A wrong belief costs an encoding or a longer queue, never an answer."""

    def __init__(self) -> None:
        self._units: defaultdict[str, OrderedDict[bytes, None]] = defaultdict(OrderedDict)
        self._waiting: Counter[str] = Counter()

    def views(self, entries: Sequence[EncoderEntry]) -> list[EncoderView]:
        """What encoders report of their queues may be seconds old; what this router asked of them is not."""
        listed = {entry.info.incarnation for entry in entries}
        for gone in self._units.keys() - listed:
            del self._units[gone]
        return [
            EncoderView(
                info=entry.info,
                queued_patches=max(entry.queued_patches, self._waiting[entry.info.incarnation]),
                known_units=self._units[entry.info.incarnation].keys(),
            )
            for entry in entries
        ]

    @contextmanager
    def encoding(self, incarnation: str, units: Sequence[tuple[bytes, int]]) -> Iterator[None]:
        """While an encoder is asked for units (``patches_of``); if that goes well it has them afterwards."""
        known = self._units[incarnation]
        patches = sum(patches for key, patches in units if key not in known)
        self._waiting[incarnation] += patches
        try:
            yield
            for key, _ in units:
                known[key] = None
                known.move_to_end(key)
            while len(known) > MOST_UNITS:
                known.popitem(last=False)
        finally:
            self._waiting[incarnation] -= patches
            if not self._waiting[incarnation]:
                del self._waiting[incarnation]
