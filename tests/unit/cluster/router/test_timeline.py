from __future__ import annotations

import pytest

from actors.types import Stage
from cluster.router.timeline import Timeline


def test_exposed_stages_partition_wall_time() -> None:
    now = [10.0]
    timeline = Timeline(lambda: now[0])
    for stage, until in [
        (Stage.PREPROCESS, 10.5),
        (Stage.QUEUED, 12.0),
        (Stage.PREFILL, 12.25),
        (Stage.DECODE, 13.0),
    ]:
        now[0] = until
        timeline.enter(stage)
    now[0] = 20.0
    timings = timeline.finish()
    assert timings.exposed == {
        Stage.QUEUED: 0.75,
        Stage.PREPROCESS: 1.5,
        Stage.PREFILL: 0.75,
        Stage.DECODE: 7.0,
    }
    assert sum(timings.exposed.values()) == pytest.approx(20.0 - 10.0)


def test_busy_time_adds_up_beside() -> None:
    timeline = Timeline(lambda: 0.0)
    timeline.add_busy(Stage.DECODE, 0.25)
    timeline.add_busy(Stage.DECODE, 0.5)
    timings = timeline.finish()
    assert timings.busy == {Stage.DECODE: 0.75}
    assert sum(timings.exposed.values()) == 0.0
