"""What the requests of the last minute waited for."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence

from cluster.config_scaling import Slo
from cluster.registry import Latency, Percentiles
from cluster.router.records import Outcome, Recorder, RequestRecord

WINDOW_S = 60.0


class LatencyWindow(Recorder):
    """Of one router. A request counts for ``WINDOW_S`` from its end; one that its client gave up says nothing.

    Args:
        slo: what latencies should be.
        clock: monotonic seconds.
    """

    def __init__(self, slo: Slo, clock: Callable[[], float] = time.monotonic) -> None:
        self._slo = slo
        self._clock = clock
        self._ended: deque[tuple[float, RequestRecord]] = deque()

    def ended(self, record: RequestRecord) -> None:
        if record.outcome is not Outcome.CANCELLED:
            self._ended.append((self._clock(), record))
        self._forget()

    def summary(self) -> Latency:
        self._forget()
        records = [record for _, record in self._ended]
        finished = [record for record in records if record.outcome is Outcome.FINISHED]
        bounded = self._slo.ttft_s is not None or self._slo.tpot_s is not None
        return Latency(
            window_s=WINDOW_S,
            count=len(records),
            ttft_s=_percentiles([record.ttft_s for record in finished if record.ttft_s is not None]),
            tpot_s=_percentiles([record.tpot_s for record in finished if record.tpot_s is not None]),
            e2e_s=_percentiles([record.e2e_s for record in finished]),
            slo_met=sum(map(self._met, records)) / len(records) if bounded and records else None,
        )

    def _met(self, record: RequestRecord) -> bool:
        """It had an answer, in time as far as there was something to wait for."""
        return record.outcome is Outcome.FINISHED and all(
            bound is None or seconds is None or seconds <= bound
            for bound, seconds in ((self._slo.ttft_s, record.ttft_s), (self._slo.tpot_s, record.tpot_s))
        )

    def _forget(self) -> None:
        start = self._clock() - WINDOW_S
        while self._ended and self._ended[0][0] <= start:
            self._ended.popleft()


def _percentiles(values: Sequence[float]) -> Percentiles | None:
    """Nearest rank."""
    if not values:
        return None
    ordered = sorted(values)
    p50, p95, p99 = (ordered[-(-len(ordered) * percent // 100) - 1] for percent in (50, 95, 99))
    return Percentiles(p50=p50, p95=p95, p99=p99)
