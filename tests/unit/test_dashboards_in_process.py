"""Every panel and alert, asked of a real Prometheus that watches all parts in one process through good and bad times.

``make test-dashboards`` does the same with a real cluster.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from actors.errors import ServingError
from actors.parallel.kv_transfer import TransportError
from actors.parallel.torch_pairs import TorchTransport
from actors.types import ContentPart, EngineRole, ImagePart, MediaSource, TextPart
from actors.wire import renewal
from cluster.generation import Delta, GenerateCall
from cluster.metrics_api import MetricsPort
from cluster.ports import free_ports
from tests.dashboards.answers import JOB, Answers
from tests.dashboards.panels import ALERTS
from tests.in_process import HOST, InProcessCluster, in_process_cluster
from tests.media import image_part, video_part
from tests.prometheus import prometheus
from tests.tiny_model import tiny_checkpoint
from tests.unit.test_resume_in_process import ask, reply

PREFILL, DECODE, COLOCATED = EngineRole.PREFILL, EngineRole.DECODE, EngineRole.COLOCATED
INTERVAL_S = 0.5
PHASE_S = 1.5
WORDS = TextPart(text="word " * 60)
LONG = TextPart(text="word " * 2000)
"""With nothing queued anywhere, its prefill engine hands such a prompt over."""
NO_PICTURE = ImagePart(source=MediaSource(content=b"no picture"))
NOT_HERE = {"pools / Scaling / {{pool}}: {{direction}} The pool was told to change its size."}
"""Pools scale where Serve starts and ends replicas."""
HAPPENED = (
    "errors / Errors",
    "errors / Refusals",
    "errors / Cancelled",
    "experts / Skew",
    "kv / Bytes /",
    "overview / SLO attainment",
    "pools / Decisions / {{pool}} {{former}}",
    "pools / Roles",
    "pools / Fleet",
)
"""What was made to happen: such panels show more than zeros."""


async def some_requests(cluster: InProcessCluster, number: int) -> None:
    """Of every kind, with every ending."""

    async def one(*parts: ContentPart, **changes: object) -> None:
        with contextlib.suppress(ServingError):
            await reply(cluster, ask(*parts, **{"max_tokens": 12, **changes}))

    async def left() -> None:
        call: GenerateCall = ask(TextPart(text=f"Go on, {number}."), max_tokens=1000)
        async with contextlib.aclosing(cluster.parts.router.generate(call)) as events:
            async for event in events:
                if isinstance(event, Delta):
                    return

    await asyncio.gather(
        one(WORDS, TextPart(text=f"{number}")),
        one(image_part(150, 100, number), TextPart(text="What is this?")),
        one(video_part(64, 48, 8, 4, number), TextPart(text="What moves?")),
        one(NO_PICTURE),
        one(WORDS, stop_token_ids=(10**9,)),
        one(WORDS, max_tokens=1000, timeout_s=0.2),
        left(),
    )
    await one(TextPart(text=f"{number}"), LONG)


async def requests_for(cluster: InProcessCluster, seconds: float, numbers: Iterator[int]) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        await some_requests(cluster, next(numbers))


async def test_no_panel_is_empty_and_every_alert_is_evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(renewal, "RENEW_S", 0.1)
    described = {"slo": {"ttft_s": 0.5, "tpot_s": 0.05}}
    roles = (PREFILL, DECODE, DECODE, COLOCATED)
    async with in_process_cluster(
        tiny_checkpoint(), *roles, ranks=(1, 1, 1, 2), described=described, rebalance_steps=10
    ) as cluster:
        (port,) = free_ports(1)
        page = MetricsPort(cluster.parts.metrics.text)
        await page.start(HOST, port)
        scrapes = [{"job_name": JOB, "static_configs": [{"targets": [f"{HOST}:{port}"]}]}]
        with prometheus(tmp_path, scrapes, [ALERTS], interval="500ms") as found:
            start, numbers = time.time(), itertools.count()
            while not await asyncio.to_thread(found.instant, "ernie_ready"):
                await asyncio.sleep(0.1)
            await requests_for(cluster, PHASE_S, numbers)
            mover = next(engine for engine in cluster.engines if engine._info.role is DECODE)
            await cluster.planner.order_role(mover._info.engine_id, PREFILL)
            await requests_for(cluster, PHASE_S, numbers)
            lost = next(engine for engine in cluster.engines if engine._info.role is PREFILL)
            going = asyncio.create_task(requests_for(cluster, PHASE_S, numbers))
            await asyncio.sleep(0.2)
            await cluster.kill(lost)
            await going

            def broken(*_: object) -> None:
                raise TransportError("no data path here")

            monkeypatch.setattr(TorchTransport, "recv", broken)
            await requests_for(cluster, PHASE_S, numbers)
            answers = Answers(found, start, time.time(), INTERVAL_S)
            empty, still = await asyncio.to_thread(answers.unanswered)
            assert empty == NOT_HERE
            print(*sorted(still), sep="\n")
            assert not [name for name in still if name.startswith(HAPPENED)]
            assert await asyncio.to_thread(answers.never_scraped) == set()
            assert await asyncio.to_thread(answers.broken_rules) == []
        await page.close()
