"""``ernie status``: what a cluster is and does, once or again and again."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import httpx
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from actors.sizes import told_seconds
from cluster.status import decision_lines, engine_notes, pool_rows, rows, summary

TIMEOUT_S = 10.0
DECISIONS_SHOWN = 6
LATENCIES = {"ttft_s": "first token", "tpot_s": "each further one", "e2e_s": "whole request"}
PERCENTILES = ("p50", "p95", "p99")
SUMS = ("running", "waiting", "queued tokens", "KV")
WHOLE: Any = {"overflow": "ellipsis", "no_wrap": True}
"""Of lines that must stay one."""
NUMBERS = (*SUMS, "replicas", "target")
STYLES = {"preprocess": "cyan", "encode": "magenta", "prefill": "blue", "decode": "green", "colocated": "yellow"}

Status = Mapping[str, Any]


def read_status(url: str) -> Status:
    """Raises OSError where nothing answers, ValueError where no cluster does."""
    try:
        response = httpx.get(f"{url}/status", timeout=TIMEOUT_S, trust_env=False)
        response.raise_for_status()
        status: Status = response.json()
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        raise OSError(f"no status from {url}: {error}") from None
    try:
        _view(status)
    except (KeyError, TypeError, AttributeError):
        raise ValueError(f"no status from {url}: what answers there is no ernie cluster") from None
    return status


def show_status(status: Status, console: Console) -> None:
    console.print(_view(status))
    for note in engine_notes(status):
        console.print(Text(note))


def watch_status(
    source: Callable[[], Status], console: Console, *, interval_s: float, wait: Callable[[float], None] = time.sleep
) -> None:
    """Until Ctrl-C. On a terminal one view changes in place; elsewhere one is printed after the other.

    Raises OSError or ValueError if the first answer is none. Later that is shown, beside the last answer.
    """
    try:
        status, trouble = source(), ""
        with (
            Live(console=console, screen=True, auto_refresh=False) if console.is_terminal else _Printed(console) as live
        ):
            while True:
                room = console.height - bool(trouble) if console.is_terminal else None
                live.update(Group(*_heading(trouble), _view(status, room)), refresh=True)
                wait(interval_s)
                try:
                    status, trouble = source(), ""
                except (OSError, ValueError) as error:
                    trouble = trouble or f"{time.strftime('%H:%M:%S')}: {error}; what follows is older"
    except KeyboardInterrupt:
        return


class _Printed:
    """Like ``Live`` where nothing can be printed over."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def __enter__(self) -> _Printed:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, view: RenderableType, *, refresh: bool) -> None:
        self._console.print(Text(time.strftime("%H:%M:%S")), view, "", sep="\n")


def _heading(trouble: str) -> Iterator[Text]:
    if trouble:
        yield Text(trouble, "bold red")


def _view(status: Status, room: int | None = None) -> Group:
    """``room``: lines there are. Where the workers do not fit, the nodes are shown in their place."""
    whole: Any = {} if room is None else WHOLE
    facts = [Text(line, **whole) for line in (*_stages(status["flow"]), *_latencies(status["latency"]))]
    decisions = [Text(line, "dim", **whole) for line in decision_lines(status, DECISIONS_SHOWN)]
    pools = list(pool_rows(status))
    left = None if room is None else room - len(facts) - len(pools) - len(decisions) - 4
    return Group(
        Text(summary(status), "bold"),
        *facts,
        _table(("pool", "replicas", "target", "bounds"), pools, **whole),
        *_fleet(status, left),
        *decisions,
    )


def _fleet(status: Status, room: int | None) -> Iterator[RenderableType]:
    columns: tuple[str, ...] = ("pool", "id", "role", "address", "load")
    found: list[tuple[str, ...]] = list(rows(status))
    if room is not None and len(found) > room:
        columns = ("node", "workers", *SUMS)
        found = list(nodes_of(status))
    shown = found if room is None else found[: max(1, room)]
    yield _table(columns, shown, **({} if room is None else WHOLE))
    if len(found) > len(shown):
        yield Text(f"and {len(found) - len(shown)} more", "dim")


def _table(columns: Sequence[str], found: Iterable[Sequence[str]], **wrapping: Any) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in columns:
        table.add_column(name, justify="right" if name in NUMBERS else "left", **wrapping)
    for row in found:
        table.add_row(*(Text(cell, STYLES.get(cell, "")) for cell in row))
    return table


def nodes_of(status: Status) -> Iterator[tuple[str, ...]]:
    """(node, workers by role, running, waiting, queued tokens, share of the KV cache in use) of each node."""
    named = {"preprocess": status["preprocessors"], "encode": status["encoders"]}
    workers = [(one["node"], role) for role, found in named.items() for one in found]
    workers += [(engine["node"], engine["role"]) for engine in status["engines"]]
    for node in sorted({node for node, _ in workers}, key=lambda name: [(len(part), part) for part in name.split(".")]):
        roles = Counter(role for place, role in workers if place == node)
        loads = [engine["load"] for engine in status["engines"] if engine["node"] == node and engine["load"]]
        total = sum(load["total_blocks"] for load in loads)
        free = sum(load["free_blocks"] for load in loads)
        yield (
            node,
            ", ".join(f"{count} {role}" for role, count in roles.items()),
            *(str(sum(load[field] for load in loads)) for field in ("running", "waiting", "queued_tokens")),
            f"{1 - free / total:.0%}" if total else "",
        )


def _stages(flow: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    yield "requests: " + ", ".join(f"{entry['requests']} {entry['stage']}" for entry in flow)


def _latencies(latency: Mapping[str, Any]) -> Iterator[str]:
    window_s = latency["window_s"]
    if not latency["count"]:
        yield f"latency: no request ended in the last {window_s:g} s"
        return
    yield f"latency of {latency['count']} requests in {window_s:g} s:"
    for field, name in LATENCIES.items():
        if (found := latency[field]) is not None:
            yield (
                f"  {name:<18}"
                + "  ".join(f"{share} {told_seconds(found[share]):<8}" for share in PERCENTILES).rstrip()
            )
    slo = latency["slo"]
    bounds = [f"{LATENCIES[field]} {told_seconds(slo[field])}" for field in LATENCIES if slo.get(field) is not None]
    if bounds:
        yield f"  {slo['met']:.1%} within {', '.join(bounds)}"
