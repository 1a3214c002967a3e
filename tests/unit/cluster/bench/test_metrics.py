"""Numbers from records made by hand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from cluster.bench.load import Record, Reply
from cluster.bench.metrics import Spread, e2e, itl, keeps, percentile, spread, summarise, tpot, ttft


def answered(
    due: float, chunks: Sequence[float], end: float, tokens: int, *, sent: float | None = None, kind: str = "text"
) -> Record:
    reply = Reply(text="", chunk_s=tuple(chunks), end_s=end, prompt_tokens=10, cached_tokens=4, output_tokens=tokens)
    return Record(
        conversation=0, turn=0, kind=kind, due_s=due, sent_s=due if sent is None else sent, end_s=end, reply=reply
    )


def failed(due: float, end: float, error: str) -> Record:
    return Record(conversation=0, turn=0, kind="text", due_s=due, sent_s=due, end_s=end, error=error)


@pytest.mark.parametrize(
    ("record", "first", "whole", "per_token", "gaps"),
    [
        (answered(1, [2, 3, 5], 5, 3), 1, 4, 1.5, [1, 2]),
        # Three chunks of eight tokens: time per token counts tokens, gaps count chunks.
        (answered(1, [2, 3, 5], 9, 8), 1, 8, 1, [1, 2]),
        (answered(0, [2], 2.5, 1), 2, 2.5, None, []),
        (answered(0, [], 3, 0), None, 3, None, []),
        # Sent late: the delay counts.
        (answered(1, [4, 5], 5, 2, sent=3), 3, 4, 1, [1]),
    ],
)
def test_latencies(
    record: Record, first: float | None, whole: float, per_token: float | None, gaps: list[float]
) -> None:
    assert (ttft(record), e2e(record), tpot(record), itl(record)) == (first, whole, per_token, gaps)


@pytest.mark.parametrize("count", [1, 2, 3, 10, 101])
def test_percentiles_interpolate_linearly(count: int) -> None:
    samples = np.random.default_rng(count).random(count)
    ordered = sorted(samples.tolist())
    for percent in (0, 50, 90, 99, 100):
        assert percentile(ordered, percent) == pytest.approx(np.percentile(samples, percent))


def test_spread() -> None:
    assert spread([3.0, None, 1.0, 2.0]) == Spread(
        count=3, mean=2, p50=2, p90=pytest.approx(2.8), p99=pytest.approx(2.98)
    )
    assert spread([None]) is None


RECORDS = [
    answered(0, [1, 2, 3], 3, 3),
    answered(1, [4, 8], 9, 5, sent=1.5, kind="image"),
    failed(2, 3, "HTTP 429: full"),
    failed(4, 4, "HTTP 500: oops"),
    failed(3, 11, "HTTP 429: full"),
]


def test_summary() -> None:
    found = summarise(RECORDS, {})
    assert (found.completed, found.failed, found.duration_s) == (2, 3, 11)
    assert list(found.errors.items()) == [("HTTP 429: full", 2), ("HTTP 500: oops", 1)]
    assert (found.prompt_tokens, found.cached_tokens, found.output_tokens) == (20, 8, 8)
    assert found.request_throughput == pytest.approx(2 / 11)
    assert found.output_throughput == pytest.approx(8 / 11)
    assert found.total_token_throughput == pytest.approx(28 / 11)
    assert found.max_in_flight == 3
    assert found.goodput is None
    assert found.latencies.ttft is not None and found.latencies.ttft.mean == 2
    assert found.latencies.itl is not None and found.latencies.itl.count == 3
    assert found.by_kind["image"].e2e == Spread(count=1, mean=8, p50=8, p90=8, p99=8)
    assert found.send_lag is not None and (found.send_lag.count, found.send_lag.mean) == (5, pytest.approx(0.1))


@pytest.mark.parametrize(
    ("slo", "good"),
    [
        ({"ttft": 1.0}, 1),
        ({"ttft": 3.0}, 2),
        ({"ttft": 3.0, "tpot": 1.1}, 1),
        ({"ttft": 3.0, "tpot": 1.25, "e2e": 8.0}, 2),
        ({"e2e": 2.9}, 0),
    ],
)
def test_goodput_counts_what_keeps_every_bound(slo: dict[str, float], good: int) -> None:
    found = summarise(RECORDS, slo).goodput
    assert found is not None
    assert (found.per_second, found.fraction) == (pytest.approx(good / 11), pytest.approx(good / 5))


def test_bounds_on_what_a_reply_does_not_have() -> None:
    assert keeps(answered(0, [1], 1, 1), {"tpot": 0.001})
    assert not keeps(failed(0, 1, "x"), {"e2e": 100})


def test_nothing_was_measured() -> None:
    found = summarise([], {"e2e": 1})
    assert (found.completed, found.duration_s, found.request_throughput, found.max_in_flight) == (0, 0, 0, 0)
    assert found.latencies.e2e is None and found.send_lag is None
    assert found.goodput is not None and found.goodput.fraction == 0
