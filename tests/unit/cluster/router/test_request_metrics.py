from __future__ import annotations

from dataclasses import replace

from actors.types import FinishReason, Stage, Timings
from cluster.config_scaling import Slo
from cluster.generation import Usage
from cluster.metrics.sheet import Sheet
from cluster.router.records import Outcome, RequestRecord
from cluster.router.request_metrics import RequestMetrics

RECORD = RequestRecord(
    request_id="r-1",
    alias=None,
    outcome=Outcome.FINISHED,
    reason=None,
    finish_reasons=(FinishReason.STOP,),
    usage=Usage(
        prompt_tokens=10,
        media_tokens=6,
        video_tokens=2,
        cached_tokens=3,
        output_tokens=5,
        reasoning_tokens=1,
        time_to_first_token_s=0.5,
    ),
    ttft_s=0.5,
    tpot_s=0.02,
    e2e_s=0.6,
    attempts=1,
    timings=Timings(exposed={Stage.PREFILL: 0.5, Stage.DECODE: 0.1, Stage.FINISHED: 0.0}, busy={Stage.PREFILL: 0.4}),
    spans=(),
)


def told(metrics: RequestMetrics) -> dict[str, float]:
    """Value of every series, of histograms (count, sum)."""
    sheet = Sheet()
    metrics.add_to(sheet)
    found: dict[str, float] = {}
    for family in sheet.collect():
        for sample in family.samples:
            if not sample.name.endswith("_bucket"):
                labels = ",".join(f"{name}={value}" for name, value in sample.labels.items())
                found[f"{sample.name}{{{labels}}}"] = sample.value
    return found


def test_requests_count_by_how_they_ended() -> None:
    metrics = RequestMetrics(Slo())
    metrics.ended(RECORD)
    metrics.ended(replace(RECORD, outcome=Outcome.ERROR, reason="POISON", finish_reasons=()))
    metrics.ended(replace(RECORD, outcome=Outcome.CANCELLED, finish_reasons=(), ttft_s=None, tpot_s=None))
    metrics.refused("QUEUE_FULL")
    metrics.retried(Stage.ENCODE, "STAGE_LOST")
    found = told(metrics)
    assert found["ernie_requests_total{outcome=finished,reason=stop}"] == 1
    assert found["ernie_requests_total{outcome=error,reason=POISON}"] == 1
    assert found["ernie_requests_total{outcome=cancelled,reason=}"] == 1
    assert found["ernie_requests_refused_total{reason=QUEUE_FULL}"] == 1
    assert found["ernie_request_retries_total{stage=encode,reason=STAGE_LOST}"] == 1
    assert found["ernie_request_seconds_count{}"] == 1  # finished ones only
    assert (found["ernie_time_to_first_token_seconds_count{}"], found["ernie_time_to_first_token_seconds_sum{}"]) == (
        2,
        1,
    )
    assert found["ernie_stage_exposed_seconds_sum{stage=prefill}"] == 1.5
    assert found["ernie_stage_busy_seconds_count{stage=prefill}"] == 3
    assert found["ernie_media_tokens_total{kind=image}"] == 12 and found["ernie_media_tokens_total{kind=video}"] == 6
    assert not any("slo" in name for name in found)


def test_an_slo_is_kept_or_not_and_errors_do_not_keep_it() -> None:
    metrics = RequestMetrics(Slo(ttft_s=0.5))
    for record in (
        RECORD,
        replace(RECORD, ttft_s=0.51),
        replace(RECORD, outcome=Outcome.ERROR, reason="X", ttft_s=None),
        replace(RECORD, outcome=Outcome.CANCELLED, ttft_s=None),
    ):
        metrics.ended(record)
    found = told(metrics)
    assert {name: value for name, value in found.items() if "slo" in name} == {
        "ernie_slo_seconds{slo=ttft}": 0.5,
        "ernie_slo_requests_total{slo=ttft,met=true}": 1,
        "ernie_slo_requests_total{slo=ttft,met=false}": 2,
    }
