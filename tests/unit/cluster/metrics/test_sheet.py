from __future__ import annotations

import math

import pytest
from prometheus_client.parser import text_string_to_metric_families

from actors.tallies import Tally
from cluster.metrics.definitions import METRICS, Kind
from cluster.metrics.sheet import Sheet, merged, node_of


def test_names_follow_the_conventions() -> None:
    for name, metric in METRICS.items():
        assert name == metric.name and name.startswith("ernie_")
        assert name.endswith("_total") == (metric.kind is Kind.COUNTER), name
        assert not name.endswith(("_sum", "_count", "_bucket", "_ms", "_mb"))
        assert len(set(metric.all_labels)) == len(metric.all_labels), name
        assert metric.help.endswith("."), name


def test_a_tally_counts_by_bound() -> None:
    tally = Tally((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 2.5, 99.0):
        tally.add(value)
    assert tally.cumulative() == [(1.0, 2), (2.0, 3), (math.inf, 5)]
    assert (tally.count, tally.total) == (5, 104.5)


def test_pages_are_merged_by_metric_and_read_by_prometheus() -> None:
    tally = Tally((0.5,))
    tally.add(0.25)
    router = Sheet()
    router.add("ernie_requests_total", 3, outcome="error", reason='odd "\n\\ name')
    router.add("ernie_request_seconds", tally)
    engines = []
    for name in ("a", "b"):
        engines.append(Sheet(pool="p", worker=name, node="10.0.0.1", role="decode"))
        engines[-1].add("ernie_engine_role", 1)
        engines[-1].add("ernie_step_seconds", tally, kind="decode")
    page = merged([sheet.text() for sheet in (router, *engines)])
    families = {family.name: family for family in text_string_to_metric_families(page.decode())}
    assert page.count(b"# TYPE") == len(families) == 4
    (request,) = families["ernie_requests"].samples
    assert request.labels["reason"] == 'odd "\n\\ name' and request.value == 3
    assert [sample.labels["worker"] for sample in families["ernie_engine_role"].samples] == ["a", "b"]
    steps = families["ernie_step_seconds"].samples
    assert [sample.value for sample in steps if sample.labels.get("le") == "+Inf"] == [1, 1]
    assert [sample.value for sample in steps if sample.name.endswith("_sum")] == [0.25, 0.25]


def test_what_is_not_defined_is_refused() -> None:
    sheet = Sheet(pool="p", worker="w", node="n")
    with pytest.raises(KeyError):
        sheet.add("ernie_other", 1)
    with pytest.raises(ValueError, match="ernie_media_bytes has the labels"):
        sheet.add("ernie_media_bytes", 1)
    with pytest.raises(ValueError, match="ernie_requests_active"):
        sheet.add("ernie_requests_active", 1)


@pytest.mark.parametrize(("address", "node"), [("10.0.0.1:80", "10.0.0.1"), ("[::1]:80", "::1"), ("", "")])
def test_the_node_is_the_host(address: str, node: str) -> None:
    assert node_of(address) == node
