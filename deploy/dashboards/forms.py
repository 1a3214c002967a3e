"""One dashboard in our form: rows of panels, whose queries are held to the table of metrics as they are written."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from grafana_foundation_sdk.builders import common as common_forms
from grafana_foundation_sdk.builders import dashboard, heatmap, prometheus, stat, statetimeline, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common, units
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models import heatmap as heatmap_models
from grafana_foundation_sdk.models import prometheus as prometheus_models

from deploy.dashboards import promql

TAG = "ernie-serving"
HEIGHT = 8
SOURCE = common.DataSourceRef(type_val="prometheus", uid="${datasource}")

SECONDS = units.Seconds
BYTES = units.BytesIEC
BYTES_PER_SECOND = units.BytesPerSecondIEC
SHARE = units.PercentUnit
COUNT = units.Short
PER_SECOND = units.CountsPerSecond

KNOWN_BY = "ernie_requests_active"
"""A series that every cluster has, to find out which clusters there are."""

Panel = timeseries.Panel | stat.Panel | heatmap.Panel | statetimeline.Panel


@dataclass(frozen=True)
class Query:
    """``expr`` reads our series without ``job``, which the page adds; ``legend`` shows labels as ``{{pool}}``."""

    expr: str
    legend: str = ""


def of_job(expr: str) -> str:
    """The expression with each of our series narrowed to the cluster that is chosen on the page."""
    return re.sub(r"\b(ernie_\w+)(\{?)", lambda m: f'{m[1]}{{job="$job"' + (", " if m[2] else "}"), expr)


class Page:
    """Builds one dashboard. ``series``: all there are, with their labels."""

    def __init__(self, name: str, title: str, description: str, series: promql.Series) -> None:
        self.name = name
        self._series = series
        self._panels = 0
        self._dashboard = (
            dashboard.Dashboard(f"ernie-serving / {title}")
            .uid(f"ernie-{name}")
            .description(description)
            .tags([TAG])
            .refresh("10s")
            .time("now-30m", "now")
            .timezone(common.TimeZoneBrowser)
            .tooltip(models.DashboardCursorSync.CROSSHAIR)
            .editable()
            .with_variable(dashboard.DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
            .with_variable(
                dashboard.QueryVariable("job")
                .label("Cluster")
                .datasource(SOURCE)
                .query(f"label_values({KNOWN_BY}, job)")
                .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
            )
            .link(
                dashboard.DashboardLink("ernie-serving")
                .type(models.DashboardLinkType.DASHBOARDS)
                .tags([TAG])
                .as_dropdown(True)
                .include_vars(True)
                .keep_time(True)
            )
        )

    def row(self, title: str) -> Self:
        """What follows stands below this heading."""
        self._panels += 1
        self._dashboard.with_row(dashboard.Row(title).id(self._panels))
        return self

    def lines(
        self,
        title: str,
        meaning: str,
        unit: str,
        *queries: Query,
        stacked: bool = False,
        top: float | None = None,
        bound: float | None = None,
        signed: bool = False,
        width: int = 8,
    ) -> Self:
        """Values over time. ``top``: where the axis ends; it begins at 0 unless ``signed``. ``bound``: a red line."""
        panel = (
            timeseries.Panel()
            .unit(unit)
            .fill_opacity(30 if stacked else 8)
            .line_width(1)
            .show_points(common.VisibilityMode.NEVER)
            .legend(
                common_forms.VizLegendOptions()
                .display_mode(common.LegendDisplayMode.TABLE)
                .placement(common.LegendPlacement.BOTTOM)
                .calcs(["lastNotNull", "max"])
                .show_legend(True)
            )
            .tooltip(
                common_forms.VizTooltipOptions().mode(common.TooltipDisplayMode.MULTI).sort(common.SortOrder.DESCENDING)
            )
        )
        if not signed:
            panel.min(0)
        if stacked:
            panel.stacking(common_forms.StackingConfig().mode(common.StackingMode.NORMAL))
        if top is not None:
            panel.max(top)
        if bound is not None:
            panel.thresholds(_thresholds([(bound, "red")]))
            panel.thresholds_style(
                common_forms.GraphThresholdsStyleConfig().mode(common.GraphThresholdsStyleMode.DASHED)
            )
        return self._add(panel, title, meaning, queries, width=width, height=HEIGHT)

    def number(
        self,
        title: str,
        meaning: str,
        unit: str,
        query: Query,
        *,
        steps: Sequence[tuple[float, str]] = (),
        start: str = "green",
        width: int = 4,
    ) -> Self:
        """The newest value, coloured by the highest step it reaches."""
        panel = (
            stat.Panel()
            .unit(unit)
            .color_mode(common.BigValueColorMode.VALUE)
            .graph_mode(common.BigValueGraphMode.AREA)
            .reduce_options(common_forms.ReduceDataOptions().calcs(["lastNotNull"]))
            .thresholds(_thresholds(steps, start))
        )
        return self._add(panel, title, meaning, (query,), width=width, height=4)

    def spread(self, title: str, meaning: str, unit: str, histogram: str, *, width: int = 8) -> Self:
        """How often which value of a histogram occurred, over time."""
        panel = (
            heatmap.Panel()
            .calculate(False)
            .y_axis(heatmap.YAxisConfig().unit(unit))
            .color(
                heatmap.HeatmapColorOptions()
                .mode(heatmap_models.HeatmapColorMode.SCHEME)
                .scheme("Spectral")
                .steps(64)
                .exponent(0.5)
            )
            .cell_gap(1)
        )
        query = Query(f"sum by (le) (increase({histogram}_bucket[$__rate_interval]))", "{{le}}")
        return self._add(panel, title, meaning, (query,), width=width, height=HEIGHT, heat=True)

    def states(
        self, title: str, meaning: str, query: Query, values: Mapping[str, tuple[str, str]], *, width: int = 12
    ) -> Self:
        """What something was over time; ``values``: text and colour of each."""
        panel = (
            statetimeline.Panel()
            .mappings(
                [
                    models.ValueMap(
                        options={
                            value: models.ValueMappingResult(text=text, color=color, index=index)
                            for index, (value, (text, color)) in enumerate(values.items())
                        }
                    )
                ]
            )
            .color_scheme(dashboard.FieldColor().mode(models.FieldColorModeId.THRESHOLDS))
            .show_value(common.VisibilityMode.NEVER)
            .row_height(0.8)
        )
        return self._add(panel, title, meaning, (query,), width=width, height=HEIGHT)

    def annotate(self, name: str, expr: str, color: str, *, title: str, text: str) -> Self:
        """Marks on all panels wherever the expression has a value."""
        expr = self._held(expr, title + text)
        self._dashboard.annotation(
            dashboard.AnnotationQuery()
            .name(name)
            .datasource(SOURCE)
            .enable(True)
            .icon_color(color)
            .expr(expr)
            .title_format(title)
            .text_format(text)
        )
        return self

    def text(self) -> str:
        """The JSON that Grafana reads."""
        return JSONEncoder(sort_keys=True, indent=2).encode(self._dashboard.build()) + "\n"

    def _add(
        self,
        panel: Panel,
        title: str,
        meaning: str,
        queries: Sequence[Query],
        *,
        width: int,
        height: int,
        heat: bool = False,
    ) -> Self:
        self._panels += 1
        panel.id(self._panels).title(title).description(meaning).datasource(SOURCE).span(width).height(height)
        for index, query in enumerate(queries):
            target = (
                prometheus.Dataquery()
                .expr(self._held(query.expr, query.legend))
                .legend_format(query.legend)
                .ref_id(chr(ord("A") + index))
                .datasource(SOURCE)
            )
            if heat:
                target.format(prometheus_models.PromQueryFormat.HEATMAP)
            panel.with_target(target)
        self._dashboard.with_panel(panel)
        return self

    def _held(self, expr: str, shown: str) -> str:
        """The expression for one cluster. Raises ValueError for what no series has."""
        whole = of_job(expr)
        try:
            found = promql.labels(whole, self._series)
        except ValueError as error:
            raise ValueError(f"{self.name}: {expr}: {error}") from None
        if missing := sorted(promql.legend_labels(shown) - found):
            raise ValueError(f"{self.name}: {expr}: its result has no label {', '.join(missing)}")
        return whole


def _thresholds(steps: Sequence[tuple[float, str]], start: str = "green") -> Any:
    return (
        dashboard.ThresholdsConfig()
        .mode(models.ThresholdsMode.ABSOLUTE)
        .steps([models.Threshold(value=None, color=start), *(models.Threshold(value=v, color=c) for v, c in steps)])
    )
