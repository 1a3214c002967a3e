"""The same numbers through the Ray agent of the node, there with the prefix ``ray_``.

Each carries the tags Serve gives its own besides: application, deployment (the pool) and replica. Ray takes the values
of histograms only one by one, so those are on the router's page alone.
"""

from __future__ import annotations

from ray.serve.metrics import Counter, Gauge

from actors.tallies import Tally
from cluster.metrics.definitions import Kind, Metric
from cluster.metrics.sheet import Row, Sheet


class RayExport:
    """Of one part. ``tell`` gets its sheets in order."""

    def __init__(self) -> None:
        self._instruments: dict[str, Counter | Gauge] = {}
        self._told: dict[tuple[str, ...], float] = {}

    def tell(self, sheet: Sheet) -> None:
        for row in sheet.rows:
            if not isinstance(row.value, Tally):
                self._tell(row, row.value)

    def _tell(self, row: Row, value: float) -> None:
        instrument = self._instrument(row.metric)
        tags = dict(row.labels)
        if isinstance(instrument, Gauge):
            instrument.set(value, tags=tags)
            return
        # Whatever role the part had before, what it told then was counted then.
        series = (row.metric.name, *(tags[label] for label in row.metric.labels))
        more = value - self._told.get(series, 0.0)
        if more > 0:  # Ray refuses to count nothing.
            self._told[series] = value
            instrument.inc(more, tags=tags)

    def _instrument(self, metric: Metric) -> Counter | Gauge:
        found = self._instruments.get(metric.name)
        if found is None:
            kind = Counter if metric.kind is Kind.COUNTER else Gauge
            # Ray adds the suffix of counters itself.
            name, labels = metric.name.removesuffix("_total"), metric.all_labels
            found = kind(name, description=metric.help, tag_keys=labels)  # type: ignore[arg-type]  # wants one label
            self._instruments[metric.name] = found
        return found
