"""What went wrong, and what the cluster did about it."""

from __future__ import annotations

from deploy.dashboards.expressions import rate, series
from deploy.dashboards.forms import COUNT, PER_SECOND, SECONDS, Page, Query


def page() -> Page:
    page = Page(
        "errors",
        "Errors",
        "What went wrong, and what the cluster did about it. A panel without data: it has not happened.",
        series(),
    )
    page.row("What clients saw")
    page.lines(
        "Errors",
        "Requests that were admitted and failed, by reason.",
        PER_SECOND,
        Query('sum by (reason) (rate(ernie_requests_total{outcome="error"}[$__rate_interval]))', "{{reason}}"),
        stacked=True,
    )
    page.lines(
        "Refusals",
        "Requests that were not admitted, by reason. QUEUE_FULL: the router's bound on active requests.",
        PER_SECOND,
        Query(rate("ernie_requests_refused_total", "reason"), "{{reason}}"),
        stacked=True,
    )
    page.lines(
        "Cancelled",
        "By the client, which left or said so.",
        PER_SECOND,
        Query('sum(rate(ernie_requests_total{outcome="cancelled"}[$__rate_interval]))', "cancelled"),
    )

    page.row("What clients did not see")
    page.lines(
        "Work done again",
        "Because a part was lost or gave it back, by stage.",
        PER_SECOND,
        Query(rate("ernie_request_retries_total", "stage, reason"), "{{stage}}: {{reason}}"),
        stacked=True,
    )
    page.lines(
        "Retry budget",
        "Retries at hand; below zero while some wait.",
        COUNT,
        Query("min(ernie_retry_budget)", "at hand"),
        signed=True,
    )
    page.lines(
        "Suspects",
        "Choices under which an engine died and that are not cleared yet.",
        COUNT,
        Query("sum(ernie_suspects)", "choices"),
    )

    page.row("Parts")
    page.lines(
        "Lost",
        "Workers whose lease ran out, since the planner started.",
        COUNT,
        Query('sum by (pool) (ernie_fleet_changes_total{change="lost"})', "{{pool}}"),
    )
    page.lines(
        "Silent",
        "Parts that did not tell their metrics in time.",
        COUNT,
        Query("count by (pool) (ernie_part_up == 0) or 0 * count by (pool) (ernie_part_up)", "{{pool}}"),
    )
    page.lines(
        "Asking for metrics",
        "What it took the router to ask all parts.",
        SECONDS,
        Query("max(ernie_scrape_seconds)", "seconds"),
    )
    page.lines(
        "Planner",
        "Its term: grows with every planner that follows another.",
        COUNT,
        Query("max(ernie_planner_term)", "term"),
    )
    page.lines(
        "KV transfers",
        "Given up, and chunks that did not arrive as they were sent.",
        PER_SECOND,
        Query(rate("ernie_kv_transfer_failures_total", "worker"), "{{worker}} given up"),
        Query(rate("ernie_kv_transfer_nacks_total", "worker"), "{{worker}} chunks refused"),
    )
    page.lines(
        "Leases",
        "The router keeps at preprocessors and vision encoders; parts hold units under theirs.",
        COUNT,
        Query("sum(ernie_leases)", "of the router"),
        Query("sum by (pool) (ernie_media_leases)", "in {{pool}}"),
    )
    return page
