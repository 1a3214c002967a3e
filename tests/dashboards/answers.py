"""What a Prometheus that watched a cluster answers to the dashboards and alerts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from deploy.dashboards import promql
from tests.dashboards.panels import Asked, alerts, asked_by_annotations, asked_by_panels
from tests.prometheus import Prometheus

JOB = "ernie"
ASKED = (*asked_by_panels(), *asked_by_annotations())


@dataclass(frozen=True)
class Answers:
    """``start``, ``end``: when it watched. ``interval_s``: between two scrapes."""

    prometheus: Prometheus
    start: float
    end: float
    interval_s: float = 1.0

    def values(self, asked: Asked) -> list[float]:
        """All numbers of the result, over the whole time, as Grafana asks for it."""
        expr = promql.filled(asked.expr, self._variables)
        found = self.prometheus.ranged(expr, self.start, self.end, self.interval_s)
        return [number for series in found for _, text in series["values"] if math.isfinite(number := float(text))]

    def unanswered(self) -> tuple[set[str], set[str]]:
        """The queries without a number, and those whose numbers are always 0."""
        found = {str(asked): self.values(asked) for asked in ASKED}
        empty = {name for name, numbers in found.items() if not numbers}
        return empty, {name for name, numbers in found.items() if not any(numbers)} - empty

    def never_scraped(self) -> set[str]:
        """Series that a panel, an annotation or an alert reads and that the cluster did not have."""
        exprs = [asked.expr for asked in ASKED] + [alert["expr"] for alert in alerts()]
        names = {name for expr in exprs for name in promql.reads(expr)}
        watched_s = math.ceil(self.end - self.start) + 60
        found = self.prometheus.instant(f'group by (__name__) (last_over_time({{job="{JOB}"}}[{watched_s}s]))')
        return names - {series["metric"]["__name__"] for series in found}

    def broken_rules(self) -> list[dict[str, Any]]:
        """Alerts that were not evaluated, or could not be."""
        rules = {rule["name"]: rule for rule in self.prometheus.rules()}
        return [
            rules.get(name, alert) for alert in alerts() if rules.get(name := alert["alert"], {}).get("health") != "ok"
        ]

    @property
    def _variables(self) -> Mapping[str, str]:
        # Rates look back over at least four scrapes.
        back_ms, step_ms = (round(count * self.interval_s * 1000) for count in (8, 1))
        return {"$job": JOB, "$__rate_interval": f"{back_ms}ms", "$__interval": f"{step_ms}ms"}
