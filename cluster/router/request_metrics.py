"""Counts and times of requests, as metrics."""

from __future__ import annotations

from collections import Counter

from actors.errors import Overloaded
from actors.tallies import WORK_SECONDS, Tally
from actors.types import Stage
from cluster.config_scaling import Slo
from cluster.metrics.sheet import Sheet
from cluster.router.records import Outcome, Recorder, RequestRecord

LATENCY_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
"""Of the first token, and of whole requests."""
TOKEN_SECONDS = (0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5)
"""From token to token."""
TOKEN_COUNTS = (1, 4, 16, 64, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
STAGES: tuple[Stage, ...] = tuple(stage for stage in Stage if stage is not Stage.FINISHED)


class RequestMetrics(Recorder):
    """Of one router, since its start."""

    def __init__(self, slo: Slo) -> None:
        self._slo = {"ttft": slo.ttft_s, "tpot": slo.tpot_s}
        self._kept: Counter[tuple[str, bool]] = Counter()
        """By name of the latency and whether it was kept to."""
        # What is usual has a value before it happens: a rate needs a first one.
        self._requests = Counter({(Outcome.FINISHED, "stop"): 0, (Outcome.FINISHED, "length"): 0})
        """By outcome and reason."""
        self._refusals = Counter({Overloaded.default_reason: 0})
        self._retries = Counter({(Stage.PREFILL, "ENGINE_LOST"): 0, (Stage.PREFILL, "PREEMPTED"): 0})
        self._first_token = Tally(LATENCY_SECONDS)
        self._per_token = Tally(TOKEN_SECONDS)
        self._gaps = Tally(TOKEN_SECONDS)
        self._whole = Tally(LATENCY_SECONDS)
        self._exposed = {stage: Tally(WORK_SECONDS) for stage in STAGES}
        self._busy = {stage: Tally(WORK_SECONDS) for stage in STAGES}
        self._prompt_tokens = Tally(TOKEN_COUNTS)
        self._output_tokens = Tally(TOKEN_COUNTS)
        self._media_tokens = Counter(image=0, video=0)
        self._cached_tokens = 0
        self._reasoning_tokens = 0

    def refused(self, reason: str) -> None:
        self._refusals[reason] += 1

    def token_gap(self, seconds: float) -> None:
        self._gaps.add(seconds)

    def retried(self, stage: Stage, reason: str) -> None:
        self._retries[stage, reason] += 1

    def ended(self, record: RequestRecord) -> None:
        reason = record.reason or (record.finish_reasons[0] if record.finish_reasons else "")
        self._requests[record.outcome, reason] += 1
        if record.ttft_s is not None:
            self._first_token.add(record.ttft_s)
        if record.tpot_s is not None:
            self._per_token.add(record.tpot_s)
        for name, seconds in (("ttft", record.ttft_s), ("tpot", record.tpot_s)):
            bound = self._slo[name]
            if bound is None:
                continue
            if record.outcome is Outcome.ERROR:
                self._kept[name, False] += 1
            elif seconds is not None:
                self._kept[name, seconds <= bound] += 1
        if record.outcome is Outcome.FINISHED:
            self._whole.add(record.e2e_s)
        for tallies, times in ((self._exposed, record.timings.exposed), (self._busy, record.timings.busy)):
            for stage in times.keys() & tallies.keys():
                tallies[stage].add(times[stage])
        usage = record.usage
        if usage.prompt_tokens:
            self._prompt_tokens.add(usage.prompt_tokens)
            self._output_tokens.add(usage.output_tokens)
        self._media_tokens.update(image=usage.image_tokens, video=usage.video_tokens)
        self._cached_tokens += usage.cached_tokens
        self._reasoning_tokens += usage.reasoning_tokens

    def add_to(self, sheet: Sheet) -> None:
        for (outcome, reason), count in self._requests.items():
            sheet.add("ernie_requests_total", count, outcome=outcome, reason=reason)
        for reason, count in self._refusals.items():
            sheet.add("ernie_requests_refused_total", count, reason=reason)
        for (stage, reason), count in self._retries.items():
            sheet.add("ernie_request_retries_total", count, stage=stage, reason=reason)
        sheet.add("ernie_time_to_first_token_seconds", self._first_token)
        sheet.add("ernie_time_per_output_token_seconds", self._per_token)
        sheet.add("ernie_inter_token_seconds", self._gaps)
        sheet.add("ernie_request_seconds", self._whole)
        for name, bound in self._slo.items():
            if bound is not None:
                sheet.add("ernie_slo_seconds", bound, slo=name)
                for met in (True, False):
                    sheet.add("ernie_slo_requests_total", self._kept[name, met], slo=name, met=str(met).lower())
        for stage in STAGES:
            sheet.add("ernie_stage_exposed_seconds", self._exposed[stage], stage=stage)
            sheet.add("ernie_stage_busy_seconds", self._busy[stage], stage=stage)
        sheet.add("ernie_request_prompt_tokens", self._prompt_tokens)
        sheet.add("ernie_request_output_tokens", self._output_tokens)
        sheet.add("ernie_prompt_tokens_total", self._prompt_tokens.total)
        sheet.add("ernie_output_tokens_total", self._output_tokens.total)
        for kind, count in self._media_tokens.items():
            sheet.add("ernie_media_tokens_total", count, kind=kind)
        sheet.add("ernie_cached_tokens_total", self._cached_tokens)
        sheet.add("ernie_reasoning_tokens_total", self._reasoning_tokens)
