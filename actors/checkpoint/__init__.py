"""Writes complete checkpoints of the real format with random weights."""

from __future__ import annotations

from actors.checkpoint.presets import PRESETS, parse_overrides
from actors.checkpoint.writer import CheckpointSummary, write_random_checkpoint

__all__ = ["PRESETS", "CheckpointSummary", "parse_overrides", "write_random_checkpoint"]
