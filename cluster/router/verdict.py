"""What becomes of a choice whose attempt ended without a last token. Pure."""

from __future__ import annotations

import enum

from actors.errors import Overloaded, ServingError

_ROOM = frozenset({"NO_BLOCKS", "PREEMPTED"})
_REFUSED = frozenset(
    {
        "DRAINING",
        "DUPLICATE",
        "ENDED",
        "EPOCH_CHANGED",
        "INCARNATION_MISMATCH",
        "UNKNOWN",
        "VERSION_MISMATCH",
        "WRONG_ROLE",
    }
)
"""An engine would not: what the router knew of it was old, or the two engines of a route heard of it apart."""
NOT_CACHED = "NOT_CACHED"
"""An engine without vision experts lost media from its cache that it was thought to have."""
_MOVED = frozenset({"MOVED", "STOPPED", NOT_CACHED})
_LOST = frozenset({"ENGINE_LOST", "PEER_CANCELLED", "STAGE_LOST", "TRANSFER_FAILED"})


class Verdict(enum.Enum):
    """What comes next. Only LOST counts as an attempt and draws on the retry budget."""

    TOLD = enum.auto()
    """The client hears of it: another attempt would end the same way."""
    ROOM = enum.auto()
    """Again when an engine tells that it has room, with the request's arrival."""
    MOVED = enum.auto()
    """Again at once, elsewhere: its engine leaves, or cannot compute it."""
    LOST = enum.auto()
    """Again: a part died, fell silent or failed."""


def judge(error: ServingError, *, newcomer: bool) -> Verdict:
    """``newcomer``: a full queue turns requests away at their door; one that was let in waits."""
    if isinstance(error, Overloaded):
        return Verdict.TOLD if newcomer else Verdict.ROOM
    if error.reason in _ROOM or error.reason in _REFUSED:
        return Verdict.ROOM
    if error.reason in _MOVED:
        return Verdict.MOVED
    return Verdict.LOST if error.reason in _LOST else Verdict.TOLD
