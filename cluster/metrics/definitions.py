"""Every metric there is: its name, its kind, its labels and what it says.

Names follow Prometheus: base units, ``_total`` for counters. What a worker says of itself carries labels that name it
(``SOURCE_LABELS``); the series of the router and the planner have none but what is listed here.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass


class Kind(enum.StrEnum):
    """As Prometheus has them."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


class Source(enum.StrEnum):
    """Which part says it."""

    ROUTER = "router"
    PLANNER = "planner"
    PREPROCESSOR = "preprocessor"
    ENCODER = "encoder"
    STORE = "store"
    """What keeps units of media: in every preprocessor patches, in every vision encoder embeddings."""
    ENGINE = "engine"
    GROUP = "group"
    """Engines of several ranks only."""


_WORKER = ("pool", "worker", "node")
SOURCE_LABELS: Mapping[Source, tuple[str, ...]] = {
    Source.ROUTER: (),
    Source.PLANNER: (),
    Source.PREPROCESSOR: _WORKER,
    Source.ENCODER: _WORKER,
    Source.STORE: _WORKER,
    Source.ENGINE: (*_WORKER, "role"),
    Source.GROUP: (*_WORKER, "role"),
}
"""Labels of the part itself, on every one of its series."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """``labels``: besides those of its source."""

    name: str
    kind: Kind
    source: Source
    help: str
    labels: tuple[str, ...] = ()

    @property
    def all_labels(self) -> tuple[str, ...]:
        return (*SOURCE_LABELS[self.source], *self.labels)


def _metrics(source: Source, *rows: tuple[str, Kind, str, str]) -> dict[str, Metric]:
    return {
        name: Metric(name=name, kind=kind, source=source, help=help, labels=tuple(labels.split()))
        for name, kind, labels, help in rows
    }


_COUNTER, _GAUGE, _HISTOGRAM = Kind.COUNTER, Kind.GAUGE, Kind.HISTOGRAM

METRICS: Mapping[str, Metric] = (
    _metrics(
        Source.ROUTER,
        ("ernie_requests_total", _COUNTER, "outcome reason",
         "Requests that ended: finished, with the first choice's finish reason; error, with its reason; cancelled."),
        ("ernie_requests_refused_total", _COUNTER, "reason", "Requests that were not admitted."),
        ("ernie_ready", _GAUGE, "", "1 while a request could be answered, as /ready says."),
        ("ernie_requests_active", _GAUGE, "", "Requests that run."),
        ("ernie_requests_waiting_for_room", _GAUGE, "", "Choices that wait until an engine has KV blocks for them."),
        ("ernie_request_retries_total", _COUNTER, "stage reason",
         "Work of a stage that was done again, because it was lost or given back."),
        ("ernie_time_to_first_token_seconds", _HISTOGRAM, "", "From arrival to the first token."),
        ("ernie_time_per_output_token_seconds", _HISTOGRAM, "",
         "Mean time between tokens of a request, of those with two or more."),
        ("ernie_inter_token_seconds", _HISTOGRAM, "", "Between two arrivals of tokens of one choice."),
        ("ernie_slo_requests_total", _COUNTER, "slo met",
         "Requests by whether they kept to a latency of the SLO; those that failed did not."),
        ("ernie_slo_seconds", _GAUGE, "slo", "The latencies of the SLO: ttft, tpot."),
        ("ernie_request_seconds", _HISTOGRAM, "", "From arrival to the last token, of requests that finished."),
        ("ernie_stage_exposed_seconds", _HISTOGRAM, "stage",
         "Of a request's time, what it spent waiting for the stage. The stages of a request sum to its time."),
        ("ernie_stage_busy_seconds", _HISTOGRAM, "stage",
         "What parts worked on a stage of a request, some of it while the request waited for something else."),
        ("ernie_prompt_tokens_total", _COUNTER, "", "Prompt tokens of requests that ended, media among them."),
        ("ernie_media_tokens_total", _COUNTER, "kind", "Of the prompt tokens, those of pictures and of videos."),
        ("ernie_cached_tokens_total", _COUNTER, "", "Of the prompt tokens, those found in a prefix cache."),
        ("ernie_output_tokens_total", _COUNTER, "", "Output tokens of requests that ended."),
        ("ernie_reasoning_tokens_total", _COUNTER, "", "Of the output tokens, those of thinking."),
        ("ernie_request_prompt_tokens", _HISTOGRAM, "", "Prompt tokens of a request."),
        ("ernie_request_output_tokens", _HISTOGRAM, "", "Output tokens of a request, all choices together."),
        ("ernie_retry_budget", _GAUGE, "", "Retries at hand; below zero while some wait."),
        ("ernie_suspects", _GAUGE, "", "Choices under which an engine died and that are not cleared yet."),
        ("ernie_leases", _GAUGE, "", "Leases the router keeps at preprocessors and vision encoders."),
        ("ernie_part_up", _GAUGE, "pool worker node",
         "1 if the part told its metrics for this page in time. One that did not is missing from the rest of it."),
        ("ernie_scrape_seconds", _GAUGE, "", "What it took to ask all parts for this page."),
    )
    | _metrics(
        Source.PLANNER,
        ("ernie_planner_term", _GAUGE, "", "Grows with every planner that follows another."),
        ("ernie_workers", _GAUGE, "pool state", "Workers the planner knows: ready, or loading their weights."),
        ("ernie_pool_target_replicas", _GAUGE, "pool", "Workers the pool is to have."),
        ("ernie_pool_min_replicas", _GAUGE, "pool", "The fewest it may be told to have."),
        ("ernie_pool_max_replicas", _GAUGE, "pool", "The most it may be told to have."),
        ("ernie_scaling_decisions_total", _COUNTER, "pool direction", "Times a pool was told to grow or to shrink."),
        ("ernie_role_decisions_total", _COUNTER, "pool former role", "Engines that were told to take another role."),
        ("ernie_role_changes_total", _COUNTER, "pool former role", "Engines that took another role."),
        ("ernie_fleet_changes_total", _COUNTER, "pool change",
         "Workers that joined, that left, and that were lost: their leases ran out."),
    )
    | _metrics(
        Source.PREPROCESSOR,
        ("ernie_preprocessor_waiting", _GAUGE, "", "Requests that wait for memory or a worker."),
        ("ernie_preprocessor_queue_age_seconds", _GAUGE, "", "How long the oldest one that waits has waited."),
        ("ernie_preprocessor_busy_ratio", _GAUGE, "", "Share of the last seconds of its workers that they worked."),
        ("ernie_preprocess_seconds", _HISTOGRAM, "", "Work on one request."),
    )
    | _metrics(
        Source.ENCODER,
        ("ernie_encoder_queued_patches", _GAUGE, "", "Patches that wait for their batch or are in it."),
        ("ernie_encoder_busy_ratio", _GAUGE, "", "Share of the last seconds in which it computed."),
        ("ernie_encoder_window_bytes", _GAUGE, "", "Patches pulled, or being pulled, ahead of their batch."),
        ("ernie_encoder_batch_seconds", _HISTOGRAM, "", "One pass through the vision tower."),
        ("ernie_encoder_batch_patches", _HISTOGRAM, "", "Patches of one pass."),
        ("ernie_encoder_units_total", _COUNTER, "source",
         "Units asked for: cached, shared with a call that asked before, or computed."),
        ("ernie_encoder_patch_misses_total", _COUNTER, "", "Units whose patches were gone when they were pulled."),
    )
    | _metrics(
        Source.STORE,
        ("ernie_media_bytes", _GAUGE, "state",
         "Bytes of media: held under leases, cached without one, reserved for what is being made."),
        ("ernie_media_limit_bytes", _GAUGE, "", "What these may take together."),
        ("ernie_media_units", _GAUGE, "state", "Units of media: held or cached."),
        ("ernie_media_leases", _GAUGE, "", "Leases that hold units."),
        ("ernie_media_waiting", _GAUGE, "", "Calls that wait for bytes to become free."),
        ("ernie_media_pulls_total", _COUNTER, "result", "Units others came to pull: hit or miss."),
        ("ernie_media_pulled_bytes_total", _COUNTER, "", "Bytes of units that were pulled."),
        ("ernie_media_evictions_total", _COUNTER, "", "Cached units that gave way to others."),
    )
    | _metrics(
        Source.ENGINE,
        ("ernie_engine_role", _GAUGE, "", "1, with the role it has now as a label."),
        ("ernie_engine_sequences", _GAUGE, "state",
         "Sequences here: running, waiting without blocks, or reserved, which hold blocks for a transfer."),
        ("ernie_engine_queued_tokens", _GAUGE, "", "Prompt tokens still to be computed here."),
        ("ernie_engine_prefill_busy_ratio", _GAUGE, "", "Share of the last seconds that prompts took of its steps."),
        ("ernie_kv_blocks", _GAUGE, "state", "KV blocks: used, cached (free, with a known prefix) or empty."),
        ("ernie_kv_block_tokens", _GAUGE, "", "Tokens a KV block holds."),
        ("ernie_kv_vision_tail_blocks", _GAUGE, "",
         "Of the leader's blocks, those that lie where the vision experts would be: none while it prefills."),
        ("ernie_prefix_queried_tokens_total", _COUNTER, "", "Prompt tokens looked up in the prefix cache."),
        ("ernie_prefix_hit_tokens_total", _COUNTER, "", "Of these, found there."),
        ("ernie_preemptions_total", _COUNTER, "", "Sequences that lost their blocks to another."),
        ("ernie_step_seconds", _HISTOGRAM, "kind", "One step: decode, or prefill if it computes any prompt."),
        ("ernie_step_tokens", _HISTOGRAM, "kind", "Tokens computed in one step."),
        ("ernie_step_sequences", _HISTOGRAM, "kind", "Sequences in one step."),
        ("ernie_sampled_tokens_total", _COUNTER, "", "Tokens the engine sampled."),
        ("ernie_kv_transfer_bytes_total", _COUNTER, "direction path",
         "KV that was sent or received: over the pair of ranks, or streamed over gRPC, which is slower."),
        ("ernie_kv_transfer_seconds_total", _COUNTER, "direction", "What the ranks worked on transfers."),
        ("ernie_kv_transfer_chunks_total", _COUNTER, "direction", "Chunks that arrived and were verified."),
        ("ernie_kv_transfer_resent_bytes_total", _COUNTER, "", "Of the bytes sent, those sent again."),
        ("ernie_kv_transfer_nacks_total", _COUNTER, "direction", "Chunks the receiver did not get as they were sent."),
        ("ernie_kv_transfer_generations_total", _COUNTER, "direction", "Pairs of ranks that were connected."),
        ("ernie_kv_transfer_failures_total", _COUNTER, "direction", "Transfers given up, cancelled ones not counted."),
        ("ernie_kv_transfer_pairs", _GAUGE, "direction", "Engines it is connected with for transfers."),
        ("ernie_embedding_pulls_total", _COUNTER, "result", "Embeddings pulled from vision encoders: hit or miss."),
        ("ernie_embedding_pulled_bytes_total", _COUNTER, "", "Bytes of embeddings pulled."),
        ("ernie_embedding_window_bytes", _GAUGE, "", "Embeddings held here ahead of their use."),
    )
    | _metrics(
        Source.GROUP,
        ("ernie_engine_ranks", _GAUGE, "", "Ranks of the engine."),
        ("ernie_expert_load_skew", _GAUGE, "bank",
         "Rows of the busiest rank over the mean of ranks, of the experts of a bank. 1 is even."),
        ("ernie_expert_rebalances_total", _COUNTER, "", "Times experts changed ranks for the sake of balance."),
        ("ernie_experts_moved_total", _COUNTER, "", "Experts that changed their rank, of all layers."),
        ("ernie_group_steps_total", _COUNTER, "", "Steps the ranks of the engine took together."),
        ("ernie_group_step_seconds_total", _COUNTER, "part",
         "The leader in steps: sending plans, its own part, waiting for results, moving experts."),
    )
)  # fmt: skip
"""By name. Histograms have the series ``_bucket``, ``_sum`` and ``_count``."""
