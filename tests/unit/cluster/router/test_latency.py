from __future__ import annotations

from actors.types import Timings
from cluster.config_scaling import Slo
from cluster.generation import Usage
from cluster.registry import Percentiles
from cluster.router.latency import WINDOW_S, LatencyWindow
from cluster.router.records import Outcome, RequestRecord


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def record(ttft_s: float | None, tpot_s: float | None = None, outcome: Outcome = Outcome.FINISHED) -> RequestRecord:
    return RequestRecord(
        request_id="r",
        alias=None,
        outcome=outcome,
        reason=None,
        finish_reasons=(),
        usage=USAGE,
        ttft_s=ttft_s,
        tpot_s=tpot_s,
        e2e_s=10.0,
        attempts=1,
        timings=Timings(),
        spans=(),
    )


USAGE = Usage(
    prompt_tokens=1, media_tokens=0, cached_tokens=0, output_tokens=1, reasoning_tokens=0, time_to_first_token_s=None
)


def test_percentiles_are_of_requests_that_ended_lately() -> None:
    clock = Clock()
    window = LatencyWindow(Slo(), clock)
    assert window.summary().ttft_s is None and window.summary().slo_met is None
    for number in range(1, 101):
        clock.now = float(number) / 10
        window.ended(record(float(number)))
    found = window.summary()
    assert (found.count, found.window_s, found.tpot_s, found.slo_met) == (100, WINDOW_S, None, None)
    assert found.ttft_s == Percentiles(p50=50.0, p95=95.0, p99=99.0)
    assert found.e2e_s == Percentiles(p50=10.0, p95=10.0, p99=10.0)
    clock.now = WINDOW_S + 9.05
    assert window.summary().ttft_s == Percentiles(p50=95.0, p95=100.0, p99=100.0)
    clock.now += WINDOW_S
    assert window.summary().count == 0


def test_the_slo_is_met_by_answers_in_time_and_not_by_errors() -> None:
    window = LatencyWindow(Slo(ttft_s=2.0, tpot_s=0.1), Clock())
    for ended in (
        record(1.0, 0.05),
        record(2.0, None),
        record(3.0, 0.05),
        record(1.0, 0.2),
        record(None, None, Outcome.ERROR),
        record(9.0, 9.0, Outcome.CANCELLED),
    ):
        window.ended(ended)
    found = window.summary()
    assert (found.count, found.slo_met) == (5, 0.4)
    assert found.tpot_s == Percentiles(p50=0.05, p95=0.2, p99=0.2)
