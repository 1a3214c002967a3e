"""``ernie status`` of simulated clusters."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from rich.console import Console

from cluster.cli_status import show_status, watch_status
from tests.unit.cluster.console_feed import Simulated, eight, large, small


def looks(count: int) -> Callable[[float], None]:
    """A wait that is over at once, and Ctrl-C after so many looks."""
    left = iter(range(count - 1))

    def wait(seconds: float) -> None:
        assert seconds == 0.5
        if next(left, None) is None:
            raise KeyboardInterrupt

    return wait


def watched(source: Callable[[], Any], count: int, **console: Any) -> str:
    out = io.StringIO()
    watch_status(source, Console(file=out, width=160, **console), interval_s=0.5, wait=looks(count))
    return out.getvalue()


def test_all_facts_are_shown() -> None:
    out = io.StringIO()
    feed = eight(180)
    status = feed.next()
    show_status(status, Console(file=out, width=160))
    shown = out.getvalue()
    active, (queued, *_) = status["active_requests"], status["flow"]
    assert f"baidu/ERNIE-4.5-VL-28B-A3B-Thinking: ready, {active} requests active" in shown
    assert f"requests: {queued['requests']} queued, " in shown
    assert f"latency of {status['latency']['count']} requests in 60 s:\n  first token       p50 " in shown
    assert "% within first token 2.00 s, each further one 100.0 ms\n" in shown
    for pool in ("preprocessor           4       5  0 to 8", "engine                 8       9  4 to 12"):
        assert pool in shown
    assert all(engine in shown for engine in feed.engine_ids)
    assert "draining" in shown and "loading, 31.0 GB of 44.0 GB" in shown
    assert f"{feed.engine_ids[2]} prefill -> decode: KV of decode engines 93% full" in shown
    assert f"decode {feed.engine_ids[4]}: attention: varlen, experts: grouped" in shown


def test_an_idle_cluster_has_no_latencies() -> None:
    assert "no request ended in the last 60 s" in watched(small(0).next, 1)


def test_watching_prints_one_view_after_the_other_without_a_terminal() -> None:
    shown = watched(small(40).next, 3)
    assert shown.count("baidu/ERNIE") == 3 and "\x1b" not in shown


@pytest.mark.parametrize(
    ("make", "height", "workers"),
    [
        (lambda: small(40), 24, "engine engine-bpcdp3ei decode"),
        (lambda: large(900), 40, "10.0.0.15 2 preprocess, 1 encode, 2 prefill, 5 decode, 1 colocated"),
        (lambda: large(900), 24, "and 9 more"),
    ],
)
def test_watching_stays_within_the_terminal(make: Callable[[], Simulated], height: int, workers: str) -> None:
    feed = make()
    last = feed.decisions[-1]
    shown = watched(feed.next, 1, height=height, force_terminal=True)
    assert shown.startswith("\x1b[?1049h") and "\x1b[?1049l" in shown
    plain = " ".join(re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown).split())
    assert "replicas target bounds" in plain and workers in plain
    # What does not fit is cut off at the end.
    assert f"{last.subject} {last.change}" in plain


def test_a_silent_router_is_told_beside_what_it_said_last() -> None:
    def answers() -> Iterator[Any]:
        feed = small(40)
        yield feed.next()
        yield OSError("no status from http://x: refused")
        yield OSError("no status from http://x: refused again")
        yield feed.next()

    coming = answers()

    def source() -> Any:
        answer = next(coming)
        if isinstance(answer, Exception):
            raise answer
        return answer

    views = watched(source, 4).split("baidu/ERNIE")
    assert ["refused; what follows is older" in view for view in views] == [False, True, True, False, False]
    with pytest.raises(OSError, match="refused"):
        watched(lambda: (_ for _ in ()).throw(OSError("refused")), 1)
