"""The page of metrics of a whole cluster in one process: what it says, and what it leaves out."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from prometheus_client import Metric as Family
from prometheus_client.parser import text_string_to_metric_families

from actors.errors import InvalidRequest
from actors.types import EngineRole, TextPart
from actors.wire.audit import AuditServicer
from cluster.metrics.definitions import METRICS, Source
from cluster.router import metrics_page
from tests.in_process import InProcessCluster, in_process_cluster
from tests.media import image_part
from tests.tiny_model import tiny_checkpoint
from tests.unit.test_resume_in_process import ask, reply
from tests.waiting import eventually


def series(families: dict[str, Family], name: str, **labels: str) -> float:
    """The sum of all series that have the labels."""
    family = families[name.removesuffix("_total")]
    wanted = f"{name}_count" if family.type == "histogram" else name
    found = [s for s in family.samples if s.name == wanted and labels.items() <= s.labels.items()]
    assert found, f"no series {name} {labels}"
    return sum(sample.value for sample in found)


async def scrape(cluster: InProcessCluster) -> dict[str, Family]:
    text = (await cluster.parts.metrics.text()).decode()
    return {family.name: family for family in text_string_to_metric_families(text)}


async def test_the_page_has_every_metric_and_they_count_what_was_done() -> None:
    slo = {"slo": {"ttft_s": 600.0, "tpot_s": 1e-9}}
    roles = (EngineRole.PREFILL, EngineRole.DECODE)
    async with in_process_cluster(tiny_checkpoint(), *roles, described=slo) as cluster:
        call = ask(image_part(150, 100, 1), TextPart(text="What is this?"), max_tokens=6)
        await reply(cluster, call)
        await eventually(lambda: all(view.cached_blocks for view in cluster.parts.fleet.engines()))
        await reply(cluster, call)
        await reply(cluster, replace(call, cache_salt="other"))
        with pytest.raises(InvalidRequest):
            await reply(cluster, ask(TextPart(text="x"), max_tokens=6, stop_token_ids=(10**9,)))
        families = await scrape(cluster)
        wanted = {name for name, metric in METRICS.items() if metric.source is not Source.GROUP}
        assert not {name for name in wanted if name.removesuffix("_total") not in families}
        for family in families.values():
            metric = METRICS.get(family.name) or METRICS[f"{family.name}_total"]
            for sample in family.samples:
                assert sample.labels.keys() - {"le"} == set(metric.all_labels), sample

        assert series(families, "ernie_requests_total", outcome="finished", reason="length") == 3
        assert series(families, "ernie_requests_refused_total", reason="INVALID_FIELD") == 1
        for name in ("time_to_first_token", "time_per_output_token", "request"):
            assert series(families, f"ernie_{name}_seconds") == 3
        assert series(families, "ernie_output_tokens_total") == series(families, "ernie_sampled_tokens_total") == 18
        assert series(families, "ernie_stage_exposed_seconds", stage="encode") == 3
        # Nobody encoded what the prefix cache had.
        assert series(families, "ernie_encoder_units_total", source="computed") == 1
        assert series(families, "ernie_encoder_units_total", source="cached") == 1
        assert series(families, "ernie_preprocess_seconds") == 3
        assert series(families, "ernie_cached_tokens_total") > 0
        sent = series(families, "ernie_kv_transfer_bytes_total", direction="sent", role="prefill")
        assert sent == series(families, "ernie_kv_transfer_bytes_total", direction="received", role="decode") > 0
        assert series(families, "ernie_kv_vision_tail_blocks", role="decode") > 0
        assert series(families, "ernie_kv_vision_tail_blocks", role="prefill") == 0
        assert series(families, "ernie_step_seconds", kind="decode", role="decode") > 0
        blocks = [engine.load().total_blocks for engine in cluster.engines]
        assert series(families, "ernie_kv_blocks") == sum(blocks)
        assert series(families, "ernie_part_up") == 5
        assert series(families, "ernie_workers", state="ready") == 5
        assert series(families, "ernie_slo_requests_total", slo="ttft", met="true") == 3
        assert series(families, "ernie_slo_requests_total", slo="tpot", met="false") == 3
        assert series(families, "ernie_fleet_changes_total", pool="engine", change="joined") == 2


async def test_parts_that_do_not_answer_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    frozen = False
    answer = AuditServicer.Metrics

    async def hangs(self: AuditServicer, request: Any, context: Any) -> Any:
        if frozen:
            await asyncio.sleep(3600)
        return await answer(self, request, context)

    monkeypatch.setattr(AuditServicer, "Metrics", hangs)
    monkeypatch.setattr(metrics_page, "ANSWER_S", 0.5)
    async with in_process_cluster(tiny_checkpoint(), EngineRole.COLOCATED) as cluster:
        families = await scrape(cluster)
        assert series(families, "ernie_part_up") == 4
        frozen = True
        families = await scrape(cluster)
        assert series(families, "ernie_part_up", pool="engine") == 0
        assert series(families, "ernie_part_up") == series(families, "ernie_part_up", pool="planner") == 1
        assert "ernie_planner_term" in families and "ernie_engine_role" not in families
        assert series(families, "ernie_requests_active") == 0
        cluster.planner.metrics = None  # type: ignore[method-assign,assignment]
        families = await scrape(cluster)
        assert series(families, "ernie_part_up") == 0 and "ernie_requests_active" in families
