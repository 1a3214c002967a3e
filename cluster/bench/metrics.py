"""Numbers from records. Pure; definitions as in vLLM's benchmark_serving.

    TTFT  due -> first chunk with tokens
    E2E   due -> end of the reply
    TPOT  (E2E - TTFT) / (n - 1) of replies with n > 1 tokens
    ITL   between neighbouring chunks with tokens, all requests together

where *due* is explained in ``cluster.bench.load`` and is the sending time in a closed loop. Percentiles interpolate
linearly. Throughput counts complete replies and runs from the first due time to the last end.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from cluster.bench.load import Record, Reply

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """Of some samples, in their unit."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Latencies:
    """Seconds; None where there is no sample."""

    ttft: Spread | None
    tpot: Spread | None
    itl: Spread | None
    e2e: Spread | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Goodput:
    """Complete replies that kept every bound of the SLO."""

    per_second: float
    fraction: float
    """Of all requests, failed ones included."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """One benchmark. Throughputs are per second."""

    duration_s: float
    completed: int
    failed: int
    errors: Mapping[str, int]
    """How often each message came, most frequent first."""
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    request_throughput: float
    output_throughput: float
    total_token_throughput: float
    max_in_flight: int
    latencies: Latencies
    by_kind: Mapping[str, Latencies]
    send_lag: Spread | None
    """How late this process sent what was due, which is part of the latencies above."""
    goodput: Goodput | None


def summarise(records: Sequence[Record], slo: Mapping[str, float]) -> Summary:
    """``slo`` bounds ttft, tpot and e2e in seconds; empty: no goodput."""
    done = [record for record in records if record.reply is not None]
    replies = [record.reply for record in done if record.reply is not None]
    duration = max((record.end_s for record in records), default=0.0) - min(
        (record.due_s for record in records), default=0.0
    )
    prompt = sum(reply.prompt_tokens for reply in replies)
    output = sum(reply.output_tokens for reply in replies)
    kinds = sorted({record.kind for record in done})
    return Summary(
        duration_s=duration,
        completed=len(done),
        failed=len(records) - len(done),
        errors=dict(Counter(record.error for record in records if record.error is not None).most_common()),
        prompt_tokens=prompt,
        cached_tokens=sum(reply.cached_tokens for reply in replies),
        output_tokens=output,
        request_throughput=_rate(len(done), duration),
        output_throughput=_rate(output, duration),
        total_token_throughput=_rate(prompt + output, duration),
        max_in_flight=_max_in_flight(records),
        latencies=_latencies(done),
        by_kind={kind: _latencies([record for record in done if record.kind == kind]) for kind in kinds},
        send_lag=spread(record.sent_s - record.due_s for record in records),
        goodput=_goodput(records, slo, duration) if slo else None,
    )


def ttft(record: Record) -> float | None:
    """None for a reply without tokens."""
    chunks = _reply(record).chunk_s
    return chunks[0] - record.due_s if chunks else None


def e2e(record: Record) -> float:
    return _reply(record).end_s - record.due_s


def tpot(record: Record) -> float | None:
    """None for replies of fewer than two tokens."""
    first, count = ttft(record), _reply(record).output_tokens
    return (e2e(record) - first) / (count - 1) if first is not None and count > 1 else None


def itl(record: Record) -> list[float]:
    return [later - earlier for earlier, later in itertools.pairwise(_reply(record).chunk_s)]


def keeps(record: Record, slo: Mapping[str, float]) -> bool:
    """What a reply has no value of, its bound does not hold against it."""
    if record.reply is None:
        return False
    values = {"ttft": ttft(record), "tpot": tpot(record), "e2e": e2e(record)}
    return all((value := values[metric]) is None or value <= bound for metric, bound in slo.items())


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Of ascending samples, at least one; linear between neighbours."""
    place = (len(ordered) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def spread(samples: Iterable[float | None]) -> Spread | None:
    """Leaves None out."""
    ordered = sorted(sample for sample in samples if sample is not None)
    if not ordered:
        return None
    p50, p90, p99 = (percentile(ordered, percent) for percent in PERCENTILES)
    return Spread(count=len(ordered), mean=sum(ordered) / len(ordered), p50=p50, p90=p90, p99=p99)


def _reply(record: Record) -> Reply:
    if record.reply is None:
        raise ValueError("the request failed")
    return record.reply


def _latencies(done: Sequence[Record]) -> Latencies:
    return Latencies(
        ttft=spread(map(ttft, done)),
        tpot=spread(map(tpot, done)),
        itl=spread(gap for record in done for gap in itl(record)),
        e2e=spread(map(e2e, done)),
    )


def _goodput(records: Sequence[Record], slo: Mapping[str, float], duration: float) -> Goodput:
    good = sum(keeps(record, slo) for record in records)
    return Goodput(per_second=_rate(good, duration), fraction=good / len(records) if records else 0.0)


def _max_in_flight(records: Sequence[Record]) -> int:
    changes = sorted([(record.sent_s, 1) for record in records] + [(record.end_s, -1) for record in records])
    return max(itertools.accumulate(change for _, change in changes), default=0)


def _rate(count: int, duration: float) -> float:
    return count / duration if duration > 0 else 0.0
