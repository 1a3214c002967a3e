"""The dashboards are what the code makes of them, and Grafana, Prometheus and Alertmanager can read what lies there."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

from deploy.dashboards import generate, promql
from deploy.dashboards.expressions import CALLERS_FAULT, series
from tests.dashboards.panels import ALERTS, FILES, FOLDER, Asked, alerts, asked_by_annotations, asked_by_panels, read
from tests.dashboards.panels import panels as panels_of
from tests.prometheus import promtool

GUIDE = FOLDER.parent / "README.md"
ALERTS_TEST = Path(__file__).parent / "alerts_test.yaml"
WIDTH = 24


def ids(value: Any) -> str:
    return value.stem if isinstance(value, Path) else str(value)


def test_the_files_are_what_the_code_makes(capsys: pytest.CaptureFixture[str]) -> None:
    assert generate.check() == 0, capsys.readouterr().out


@pytest.mark.parametrize("asked", [*asked_by_panels(), *asked_by_annotations()], ids=ids)
def test_a_panel_asks_for_series_there_are(asked: Asked) -> None:
    labels = promql.labels(asked.expr, series())
    assert promql.legend_labels(asked.shown) <= labels
    ours = {name for name in promql.reads(asked.expr) if name.startswith("ernie_")}
    assert asked.expr.count('{job="$job"') == len(re.findall(rf"\b(?:{'|'.join(ours)})\b", asked.expr))


@pytest.mark.parametrize("file", FILES, ids=ids)
def test_grafana_can_lay_it_out(file: Path) -> None:
    page = read(file)
    assert page["uid"] == f"ernie-{file.stem}" and page["schemaVersion"] >= 42
    numbers = [panel["id"] for panel in page["panels"]]
    assert len(set(numbers)) == len(numbers)
    variables = {variable["name"]: variable for variable in page["templating"]["list"]}
    assert next(iter(variables)) == "datasource" and variables["datasource"]["type"] == "datasource"
    used = set(re.findall(r"\$\{?(\w+)", json.dumps([page["panels"], page["annotations"]])))
    assert {name for name in used if not name.startswith("__")} == variables.keys()
    for panel in panels_of(page):
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert panel["title"] and panel["description"].endswith("."), panel["title"]
        assert [target["refId"] for target in panel["targets"]] == [*"ABCDEFGH"[: len(panel["targets"])]]
    places = [panel["gridPos"] for panel in page["panels"]]
    assert all(0 <= place["x"] and place["x"] + place["w"] <= WIDTH for place in places)
    for one, other in itertools.combinations(places, 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        below = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or below, (one, other)


@pytest.mark.parametrize("file", FILES, ids=ids)
def test_the_library_reads_back_what_it_wrote(file: Path) -> None:
    register_default_plugins()
    encoded = JSONEncoder(sort_keys=True, indent=2).encode(Dashboard.from_json(read(file)))
    assert json.loads(encoded) == read(file)


@pytest.mark.parametrize("alert", alerts(), ids=lambda alert: alert["alert"])
def test_an_alert_asks_for_series_there_are_and_says_what_to_do(alert: dict[str, Any]) -> None:
    labels = promql.labels(alert["expr"], series())
    assert promql.legend_labels(alert["annotations"]["summary"]) <= labels
    assert "job" in labels, "it must say which cluster"
    assert alert["labels"]["severity"] in ("critical", "warning", "info")
    path, _, anchor = alert["annotations"]["runbook"].partition("#")
    assert path == "deploy/README.md"
    (row,) = re.findall(rf'^\| <a id="{anchor}"></a>.*$', GUIDE.read_text(encoding="utf-8"), re.MULTILINE)
    assert f"`{alert['alert']}`" in row


def test_the_guide_knows_no_other_alerts() -> None:
    named = re.findall(r"`(Ernie\w+)`", GUIDE.read_text(encoding="utf-8"))
    assert sorted(named) == sorted(alert["alert"] for alert in alerts())


def test_dashboards_and_alerts_agree_on_whose_fault_an_error_is() -> None:
    (alert,) = (alert for alert in alerts() if alert["alert"] == "ErnieRequestsFail")
    (panel,) = (asked for asked in asked_by_panels() if asked.title == "Requests that failed")
    assert f'reason!~"{CALLERS_FAULT}"' in alert["expr"] and f'reason!~"{CALLERS_FAULT}"' in panel.expr


def test_promtool_takes_the_rules_and_the_scrapes() -> None:
    promtool("check", "rules", ALERTS)
    promtool("check", "config", FOLDER / "prometheus.yml")


def test_alerts_fire_when_they_should_and_not_else() -> None:
    promtool("test", "rules", ALERTS_TEST)
    tested = {
        case["alertname"]
        for test in yaml.safe_load(ALERTS_TEST.read_text())["tests"]
        for case in test["alert_rule_test"]
        if case.get("exp_alerts")
    }
    assert tested == {alert["alert"] for alert in alerts()}


def test_provisioning_names_what_is_there() -> None:
    (source,) = yaml.safe_load((FOLDER / "provisioning/datasources/prometheus.yaml").read_text())["datasources"]
    scrapes = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    assert source["type"] == "prometheus" and source["jsonData"]["timeInterval"] == scrapes["global"]["scrape_interval"]
    (provider,) = yaml.safe_load((FOLDER / "provisioning/dashboards/ernie.yaml").read_text())["providers"]
    assert provider["type"] == "file" and provider["options"]["path"].endswith("deploy/dashboards")
