"""Which vision encoder a prompt's media go to, alone. Pure.

A router knows what it had encoded where, and sends the same media there again; that costs no message. Encoders could
tell routers all they keep, as engines tell their cached blocks, but the router that sees a conversation's next turn is
the one that saw the turn before. For media that are new to it there is rendezvous hashing: routers that do not know of
each other send the same picture to the same encoder, as long as the same encoders are there, and others elsewhere.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from cluster.policy.views import Demand, EncoderView

QUEUE_STEP = 8192
"""Patches queued at encoders that differ by less are about equal: a large picture has 24,000."""
PATCH_TOKENS = 0.25
"""Cost of a patch in tokens of prefill. Four patches make a token, and take the 0.6B tower about as long as the 3B that
are active of the language model take for that token."""
AWAY_TOKENS = 16.0
"""Cost of an encoder that is not the home of the media: less than an encoding, more than most pulls between nodes."""


def encoder_terms(demand: Demand, encoders: Sequence[EncoderView]) -> list[dict[str, float]]:
    """What makes up the cost of each, in tokens."""
    least = min((view.queued_patches for view in encoders), default=0)
    home = home_of(demand, encoders)
    return [
        {
            "queued": PATCH_TOKENS * ((view.queued_patches - least) // QUEUE_STEP * QUEUE_STEP),
            "encodes": PATCH_TOKENS * sum(patches for key, patches in demand.units if key not in view.known_units),
            "away": AWAY_TOKENS if demand.units and rank else 0.0,
        }
        for view, rank in zip(encoders, home, strict=True)
    ]


def home_of(demand: Demand, encoders: Sequence[EncoderView]) -> list[int]:
    """By rendezvous hashing, how far each is from being the home of the prompt's first unit, which all turns of a
    conversation share: 0 is it.
    """
    key = demand.units[0][0] if demand.units else b""
    weights = [_weight(key, view.info.incarnation) for view in encoders]
    order = sorted(range(len(weights)), key=weights.__getitem__, reverse=True)
    return [order.index(index) for index in range(len(weights))]


def _weight(content_key: bytes, incarnation: str) -> bytes:
    return hashlib.blake2b(content_key + incarnation.encode(), digest_size=16).digest()
