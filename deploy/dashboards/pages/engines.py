"""What each engine is and does."""

from __future__ import annotations

from deploy.dashboards.expressions import mean, quantile, rate, series
from deploy.dashboards.forms import COUNT, PER_SECOND, SECONDS, Page, Query

ROLES = {"1": ("prefill", "blue"), "2": ("decode", "green"), "3": ("colocated", "purple")}


def page() -> Page:
    page = Page("engines", "Engines and roles", "What each engine is and does.", series())
    numbered = " or ".join(
        f'max by (worker) (ernie_engine_role{{role="{role}"}}) * {number}' for number, (role, _) in ROLES.items()
    )
    page.row("Roles")
    page.states("Roles", "What each engine is.", Query(numbered, "{{worker}}"), ROLES, width=24)

    page.row("Load")
    page.lines(
        "Sequences",
        "Running, waiting without blocks, or reserved, which hold blocks for a transfer.",
        COUNT,
        Query("sum by (role, state) (ernie_engine_sequences)", "{{role}} {{state}}"),
        stacked=True,
    )
    page.lines(
        "Running, by engine",
        "Sequences.",
        COUNT,
        Query('sum by (worker, role) (ernie_engine_sequences{state="running"})', "{{worker}} {{role}}"),
    )
    page.lines(
        "Queued prompt tokens, by engine",
        "Still to be computed.",
        COUNT,
        Query("sum by (worker, role) (ernie_engine_queued_tokens)", "{{worker}} {{role}}"),
    )

    page.row("Steps")
    page.lines(
        "Step time",
        "A step that computes any prompt is a prefill step.",
        SECONDS,
        *(
            Query(quantile(share, "ernie_step_seconds", "role, kind"), f"{{{{role}}}}: {{{{kind}}}}, p{share * 100:g}")
            for share in (0.5, 0.95)
        ),
    )
    page.lines(
        "Tokens in a step",
        "Mean.",
        COUNT,
        Query(mean("ernie_step_tokens", "role, kind"), "{{role}}: {{kind}}"),
    )
    page.lines(
        "Sequences in a step",
        "Mean: the batch.",
        COUNT,
        Query(mean("ernie_step_sequences", "role, kind"), "{{role}}: {{kind}}"),
    )
    page.lines(
        "Sampled tokens, by engine",
        "A second.",
        PER_SECOND,
        Query(rate("ernie_sampled_tokens_total", "worker, role"), "{{worker}} {{role}}"),
        stacked=True,
    )
    page.lines(
        "Between two tokens",
        "Of one choice, as the router hears them.",
        SECONDS,
        *(Query(quantile(share, "ernie_inter_token_seconds"), f"p{share * 100:g}") for share in (0.5, 0.95, 0.99)),
    )
    page.spread("Gaps between tokens", "How many were how long.", SECONDS, "ernie_inter_token_seconds")

    page.row("Before the engines")
    page.lines(
        "Preprocessing",
        "Work on one request.",
        SECONDS,
        *(Query(quantile(share, "ernie_preprocess_seconds"), f"p{share * 100:g}") for share in (0.5, 0.95)),
    )
    page.lines(
        "Vision encoder passes",
        "One pass through the vision tower.",
        SECONDS,
        *(Query(quantile(share, "ernie_encoder_batch_seconds"), f"p{share * 100:g}") for share in (0.5, 0.95)),
    )
    page.lines(
        "Patches in a pass",
        "Mean.",
        COUNT,
        Query(mean("ernie_encoder_batch_patches", "worker"), "{{worker}}"),
    )
    return page
