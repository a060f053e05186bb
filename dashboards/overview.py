"""The one dashboard of cost and latency: what is spent, what it earns, how fast requests are."""

from collections.abc import Sequence

from grafana_foundation_sdk.builders import bargauge, stat, timeseries
from grafana_foundation_sdk.builders import common as common_builders
from grafana_foundation_sdk.builders.dashboard import (
    Dashboard,
    DatasourceVariable,
    QueryVariable,
    Row,
)
from grafana_foundation_sdk.builders.prometheus import Dataquery
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.models import common
from grafana_foundation_sdk.models import dashboard as models

from dashboards.queries import flat_panels, increase, label_values, quantile, rate, series
from expertmesh.telemetry import metrics

DATASOURCE = models.DataSourceRef(type_val="prometheus", uid="${datasource}")
SECONDS_PER_HOUR = 3600

USD = "currencyUSD"
QUANTILES = (0.5, 0.95, 0.99)


def build() -> models.Dashboard:
    board = (
        Dashboard("ExpertMesh: cost and latency")
        .uid("expertmesh-overview")
        .description("Cost, revenue, groups, queue, traffic and latency of all models and pools.")
        .tags(["expertmesh"])
        .editable()
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .time("now-1h", "now")
        .refresh("10s")
        .with_variable(DatasourceVariable("datasource").label("Data source").type("prometheus"))
        .with_variable(_choice("model", "Model"))
        .with_variable(_choice("pool", "Pool"))
    )
    for title, panels in (
        ("Money", _money()),
        ("Groups and queue", _groups()),
        ("Traffic and latency", _traffic()),
        ("Experts", _experts()),
    ):
        board.with_row(Row(title))
        for panel in panels:
            board.with_panel(panel)
    dashboard = board.build()
    for number, placed in enumerate(dashboard.panels or (), start=1):
        placed.id_val = number
    for shown in flat_panels(dashboard):
        for letter, target in zip("ABCDEF", shown.targets, strict=False):
            target.ref_id = letter
    return dashboard


def _choice(label: str, title: str) -> QueryVariable:
    return (
        QueryVariable(label)
        .label(title)
        .datasource(DATASOURCE)
        .query(label_values(metrics.CONTROLLER_GROUPS, label))
        .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(models.VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .current(models.VariableOption(text="All", value="$__all", selected=True))
    )


def _money() -> Sequence[Builder[models.Panel]]:
    out_tokens = f"sum({increase(metrics.GATEWAY_TOKENS, direction='out')})"
    spent = f"sum({increase(metrics.CONTROLLER_SPEND)})"
    earned = f"sum({increase(metrics.GATEWAY_REVENUE)})"
    return (
        _stat("Spend rate now", "Price per hour of the groups held now.", USD)
        .span(6)
        .with_target(_query(f"sum({series(metrics.CONTROLLER_SPEND_RATE)})", "USD per hour")),
        _stat("Spent", "Cost of the capacity held in the time shown.", USD)
        .span(6)
        .with_target(_query(spent, "USD", instant=True)),
        _stat("Tariff revenue", "Tariff price of the usage served in the time shown.", USD)
        .span(6)
        .with_target(_query(earned, "USD", instant=True)),
        _stat(
            "Cost of a million output tokens",
            "All that was spent in the time shown, idle capacity included, for each million tokens "
            "generated.",
            USD,
        )
        .span(6)
        .with_target(
            _query(f"1e6 * {spent} / {out_tokens}", "USD per million tokens", instant=True)
        ),
        _lines("Spend rate by model and pool", "Price per hour of the groups held.", USD)
        .span(8)
        .with_target(
            _query(
                f"sum by (model, pool) ({series(metrics.CONTROLLER_SPEND_RATE)})",
                "{{model}} on {{pool}}",
            )
        ),
        _lines("Spend by model and pool", "Cost of the capacity held in the hour before.", USD)
        .span(8)
        .with_target(
            _query(
                f"sum by (model, pool) ({increase(metrics.CONTROLLER_SPEND, '1h')})",
                "{{model}} on {{pool}}",
            )
        ),
        _lines(
            "Tariff revenue against cost",
            "Per hour, at the rates of the moment. Cost above revenue is idle capacity or a low "
            "tariff.",
            USD,
        )
        .span(8)
        .with_target(
            _query(f"{SECONDS_PER_HOUR} * sum({rate(metrics.GATEWAY_REVENUE)})", "Revenue")
        )
        .with_target(_query(f"{SECONDS_PER_HOUR} * sum({rate(metrics.CONTROLLER_SPEND)})", "Cost")),
    )


def _groups() -> Sequence[Builder[models.Panel]]:
    ready = series(metrics.CONTROLLER_GROUPS, state="ready")
    return (
        _lines("Groups by state", "Expert-parallel groups in each state.", "short")
        .span(8)
        .stacking(common_builders.StackingConfig().mode(common.StackingMode.NORMAL))
        .fill_opacity(30)
        .with_target(_query(f"sum by (state) ({series(metrics.CONTROLLER_GROUPS)})", "{{state}}")),
        _lines(
            "Groups wanted and ready",
            "What the scaling policy wants beside what serves. A gap that stays means that a pool "
            "has no room or that a group does not start.",
            "short",
        )
        .span(8)
        .with_target(
            _query(
                f"sum by (model) ({series(metrics.CONTROLLER_DESIRED_GROUPS)})", "{{model}} wanted"
            )
        )
        .with_target(_query(f"sum by (model) ({ready})", "{{model}} ready")),
        _lines("Queue", "Requests that wait for a group, and requests at a group.", "short")
        .span(8)
        .with_target(
            _query(f"sum by (model) ({series(metrics.GATEWAY_QUEUED)})", "{{model}} queued")
        )
        .with_target(
            _query(f"sum by (model) ({series(metrics.GATEWAY_IN_FLIGHT)})", "{{model}} in flight")
        ),
    )


def _traffic() -> Sequence[Builder[models.Panel]]:
    return (
        _lines("Requests by status", "Requests answered each second, by HTTP status.", "reqps")
        .span(12)
        .with_target(_query(f"sum by (status) ({rate(metrics.GATEWAY_REQUESTS)})", "{{status}}")),
        _lines(
            "Tokens",
            "Tokens each second: in (prompts without their cached part), cached, out (generated).",
            "suffix:tokens/s",
        )
        .span(12)
        .with_target(
            _query(f"sum by (direction) ({rate(metrics.GATEWAY_TOKENS)})", "{{direction}}")
        ),
        _quantiles(
            "Time to first token",
            "Streamed requests: from accepting one to its first body byte, any wait included.",
            metrics.GATEWAY_TTFT,
        ),
        _quantiles(
            "Time per output token",
            "Streamed requests: mean time per token after the first.",
            metrics.GATEWAY_TPOT,
        ),
    )


def _experts() -> Sequence[Builder[models.Panel]]:
    tokens = rate(metrics.EXPERT_TOKENS)
    by_expert = f"sum by (model, group, expert) ({tokens})"
    return (
        _lines(
            "Expert imbalance by group",
            "Tokens of the busiest expert over the mean of all experts: 1 is even, and the number "
            "of experts means that one does all the work.",
            "none",
        )
        .span(12)
        .min(0)
        .with_target(
            _query(
                f"max by (model, group) ({by_expert}) / avg by (model, group) ({by_expert})",
                "{{group}}",
            )
        ),
        bargauge.Panel()
        .title("Tokens by expert")
        .description(
            "Share of the time shown's tokens that each expert was given, all groups together."
        )
        .unit("percentunit")
        .min(0)
        .datasource(DATASOURCE)
        .orientation(common.VizOrientation.VERTICAL)
        .height(8)
        .span(12)
        .with_target(
            _query(
                f"sum by (expert) ({increase(metrics.EXPERT_TOKENS)})"
                f" / scalar(sum({increase(metrics.EXPERT_TOKENS)}))",
                "{{expert}}",
                instant=True,
            )
        ),
    )


def _quantiles(title: str, description: str, metric: metrics.Metric) -> timeseries.Panel:
    panel = _lines(title, description, "s").span(12)
    for share in QUANTILES:
        panel.with_target(_query(quantile(share, metric), f"p{100 * share:.0f}"))
    return panel


def _lines(title: str, description: str, unit: str) -> timeseries.Panel:
    return (
        timeseries.Panel()
        .title(title)
        .description(description)
        .unit(unit)
        .min(0)
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


def _stat(title: str, description: str, unit: str) -> stat.Panel:
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


def _query(expression: str, legend: str, *, instant: bool = False) -> Dataquery:
    query = Dataquery().expr(expression).legend_format(legend)
    return query.instant() if instant else query.range()
