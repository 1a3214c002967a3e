from __future__ import annotations

import pytest

from actors.types import Stage
from cluster.router.timeline import Progress, Timeline


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


def test_a_request_is_where_its_furthest_choice_is() -> None:
    now = [0.0]
    timeline = Timeline(lambda: now[0])
    progress = Progress(timeline)
    seen = []
    acts: list[tuple[int, Stage | None]] = [
        (0, Stage.PREPROCESS),
        (0, Stage.QUEUED),
        (0, Stage.DECODE),
        (1, Stage.QUEUED),
        (0, Stage.QUEUED),
        (1, Stage.PREFILL),
        (1, None),
        (0, Stage.DECODE),
        (0, None),
    ]
    for choice, stage in acts:
        now[0] += 1.0
        if stage is None:
            progress.leave(choice)
        else:
            progress.enter(choice, stage)
            assert progress.stage(choice) is stage
        seen.append(timeline.stage)
    assert seen == [
        Stage.PREPROCESS,
        Stage.QUEUED,
        Stage.DECODE,
        Stage.DECODE,
        Stage.QUEUED,
        Stage.PREFILL,
        Stage.QUEUED,
        Stage.DECODE,
        Stage.DECODE,
    ]
    assert timeline.finish().exposed == {
        Stage.QUEUED: 4.0,
        Stage.PREPROCESS: 1.0,
        Stage.DECODE: 3.0,
        Stage.PREFILL: 1.0,
    }
