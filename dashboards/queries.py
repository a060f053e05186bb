"""The PromQL of a dashboard: written from the metrics' own names, and read back for tests."""

import re
from dataclasses import dataclass
from typing import Any

from grafana_foundation_sdk.models.dashboard import Dashboard, RowPanel

from expertmesh.telemetry.metrics import Metric

# Labels that the dashboards' variables choose; a metric is filtered by those that it has.
_CHOSEN_LABELS = ("model", "pool")
_LABEL_VALUES = re.compile(r"^label_values\((?P<series>.+),\s*(?P<label>\w+)\)$")


@dataclass(frozen=True, slots=True)
class PanelQuery:
    panel: str
    expression: str


def series(metric: Metric, **labels: str) -> str:
    """Selector of the metric's chosen series; of its buckets, for a histogram.

    A value that begins with `$` is a variable, one that begins with `~` a regular expression.
    """
    name = f"{metric.name}_bucket" if metric.kind == "histogram" else metric.name
    return f"{name}{_matchers(metric, labels)}"


def count(metric: Metric, **labels: str) -> str:
    """Selector of what a histogram has counted."""
    return f"{metric.name}_count{_matchers(metric, labels)}"


def recorded(name: str) -> str:
    """Selector of what a recording rule has made, for the chosen models."""
    return f'{name}{{model=~"$model"}}'


def rate(metric: Metric, **labels: str) -> str:
    return f"rate({series(metric, **labels)}[$__rate_interval])"


def increase(metric: Metric, window: str = "$__range", **labels: str) -> str:
    return f"increase({series(metric, **labels)}[{window}])"


def quantile(share: float, metric: Metric, by: tuple[str, ...] = (), **labels: str) -> str:
    grouped = ", ".join(("le", *by))
    return f"histogram_quantile({share}, sum by ({grouped}) ({rate(metric, **labels)}))"


def label_values(metric: Metric, label: str) -> str:
    if label not in metric.labels:
        raise ValueError(f"{metric.name} has no label {label}")
    return f"label_values({metric.name}, {label})"


def queries(dashboard: Dashboard) -> tuple[str, ...]:
    """Every PromQL expression of the dashboard, with its variables filled in."""
    return tuple(query.expression for query in panel_queries(dashboard))


def panel_queries(
    dashboard: Dashboard, *, rate_interval: str = "1m", window: str = "10m"
) -> tuple[PanelQuery, ...]:
    """As Grafana would send them when every model and pool is chosen; annotations' and variables'
    own ones last."""
    found: list[PanelQuery] = []
    for panel in flat_panels(dashboard):
        for target in panel.targets or ():
            found.append(PanelQuery(str(panel.title), target.expr))
    for annotation in (dashboard.annotations.list_val or ()) if dashboard.annotations else ():
        if annotation.expr:
            found.append(PanelQuery(f"annotation {annotation.name}", annotation.expr))
    filled = {"$__rate_interval": rate_interval, "$__range": window, "$__interval": rate_interval}
    filled |= {f"${name}": ".*" for name in _CHOSEN_LABELS}
    for variable in (dashboard.templating.list_val or ()) if dashboard.templating else ():
        filled.setdefault(f"${variable.name}", ".*")
        match = _LABEL_VALUES.match(variable.query) if isinstance(variable.query, str) else None
        if match:
            expression = f"group by ({match['label']}) ({match['series']})"
            found.append(PanelQuery(f"variable {variable.name}", expression))
    return tuple(PanelQuery(each.panel, _fill(each.expression, filled)) for each in found)


def flat_panels(dashboard: Dashboard) -> tuple[Any, ...]:
    """Every panel that shows something, whether or not it stands inside a row."""
    panels: list[Any] = []
    for panel in dashboard.panels or ():
        if isinstance(panel, RowPanel):
            panels += panel.panels or ()
        else:
            panels.append(panel)
    return tuple(panels)


def _matchers(metric: Metric, labels: dict[str, str]) -> str:
    unknown = labels.keys() - set(metric.labels)
    if unknown:
        raise ValueError(f"{metric.name} has no label {', '.join(sorted(unknown))}")
    chosen = [name for name in _CHOSEN_LABELS if name in metric.labels and name not in labels]
    matchers = [f'{name}=~"${name}"' for name in chosen]
    for name, value in labels.items():
        sign = "=~" if value[:1] in ("$", "~") else "="
        matchers.append(f'{name}{sign}"{value.removeprefix("~")}"')
    return f"{{{', '.join(matchers)}}}" if matchers else ""


def _fill(expression: str, values: dict[str, str]) -> str:
    for name, value in values.items():
        expression = re.sub(re.escape(name) + r"\b", value, expression)
    if "$" in expression:
        raise ValueError(f"{expression}: holds a variable that queries() does not know")
    return expression
