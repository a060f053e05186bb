"""What the dashboards are made of: boards with their variables and links, and kinds of panels."""

from collections.abc import Sequence
from typing import Any, Final

from grafana_foundation_sdk.builders import bargauge, stat, timeseries
from grafana_foundation_sdk.builders import common as common_builders
from grafana_foundation_sdk.builders.dashboard import (
    Dashboard,
    DashboardLink,
    DatasourceVariable,
    QueryVariable,
    Row,
    ThresholdsConfig,
)
from grafana_foundation_sdk.builders.prometheus import Dataquery
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.models import common
from grafana_foundation_sdk.models import dashboard as models

from dashboards.queries import flat_panels, label_values, quantile
from expertmesh.telemetry import metrics
from expertmesh.telemetry.metrics import Metric

TAG: Final = "expertmesh"
DATASOURCE: Final = models.DataSourceRef(type_val="prometheus", uid="${datasource}")
USD: Final = "currencyUSD"
QUANTILES: Final = (0.5, 0.95, 0.99)
SECONDS_PER_HOUR: Final = 3600
GREEN: Final = "green"
YELLOW: Final = "yellow"
RED: Final = "red"

Panels = Sequence[Builder[models.Panel]]
Rows = Sequence[tuple[str, Panels]]


class DecisionsAnnotation(models.AnnotationQuery):
    """With the texts that the library does not know."""

    def to_json(self) -> dict[str, object]:
        return {
            **super().to_json(),
            "titleFormat": "{{action}}: {{model}}",
            "textFormat": "bound by {{binding}}; expertmesh explain says more",
            "tagKeys": "model,action,binding",
            "step": "30s",
        }


def board(title: str, uid: str, description: str, window: str = "now-1h") -> Dashboard:
    """With the variables that all have; the rest is up to its maker."""
    return (
        Dashboard(f"ExpertMesh: {title}")
        .uid(f"expertmesh-{uid}")
        .description(description)
        .tags([TAG])
        .editable()
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .time(window, "now")
        .refresh("10s")
        .link(
            DashboardLink("ExpertMesh")
            .type(models.DashboardLinkType.DASHBOARDS)
            .tags([TAG])
            .as_dropdown(True)
            .include_vars(True)
            .keep_time(True)
        )
        .with_variable(DatasourceVariable("datasource").label("Data source").type("prometheus"))
        .with_variable(choice("model", "Model", metrics.CONTROLLER_GROUPS))
        .with_variable(choice("pool", "Pool", metrics.CONTROLLER_GROUPS))
    )


def finished(made: Dashboard, rows: Rows) -> models.Dashboard:
    for title, panels in rows:
        made.with_row(Row(title))
        for panel in panels:
            made.with_panel(panel)
    dashboard = made.build()
    for number, placed in enumerate(dashboard.panels or (), start=1):
        placed.id_val = number
    for shown in flat_panels(dashboard):
        for letter, target in zip("ABCDEFGHIJ", shown.targets, strict=False):
            target.ref_id = letter
    return dashboard


def choice(label: str, title: str, metric: Metric) -> QueryVariable:
    return (
        QueryVariable(label)
        .label(title)
        .datasource(DATASOURCE)
        .query(label_values(metric, label))
        .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(models.VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .current(models.VariableOption(text="All", value="$__all", selected=True))
    )


def lines(title: str, description: str, unit: str, *, signed: bool = False) -> timeseries.Panel:
    """From zero on, unless its values are `signed`."""
    panel = (
        timeseries.Panel()
        .title(title)
        .description(description)
        .unit(unit)
        .datasource(DATASOURCE)
        .height(8)
        .fill_opacity(5)
        .show_points(common.VisibilityMode.NEVER)
        .tooltip(common_builders.VizTooltipOptions().mode(common.TooltipDisplayMode.MULTI))
        .legend(
            common_builders.VizLegendOptions()
            .show_legend(True)
            .display_mode(common.LegendDisplayMode.LIST)
            .placement(common.LegendPlacement.BOTTOM)
        )
    )
    return panel if signed else panel.min(0)


def stacked(panel: timeseries.Panel) -> timeseries.Panel:
    return panel.stacking(
        common_builders.StackingConfig().mode(common.StackingMode.NORMAL)
    ).fill_opacity(30)


def number(title: str, description: str, unit: str) -> stat.Panel:
    return (
        stat.Panel()
        .title(title)
        .description(description)
        .unit(unit)
        .decimals(2)
        .datasource(DATASOURCE)
        .height(4)
        .color_mode(common.BigValueColorMode.VALUE)
        .reduce_options(common_builders.ReduceDataOptions().calcs(["lastNotNull"]))
    )


def bars(title: str, description: str, unit: str) -> bargauge.Panel:
    return (
        bargauge.Panel()
        .title(title)
        .description(description)
        .unit(unit)
        .min(0)
        .datasource(DATASOURCE)
        .height(8)
        .orientation(common.VizOrientation.HORIZONTAL)
        .display_mode(common.BarGaugeDisplayMode.BASIC)
    )


def latency(
    title: str, description: str, metric: Metric, by: tuple[str, ...] = (), **labels: str
) -> timeseries.Panel:
    """Its quantiles; the examples of traces lie over them."""
    panel = lines(title, description, "s").span(12)
    suffix = "".join(f" {{{{{label}}}}}" for label in by)
    for share in QUANTILES:
        target = query(quantile(share, metric, by, **labels), f"p{100 * share:.0f}{suffix}")
        panel.with_target(target.exemplar(True) if share == QUANTILES[-1] else target)
    return panel


def thresholds(*steps: tuple[float | None, str]) -> ThresholdsConfig:
    """Pairs of a value and the colour from there on; the first value is None."""
    return (
        ThresholdsConfig()
        .mode(models.ThresholdsMode.ABSOLUTE)
        .steps([models.Threshold(value=value, color=colour) for value, colour in steps])
    )


def query(expression: str, legend: str, *, instant: bool = False) -> Dataquery:
    made = Dataquery().expr(expression).legend_format(legend)
    return made.instant() if instant else made.range()


def decisions(expression: str) -> Any:
    """Decisions as marks on every panel of a board."""

    class _Builder(Builder[models.AnnotationQuery]):
        def build(self) -> models.AnnotationQuery:
            return DecisionsAnnotation(
                name="Decisions", datasource=DATASOURCE, icon_color="blue", expr=expression
            )

    return _Builder()
