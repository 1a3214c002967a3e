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
        "Roles",
        happened("ernie_role_changes_total"),
        "blue",
        title="{{pool}}: {{former}} -> {{role}}",
        text="An engine took another role.",
    )
    page.annotate(
        "Losses", happened("ernie_parts_lost_total"), "red", title="{{pool}}: lost", text="A lease was not renewed."
    )

    page.row("Size")
    page.lines(
        "Workers",
        "Those the planner knows.",
        COUNT,
        Query("sum by (pool, state) (ernie_workers)", "{{pool}} {{state}}"),
    )
    page.lines(
        "Engines by role",
        "As they are now.",
        COUNT,
        Query("sum by (pool, role) (ernie_engine_role)", "{{pool}} {{role}}"),
        stacked=True,
    )
    page.lines(
        "Changes",
        "Counted since the planner started.",
        COUNT,
        Query("sum by (pool, former, role) (ernie_role_changes_total)", "{{pool}} {{former}} -> {{role}}"),
        Query("sum by (pool) (ernie_parts_lost_total)", "{{pool}} lost"),
    )

    page.row("What asks for more")
    page.lines(
        "Preprocessors: age of the queue",
        "How long the oldest request that waits has waited.",
        SECONDS,
        Query("max by (pool) (ernie_preprocessor_queue_age_seconds)", "{{pool}}"),
    )
    page.lines(
        "Preprocessors: requests",
        "Waiting for memory or a worker, and running.",
        COUNT,
        Query("sum by (state) (ernie_preprocessor_requests)", "{{state}}"),
        stacked=True,
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
        "Waiting for room",
        "Choices that no engine has KV blocks for.",
        COUNT,
        Query("sum(ernie_requests_waiting_for_room)", "choices"),
    )
    return page
