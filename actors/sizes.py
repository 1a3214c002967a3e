"""Numbers of bytes and seconds, for people."""

from __future__ import annotations


def told_bytes(count: float) -> str:
    """``57.3 GB``, ``9 MB``."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def told_seconds(seconds: float) -> str:
    """A duration for people."""
    return f"{seconds * 1000:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"
