"""PromQL that several panels share."""

from __future__ import annotations

from cluster.metrics.definitions import METRICS, Kind
from deploy.dashboards.promql import Series

CALLERS_FAULT = "INVALID_.*|UNSUPPORTED_FIELD|CONTEXT_EXCEEDED|MEDIA_.*|VIDEO_UNSUPPORTED"
"""Reasons of errors that the caller must mend. The alerts use the same."""


def series() -> Series:
    """Every series a scrape may have, with its labels."""
    found: dict[str, frozenset[str]] = {}
    for name, metric in METRICS.items():
        labels = frozenset(metric.all_labels)
        if metric.kind is Kind.HISTOGRAM:
            found |= {f"{name}_bucket": labels | {"le"}, f"{name}_sum": labels, f"{name}_count": labels}
        else:
            found[name] = labels
    return found


def rate(counter: str, by: str = "") -> str:
    """Per second, summed by labels."""
    return f"sum{_by(by)}(rate({counter}[$__rate_interval]))"


def quantile(share: float, histogram: str, by: str = "") -> str:
    """``histogram`` may have matchers in braces."""
    name, brace, matchers = histogram.partition("{")
    labels = f"{by}, le" if by else "le"
    return f"histogram_quantile({share:g}, sum by ({labels}) (rate({name}_bucket{brace}{matchers}[$__rate_interval])))"


def mean(histogram: str, by: str = "") -> str:
    """Of the values counted meanwhile; nothing while there are none."""
    return f"{rate(f'{histogram}_sum', by)} / {rate(f'{histogram}_count', by)}"


def happened(counter: str) -> str:
    """By how much a counter grew since a step ago, where it did; also one that was not there before."""
    return f"({counter} - {counter} offset $__interval) > 0 or ({counter} unless {counter} offset $__interval) > 0"


def _by(labels: str) -> str:
    return f" by ({labels}) " if labels else ""
