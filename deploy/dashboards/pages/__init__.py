"""The dashboards, one module each."""

from __future__ import annotations

from deploy.dashboards.forms import Page
from deploy.dashboards.pages import engines, errors, experts, kv, overview, pools


def all_pages() -> list[Page]:
    return [module.page() for module in (overview, pools, engines, kv, experts, errors)]
