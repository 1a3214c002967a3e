"""How Ray Serve comes to have as many replicas of a pool as the planner wants.

Serve's controller asks a policy. This one knows nothing but what the replicas of the pool echo: the planner's term, the
number of its last decision and the target. The newest counts; where nothing is heard the count stays. A pool without
replicas has nobody to echo: Serve itself starts the first one as soon as a request waits in a handle.

Serve pickles this module's function by value for its controller, so it stands alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext

TERM, DECISION, TARGET = "planner_term", "planner_decision", "planner_target"

Echo = dict[str, float]
"""What a replica heard from a planner, by these names; empty before it has."""


def newest(echoes: list[Echo]) -> Echo:
    """Of the latest term, its latest decision; empty if all are."""
    return max((echo for echo in echoes if echo), key=lambda echo: (echo[TERM], echo[DECISION]), default={})


def follow_planner(context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
    """An autoscaling policy of Serve."""
    said = context.raw_metrics or {}
    echoes = [
        {name: said[name][replica][-1].value for name in (TERM, DECISION, TARGET)}
        for replica in said.get(TARGET, {})
        if all(said.get(name, {}).get(replica) for name in (TERM, DECISION, TARGET))
    ]
    return int(newest(echoes).get(TARGET, context.target_num_replicas)), {}
