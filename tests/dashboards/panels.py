"""What the dashboards and the alerts ask, read from the files that Grafana and Prometheus read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).resolve().parents[2] / "deploy" / "dashboards"
FILES = sorted(FOLDER.glob("*.json"))
ALERTS = FOLDER / "alerts.yaml"


@dataclass(frozen=True)
class Asked:
    """A query of a panel or an annotation. ``shown``: what of the result's labels is shown."""

    page: str
    title: str
    expr: str
    shown: str

    def __str__(self) -> str:
        return f"{self.page} / {self.title} / {self.shown}"


def read(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def panels(page: dict[str, Any]) -> list[dict[str, Any]]:
    """Those with queries, without the headings of rows."""
    return [panel for panel in page["panels"] if panel["type"] != "row"]


def asked_by_panels() -> Iterator[Asked]:
    for file in FILES:
        for panel in panels(read(file)):
            for target in panel["targets"]:
                yield Asked(file.stem, panel["title"], target["expr"], target["legendFormat"])


def asked_by_annotations() -> Iterator[Asked]:
    for file in FILES:
        for annotation in read(file)["annotations"].get("list", ()):
            shown = f"{annotation['titleFormat']} {annotation['textFormat']}"
            yield Asked(file.stem, annotation["name"], annotation["expr"], shown)


def alerts() -> list[dict[str, Any]]:
    groups = yaml.safe_load(ALERTS.read_text(encoding="utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]
