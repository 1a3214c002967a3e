"""Is it well: what clients get, and whether that is what was promised."""

from __future__ import annotations

from deploy.dashboards.expressions import CALLERS_FAULT, mean, quantile, rate, series
from deploy.dashboards.forms import COUNT, PER_SECOND, SECONDS, SHARE, Page, Query

TTFT, TPOT = "ernie_time_to_first_token_seconds", "ernie_time_per_output_token_seconds"
QUANTILES = (0.5, 0.95, 0.99)
PROMISED = 0.95
"""Share of requests that are to keep to a latency of the SLO."""


def page() -> Page:
    page = Page("overview", "Overview", "What clients get, and whether it is what was promised.", series())

    page.row("Now")
    page.number(
        "Ready",
        "1 while a request could be answered.",
        COUNT,
        Query("min(ernie_ready)"),
        steps=[(1, "green")],
        start="red",
    )
    page.number("Requests active", "Requests that run.", COUNT, Query("sum(ernie_requests_active)"))
    page.number(
        "Requests that failed",
        "Of those that ended, without those whose caller must mend them.",
        SHARE,
        Query(
            f'(sum(rate(ernie_requests_total{{outcome="error", reason!~"{CALLERS_FAULT}"}}[$__rate_interval]))'
            f" or vector(0)) / {rate('ernie_requests_total')}"
        ),
        steps=[(0.01, "yellow"), (0.05, "red")],
    )
    page.number("TTFT, p95", "From arrival to the first token.", SECONDS, Query(quantile(0.95, TTFT)))
    page.number("Time per token, p95", "Mean of a request, p95 of requests.", SECONDS, Query(quantile(0.95, TPOT)))
    page.number(
        "Output tokens", "A second, as they are sampled.", PER_SECOND, Query(rate("ernie_sampled_tokens_total"))
    )

    page.row("Promised and kept")
    page.lines(
        "SLO attainment",
        f"Share of requests that kept to a latency of `slo` in the cluster's description; {PROMISED:.0%} are to (red). "
        "Empty where that names none.",
        SHARE,
        Query(
            'sum by (slo) (rate(ernie_slo_requests_total{met="true"}[$__rate_interval])) / '
            f"{rate('ernie_slo_requests_total', 'slo')}",
            "{{slo}}",
        ),
        top=1.0,
        bound=PROMISED,
    )
    page.lines(
        "Time to the first token",
        "From arrival to the first token.",
        SECONDS,
        *(Query(quantile(share, TTFT), f"p{share * 100:g}") for share in QUANTILES),
        Query('max(ernie_slo_seconds{slo="ttft"})', "SLO"),
    )
    page.lines(
        "Time per output token",
        "Mean time between the tokens of a request.",
        SECONDS,
        *(Query(quantile(share, TPOT), f"p{share * 100:g}") for share in QUANTILES),
        Query('max(ernie_slo_seconds{slo="tpot"})', "SLO"),
    )

    page.row("Work")
    page.lines(
        "Requests that ended",
        "By outcome.",
        PER_SECOND,
        Query(rate("ernie_requests_total", "outcome"), "{{outcome}}"),
        stacked=True,
    )
    page.lines(
        "Tokens",
        "Of requests that ended. Cached ones are part of the prompt's, reasoning ones part of the output's.",
        PER_SECOND,
        *(
            Query(rate(f"ernie_{kind}_tokens_total"), kind)
            for kind in ("prompt", "media", "cached", "output", "reasoning")
        ),
    )
    page.lines(
        "Whole requests",
        "From arrival to the last token, of requests that finished.",
        SECONDS,
        *(Query(quantile(share, "ernie_request_seconds"), f"p{share * 100:g}") for share in QUANTILES),
    )

    page.row("Where the time goes")
    page.lines(
        "What requests waited for",
        "Mean exposed time of a request in each stage: these sum to its whole time.",
        SECONDS,
        Query(mean("ernie_stage_exposed_seconds", "stage"), "{{stage}}"),
        stacked=True,
    )
    page.lines(
        "What parts worked",
        "Mean busy time of a request in each stage, some of it while the request waited for something else.",
        SECONDS,
        Query(mean("ernie_stage_busy_seconds", "stage"), "{{stage}}"),
    )
    page.spread("First tokens", "How many came after how long.", SECONDS, TTFT)

    page.row("Sizes")
    for kind in ("prompt", "output"):
        page.lines(
            f"{kind.capitalize()} tokens of a request",
            "Quantiles over requests.",
            COUNT,
            *(Query(quantile(share, f"ernie_request_{kind}_tokens"), f"p{share * 100:g}") for share in QUANTILES),
            width=12,
        )
    return page
