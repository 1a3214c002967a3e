"""What is held against the table of metrics: names, labels, and sides that could never match."""

from __future__ import annotations

import pytest

from deploy.dashboards import promql
from deploy.dashboards.forms import of_job

SERIES = {
    "ernie_requests_total": frozenset({"pool", "outcome"}),
    "ernie_limit": frozenset({"pool"}),
    "ernie_seconds_bucket": frozenset({"pool", "le"}),
}
TARGET = {"job", "instance"}


@pytest.mark.parametrize(
    ("expr", "labels"),
    [
        ("ernie_limit", {"pool"} | TARGET),
        ("sum(ernie_limit)", set()),
        ('sum by (pool) (rate(ernie_requests_total{outcome="error"}[$__rate_interval]))', {"pool"}),
        ("sum without (outcome, job) (ernie_requests_total)", {"pool", "instance"}),
        ("topk(3, ernie_requests_total)", {"pool", "outcome"} | TARGET),
        ("sum by (pool) (ernie_requests_total) / sum by (pool) (ernie_limit)", {"pool"}),
        ("ernie_requests_total / on (pool) group_left ernie_limit", {"pool", "outcome"} | TARGET),
        ("sum by (pool, outcome) (ernie_requests_total) unless on (pool) ernie_limit", {"pool", "outcome"}),
        ("histogram_quantile(0.9, sum by (pool, le) (rate(ernie_seconds_bucket[5m])))", {"pool"}),
        ("1 - sum(ernie_limit) > 0", set()),
        ("sum(ernie_limit) or vector(0)", set()),
        ('absent(ernie_limit{pool="a"})', {"pool"}),
        ("max_over_time(sum by (pool) (ernie_limit)[5m:10s])", {"pool"}),
        ('label_replace(ernie_limit, "name", "$1", "pool", "(.*)")', {"pool", "name"} | TARGET),
        ("up == 0", TARGET),
    ],
)
def test_labels_of_a_result(expr: str, labels: set[str]) -> None:
    assert promql.labels(expr, SERIES) == labels


@pytest.mark.parametrize(
    ("expr", "wrong"),
    [
        ("sum(", "unclosed left parenthesis"),
        ("sum(ernie_request_total)", "no series ernie_request_total"),
        ("ernie_requests", "no series ernie_requests"),
        ('ernie_limit{outcome="error"}', "ernie_limit has no label outcome"),
        ("sum by (role) (ernie_limit)", "no label role"),
        ("sum by (outcome) (sum by (pool) (ernie_requests_total))", "no label outcome"),
        ("histogram_quantile(0.9, sum by (pool) (rate(ernie_seconds_bucket[5m])))", "no label le"),
        ("sum by (pool) (ernie_requests_total) / sum(ernie_limit)", "no label pool"),
        ("ernie_requests_total > on (outcome) ernie_limit", "no label outcome"),
        ('label_replace(ernie_limit, "name", "$1", "outcome", "(.*)")', "no label outcome"),
    ],
)
def test_what_no_series_has_is_refused(expr: str, wrong: str) -> None:
    with pytest.raises(ValueError, match=wrong):
        promql.labels(expr, SERIES)


def test_what_an_expression_reads() -> None:
    expr = "sum(rate(ernie_requests_total[1m])) / scalar(ernie_limit) + max_over_time(ernie_x[5m:1m])"
    assert promql.reads(expr) == {"ernie_requests_total", "ernie_limit", "ernie_x"}
    assert promql.legend_labels("{{pool}} of {{ job }}, {{ $labels.outcome }}: {{ $value }}") == {
        "pool",
        "job",
        "outcome",
    }


def test_a_page_narrows_every_series_to_one_cluster() -> None:
    expr = 'sum(rate(ernie_a_total[5m])) / ernie_b{x="y", z=~"$pool"} + up'
    assert of_job(expr) == ('sum(rate(ernie_a_total{job="$job"}[5m])) / ernie_b{job="$job", x="y", z=~"$pool"} + up')
