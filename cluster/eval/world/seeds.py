"""Seeds that are kept for evaluation."""

from __future__ import annotations

EVALUATION_SEEDS = range(1 << 20)
"""Training refuses these and evaluation takes no others, so that no sample of an evaluation was trained on."""
