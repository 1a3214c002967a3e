"""Metrics as Prometheus names them, exported by every node's Ray agent (there with the prefix ``ray_``).

Each carries the tags Serve gives its own: application, deployment (the pool) and replica.
"""

from __future__ import annotations

from ray.serve.metrics import Counter, Gauge

from actors.reports import GroupReport


class GroupMetrics:
    """Of an engine with several ranks."""

    def __init__(self) -> None:
        self._skew = Gauge(
            "ernie_expert_load_skew",
            description="Rows of the busiest rank over the mean of ranks, of the experts of a bank. 1 is even.",
            tag_keys=("bank",),
        )
        self._moves = Counter(
            "ernie_expert_rebalances", description="Times experts changed ranks for the sake of balance."
        )
        self._moved = Counter("ernie_experts_moved", description="Experts that changed their rank, of all layers.")
        self._steps = Counter("ernie_group_steps", description="Steps the ranks of the engine took together.")
        self._seconds = Counter(
            "ernie_group_step_seconds",
            description="The leader in steps: sending plans, its own part, waiting for results, moving experts.",
            tag_keys=("part",),
        )
        self._told: GroupReport | None = None

    def tell(self, report: GroupReport) -> None:
        """Reports of one engine, in order."""
        told, self._told = self._told, report
        for bank, skew in (("text", report.text_skew), ("vision", report.vision_skew)):
            self._skew.set(skew, tags={"bank": bank})
        for counter, field in ((self._moves, "moves"), (self._moved, "moved_experts"), (self._steps, "steps")):
            _add(counter, getattr(report, field) - getattr(told, field, 0))
        for part in ("plan", "own", "gather", "move"):
            _add(self._seconds, getattr(report, f"{part}_s") - getattr(told, f"{part}_s", 0.0), part=part)


def _add(counter: Counter, amount: float, **tags: str) -> None:
    """Ray refuses to count nothing."""
    if amount > 0:
        counter.inc(amount, tags=tags)
