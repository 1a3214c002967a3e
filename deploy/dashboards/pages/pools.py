"""How large each pool is, what asks it to grow or shrink, and what the planner decided."""

from __future__ import annotations

from deploy.dashboards.expressions import happened, quantile, series
from deploy.dashboards.forms import COUNT, SECONDS, SHARE, Page, Query


def page() -> Page:
    page = Page(
        "pools",
        "Pools and autoscaling",
        "How large each pool is, what asks it to grow or shrink, and what the planner decided (marked).",
        series(),
    )
    page.annotate(
        "Scaling",
        happened("ernie_scaling_decisions_total"),
        "purple",
        title="{{pool}}: {{direction}}",
        text="The pool was told to change its size.",
    )
    page.annotate(
        "Roles",
        happened("ernie_role_decisions_total"),
        "blue",
        title="{{pool}}: {{former}} -> {{role}}",
        text="An engine was told to take another role.",
    )
    page.annotate(
        "Fleet",
        happened("ernie_fleet_changes_total"),
        "red",
        title="{{pool}}: {{change}}",
        text="A worker joined, left or was lost.",
    )

    page.row("Size")
    page.lines(
        "Workers",
        "Those that take requests, and how many there are to be.",
        COUNT,
        Query('sum by (pool) (ernie_workers{state="ready"})', "{{pool}}"),
        Query("max by (pool) (ernie_pool_target_replicas)", "{{pool}} wanted"),
    )
    page.lines(
        "Loading",
        "Engines that read their weights.",
        COUNT,
        Query('sum by (pool) (ernie_workers{state="loading"})', "{{pool}}"),
        stacked=True,
    )
    page.lines(
        "Bounds",
        "The fewest and the most workers a pool may be told to have; equal where it does not scale.",
        COUNT,
        Query("max by (pool) (ernie_pool_min_replicas)", "{{pool}} at least"),
        Query("max by (pool) (ernie_pool_max_replicas)", "{{pool}} at most"),
    )
    page.lines(
        "Engines by role",
        "As they are now.",
        COUNT,
        Query("sum by (pool, role) (ernie_engine_role)", "{{pool}} {{role}}"),
        stacked=True,
    )
    page.lines(
        "Decisions",
        "Counted since the planner started.",
        COUNT,
        Query("sum by (pool, direction) (ernie_scaling_decisions_total)", "{{pool}} {{direction}}"),
        Query("sum by (pool, former, role) (ernie_role_decisions_total)", "{{pool}} {{former}} -> {{role}}"),
        Query("sum by (pool, former, role) (ernie_role_changes_total)", "{{pool}} {{former}} -> {{role}}, done"),
    )
    page.lines(
        "Comings and goings",
        "Workers that joined, left or were lost, since the planner started.",
        COUNT,
        Query("sum by (pool, change) (ernie_fleet_changes_total)", "{{pool}} {{change}}"),
    )

    page.row("What asks for more")
    page.lines(
        "Preprocessors: age of the queue",
        "How long the oldest request that waits has waited.",
        SECONDS,
        Query("max by (pool) (ernie_preprocessor_queue_age_seconds)", "{{pool}}"),
    )
    page.lines(
        "Preprocessors: waiting",
        "Requests that wait for memory or a worker.",
        COUNT,
        Query("sum by (pool) (ernie_preprocessor_waiting)", "{{pool}}"),
    )
    page.lines(
        "Vision encoders: queued patches",
        "Mean of the encoders: what waits for its batch or is in it.",
        COUNT,
        Query("avg by (pool) (ernie_encoder_queued_patches)", "{{pool}}"),
    )
    page.lines(
        "Engines: queued prompt tokens",
        "Mean of the engines of a role: prompt tokens still to be computed.",
        COUNT,
        Query("avg by (pool, role) (ernie_engine_queued_tokens)", "{{pool}} {{role}}"),
    )
    page.lines(
        "Engines: KV in use",
        "Share of the KV blocks of a role's engines.",
        SHARE,
        Query(
            'sum by (pool, role) (ernie_kv_blocks{state="used"}) / sum by (pool, role) (ernie_kv_blocks)',
            "{{pool}} {{role}}",
        ),
        top=1.0,
    )
    page.lines(
        "Latency",
        "Quantiles against which the SLO is held: a late first token asks for prefill, a late next one for decode.",
        SECONDS,
        Query(quantile(0.95, "ernie_time_to_first_token_seconds"), "first token, p95"),
        Query(quantile(0.95, "ernie_time_per_output_token_seconds"), "per token, p95"),
    )
    page.lines(
        "Busy",
        "Share of the last seconds in which they computed; of engines, in which they computed prompts.",
        SHARE,
        Query("avg by (pool) (ernie_preprocessor_busy_ratio)", "{{pool}}"),
        Query("avg by (pool) (ernie_encoder_busy_ratio)", "{{pool}}"),
        Query("avg by (pool, role) (ernie_engine_prefill_busy_ratio)", "{{pool}} {{role}}, prompts"),
        top=1.0,
    )
    page.lines(
        "Waiting for room",
        "Choices that no engine has KV blocks for.",
        COUNT,
        Query("sum(ernie_requests_waiting_for_room)", "choices"),
    )
    return page
