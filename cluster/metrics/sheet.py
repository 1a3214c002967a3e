"""What one part says at one moment, in the text format of Prometheus."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from prometheus_client import generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.core import Metric as Family
from prometheus_client.registry import Collector

from actors.tallies import Tally
from cluster.metrics.definitions import METRICS, Kind, Metric

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True, slots=True)
class Row:
    """One series, or those of one histogram."""

    metric: Metric
    labels: Mapping[str, str]
    value: float | Tally


class Sheet(Collector):
    """Rows of one part.

    Args:
        common: labels that name the part, see ``SOURCE_LABELS``.
    """

    def __init__(self, **common: str) -> None:
        self._common = common
        self.rows: list[Row] = []

    def add(self, name: str, value: float | Tally, **labels: str) -> None:
        """Raises KeyError for a metric that is not defined, ValueError for other labels than it has."""
        metric = METRICS[name]
        found = self._common | labels
        if found.keys() != set(metric.all_labels):
            raise ValueError(f"{name} has the labels {metric.all_labels}, not {tuple(found)}")
        self.rows.append(Row(metric, found, value))

    def collect(self) -> Iterator[Family]:
        families: dict[str, Any] = {}
        for row in self.rows:
            family = families.get(row.metric.name)
            if family is None:
                metric = row.metric
                family = _FAMILIES[metric.kind](metric.name, metric.help, labels=metric.all_labels)
                families[metric.name] = family
            values = [row.labels[label] for label in row.metric.all_labels]
            if isinstance(row.value, Tally):
                buckets = [(_told(bound), float(count)) for bound, count in row.value.cumulative()]
                family.add_metric(values, buckets=buckets, sum_value=row.value.total)
            else:
                family.add_metric(values, row.value)
        return iter(families.values())

    def text(self) -> bytes:
        return generate_latest(self)


_FAMILIES: dict[Kind, Any] = {
    Kind.COUNTER: CounterMetricFamily,
    Kind.GAUGE: GaugeMetricFamily,
    Kind.HISTOGRAM: HistogramMetricFamily,
}


def _told(bound: float) -> str:
    return "+Inf" if math.isinf(bound) else repr(bound)


def node_of(address: str) -> str:
    """The host of ``host:port``, an IPv6 one without its brackets."""
    return address.rpartition(":")[0].strip("[]")


def merged(texts: Iterable[bytes]) -> bytes:
    """One page of several: the series of a metric stand together, as Prometheus wants them."""
    heads: dict[bytes, bytes] = {}
    series: dict[bytes, list[bytes]] = {}
    for text in texts:
        for block in _BLOCKS.split(text):
            match = _HEAD.match(block)
            if match is not None:
                heads.setdefault(match["name"], match[0])
                series.setdefault(match["name"], []).append(block[match.end() :])
    return b"".join(head + b"".join(series[name]) for name, head in heads.items())


_BLOCKS = re.compile(rb"^(?=# HELP )", re.MULTILINE)
_HEAD = re.compile(rb"# HELP (?P<name>\S+) .*\n# TYPE .*\n")
