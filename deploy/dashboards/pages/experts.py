"""Engines of several ranks: how evenly their experts are used, and what the ranks wait for."""

from __future__ import annotations

from deploy.dashboards.expressions import rate, series
from deploy.dashboards.forms import COUNT, PER_SECOND, SECONDS, SHARE, Page, Query

SKEWED = 1.5


def page() -> Page:
    page = Page(
        "experts",
        "Experts",
        "Engines of several ranks (expert_parallel over 1): how evenly the experts of each bank are used, and what "
        "ranks wait for. Without such engines this page is empty.",
        series(),
    )
    page.row("Balance")
    for bank in ("text", "vision"):
        page.lines(
            f"Skew of the {bank} experts",
            "Rows of the busiest rank over the mean of ranks. 1 is even.",
            COUNT,
            Query(f'max by (worker, role) (ernie_expert_load_skew{{bank="{bank}"}})', "{{worker}} {{role}}"),
            bound=SKEWED,
        )
    page.lines(
        "Experts that changed ranks",
        "For the sake of balance, of all layers.",
        PER_SECOND,
        Query(rate("ernie_experts_moved_total", "worker"), "{{worker}}"),
    )
    page.lines(
        "Rebalances",
        "Times experts changed ranks.",
        PER_SECOND,
        Query(rate("ernie_expert_rebalances_total", "worker"), "{{worker}}"),
    )

    page.row("Steps of a group")
    page.lines(
        "Ranks",
        "Of each engine.",
        COUNT,
        Query("max by (worker, role) (ernie_engine_ranks)", "{{worker}} {{role}}"),
    )
    page.lines(
        "Steps",
        "The ranks took together.",
        PER_SECOND,
        Query(rate("ernie_group_steps_total", "worker, role"), "{{worker}} {{role}}"),
    )
    page.lines(
        "A step, by part",
        "Mean: sending the plan, the leader's own part, waiting for the others' results, moving experts.",
        SECONDS,
        Query(
            f"{rate('ernie_group_step_seconds_total', 'part')} / on () group_left {rate('ernie_group_steps_total')}",
            "{{part}}",
        ),
        stacked=True,
    )
    page.lines(
        "Share of steps spent waiting for other ranks",
        "Of the leader, by engine.",
        SHARE,
        Query(
            'sum by (worker) (rate(ernie_group_step_seconds_total{part="gather"}[$__rate_interval])) / '
            f"{rate('ernie_group_step_seconds_total', 'worker')}",
            "{{worker}}",
        ),
        top=1.0,
    )
    return page
