"""What the steps of an engine were like, since its start."""

from __future__ import annotations

from actors.engine.plan import StepPlan
from actors.tallies import COUNTS, STEP_SECONDS, Tally

STEP_KINDS = ("prefill", "decode")


class StepTallies:
    """By kind: a step that computes any prompt is a ``prefill``. The step thread adds, any thread reads."""

    def __init__(self) -> None:
        self.seconds = {kind: Tally(STEP_SECONDS) for kind in STEP_KINDS}
        self.tokens = {kind: Tally(COUNTS) for kind in STEP_KINDS}
        self.sequences = {kind: Tally(COUNTS) for kind in STEP_KINDS}
        self.sampled_tokens = 0

    def add(self, plan: StepPlan, seconds: float, sampled: int) -> None:
        """A step that computed nothing, and only told news, does not count."""
        if plan.shape.max_tokens:
            kind = "decode" if plan.shape.decodes else "prefill"
            self.seconds[kind].add(seconds)
            self.tokens[kind].add(plan.token_count)
            self.sequences[kind].add(len(plan.slices))
            self.sampled_tokens += sampled
