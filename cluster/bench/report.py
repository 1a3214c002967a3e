"""A summary as JSON and as tables. Times are in milliseconds, throughputs per second."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from cluster.bench.metrics import Latencies, Spread, Summary
from cluster.bench.settings import BenchSettings

MAX_ERRORS = 10
"""Different messages that are printed; JSON has them all."""
NAMES = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "e2e": "E2E"}


def as_json(settings: BenchSettings, summary: Summary) -> dict[str, Any]:
    """One object: what was asked for, and what came of it."""
    body: dict[str, Any] = {
        "settings": _settings(settings),
        "duration_s": summary.duration_s,
        "completed": summary.completed,
        "failed": summary.failed,
        "errors": dict(summary.errors),
        "total_input_tokens": summary.prompt_tokens,
        "total_cached_tokens": summary.cached_tokens,
        "total_output_tokens": summary.output_tokens,
        "request_throughput": summary.request_throughput,
        "output_throughput": summary.output_throughput,
        "total_token_throughput": summary.total_token_throughput,
        "max_in_flight": summary.max_in_flight,
        **_latencies(summary.latencies),
        "send_lag_ms": _milliseconds(summary.send_lag),
        "by_kind": {kind: _latencies(found) for kind, found in summary.by_kind.items()},
    }
    if summary.goodput is not None:
        body["request_goodput"] = summary.goodput.per_second
        body["goodput_fraction"] = summary.goodput.fraction
    return body


def print_tables(settings: BenchSettings, summary: Summary, console: Console) -> None:
    """For people."""
    facts = Table(box=None, pad_edge=False, show_header=False)
    facts.add_column(style="dim")
    facts.add_column(justify="right")
    for name, value in _facts(settings, summary):
        facts.add_row(name, value)
    console.print(facts)
    console.print()
    table = Table("ms", box=None, pad_edge=False, header_style="dim")
    for column in ("mean", "p50", "p90", "p99", "samples"):
        table.add_column(column, justify="right")
    _add_rows(table, "", summary.latencies)
    if len(summary.by_kind) > 1:
        for kind, found in summary.by_kind.items():
            _add_rows(table, f"{kind} ", found)
    if settings.concurrency is None:
        _add_row(table, "send lag", summary.send_lag)
    console.print(table)
    if summary.errors:
        console.print()
        for message, count in list(summary.errors.items())[:MAX_ERRORS]:
            console.print(Text(f"{count} x {message}", style="red"), soft_wrap=True)
        if len(summary.errors) > MAX_ERRORS:
            console.print(Text(f"and {len(summary.errors) - MAX_ERRORS} other errors", style="red"))


def _facts(settings: BenchSettings, summary: Summary) -> list[tuple[str, str]]:
    cached = summary.cached_tokens / summary.prompt_tokens if summary.prompt_tokens else 0.0
    facts = [
        ("requests", f"{summary.completed} completed, {summary.failed} failed"),
        ("duration", f"{summary.duration_s:.2f} s"),
        ("prompt tokens", f"{summary.prompt_tokens} ({cached:.1%} cached)"),
        ("output tokens", str(summary.output_tokens)),
        ("requests/s", f"{summary.request_throughput:.2f}"),
        ("output tokens/s", f"{summary.output_throughput:.1f}"),
        ("all tokens/s", f"{summary.total_token_throughput:.1f}"),
        ("most at a time", str(summary.max_in_flight)),
    ]
    if summary.goodput is not None:
        bounds = ", ".join(f"{NAMES[metric]} <= {bound * 1000:g} ms" for metric, bound in settings.slo.items())
        kept = f"{summary.goodput.per_second:.2f} requests/s, {summary.goodput.fraction:.1%} within {bounds}"
        facts.append(("goodput", kept))
    return facts


def _add_rows(table: Table, prefix: str, latencies: Latencies) -> None:
    for metric, name in NAMES.items():
        _add_row(table, prefix + name, getattr(latencies, metric))


def _add_row(table: Table, name: str, found: Spread | None) -> None:
    if found is None:
        table.add_row(name, *["-"] * 4, "0")
        return
    values = (found.mean, found.p50, found.p90, found.p99)
    table.add_row(name, *(f"{value * 1000:.2f}" for value in values), str(found.count))


def _latencies(found: Latencies) -> dict[str, Any]:
    return {f"{metric}_ms": _milliseconds(getattr(found, metric)) for metric in NAMES}


def _milliseconds(found: Spread | None) -> dict[str, float] | None:
    if found is None:
        return None
    return {name: value if name == "count" else value * 1000 for name, value in asdict(found).items()}


def _settings(settings: BenchSettings) -> dict[str, Any]:
    """Infinity, which JSON lacks, as "inf"; distributions as they are written on the command line."""
    body: dict[str, Any] = {}
    for name in settings.__dataclass_fields__:
        value = getattr(settings, name)
        if name in ("input_tokens", "output_tokens") or value == float("inf"):
            value = str(value)
        body[name] = dict(value) if name in ("mix", "slo") else value
    return body
