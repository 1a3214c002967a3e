"""Numbers of bytes, for people."""

from __future__ import annotations


def told_bytes(count: float) -> str:
    """``57.3 GB``, ``9 MB``."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
