"""What the controller sees, expects, decides and is kept from; decisions mark all panels."""

from grafana_foundation_sdk.models import dashboard as models

from dashboards.panels import (
    QUANTILES,
    Panels,
    board,
    choice,
    decisions,
    finished,
    lines,
    number,
    query,
    stacked,
)
from dashboards.queries import count, increase, quantile, series
from expertmesh.telemetry import metrics


def build() -> models.Dashboard:
    made = (
        board(
            "autoscaler",
            "autoscaler",
            "Demand, capacity, queue, decisions and what binds them, forecasts and starts.",
        )
        .with_variable(choice("binding", "Bound by", metrics.CONTROLLER_DECISIONS))
        .annotation(
            decisions(
                "sum by (model, action, binding)"
                f" (increase({series(metrics.CONTROLLER_DECISIONS, binding='$binding')}"
                "[$__interval])) > 0"
            )
        )
    )
    return finished(
        made,
        (
            ("Demand and capacity", _demand()),
            ("Decisions", _decisions()),
            ("Hindsight", _hindsight()),
            ("Forecast and starts", _forecast()),
            ("Controller", _controller()),
        ),
    )


def _demand() -> Panels:
    load = metrics.CONTROLLER_LOAD
    now, ready = series(load, part="now"), series(load, part="ready")
    panel = lines(
        "Load and capacity",
        "In units of what one group of the model's first option can do: the load of now, what is "
        "needed with the margin and the queue, what the ready groups can do and what those that "
        "are coming will.",
        "none",
    ).span(12)
    for part in ("now", "needed", "ready", "coming"):
        panel.with_target(
            query(f"sum by (model) ({series(load, part=part)})", f"{{{{model}}}} {part}")
        )
    return (
        panel,
        lines(
            "Queue and wait",
            "Requests that wait over all gateways, and the wait that is predicted for the next one "
            "in seconds; a gap means that the groups fall behind.",
            "short",
        )
        .span(12)
        .with_target(
            query(f"sum by (model) ({series(metrics.CONTROLLER_QUEUED)})", "{{model}} queued")
        )
        .with_target(
            query(f"sum by (model) ({series(metrics.CONTROLLER_DEMAND)})", "{{model}} with running")
        )
        .with_target(
            query(
                f"max by (model) ({series(metrics.CONTROLLER_PREDICTED_WAIT)} < Inf)",
                "{{model}} predicted wait, s",
            )
        ),
        lines(
            "Capacity above the load",
            "Groups that were ready beyond the load: spare on purpose, or held while starting "
            "again would take longer.",
            "none",
        )
        .span(12)
        .with_target(
            query(f"sum by (model) (clamp_min({ready} - ignoring (part) {now}, 0))", "{{model}}")
        ),
        lines(
            "Load above the capacity",
            "Groups that were missing at that moment.",
            "none",
        )
        .span(12)
        .with_target(
            query(f"sum by (model) (clamp_min({now} - ignoring (part) {ready}, 0))", "{{model}}")
        ),
    )


def _decisions() -> Panels:
    return (
        lines("Groups wanted by option", "The controller's target: pool and size.", "short")
        .span(8)
        .with_target(
            query(
                f"sum by (model, option) ({series(metrics.CONTROLLER_TARGET)})",
                "{{model}} {{option}}",
            )
        ),
        lines("Groups needed, wanted and ready", "Of each model, over all pools.", "short")
        .span(8)
        .with_target(
            query(f"sum by (model) ({series(metrics.CONTROLLER_NEED)})", "{{model}} needed")
        )
        .with_target(
            query(
                f"sum by (model) ({series(metrics.CONTROLLER_DESIRED_GROUPS)})", "{{model}} wanted"
            )
        )
        .with_target(
            query(
                f"sum by (model) ({series(metrics.CONTROLLER_GROUPS, state='ready')})",
                "{{model}} ready",
            )
        ),
        stacked(
            lines(
                "What binds",
                "What keeps the number of groups from being another one; load means that nothing "
                "does but the load itself.",
                "short",
            )
        )
        .span(8)
        .with_target(
            query(f"sum by (binding) ({series(metrics.CONTROLLER_BINDING)})", "{{binding}}")
        ),
        lines("Actions", "Decided on in the time shown, by what bound then.", "short")
        .span(12)
        .with_target(
            query(
                "sum by (model, action, binding)"
                f" ({increase(metrics.CONTROLLER_DECISIONS, binding='$binding')})",
                "{{model}} {{action}} ({{binding}})",
            )
        ),
        lines(
            "Advice",
            "What it would do for models whose mode is advise.",
            "short",
        )
        .span(12)
        .with_target(
            query(
                f"sum by (model, action) ({series(metrics.CONTROLLER_ADVICE)})",
                "{{model}} {{action}}",
            )
        ),
    )


def _hindsight() -> Panels:
    def usd(part: str) -> str:
        return f"max by (model) ({series(metrics.CONTROLLER_HINDSIGHT, part=part)})"

    spent, least = usd("spent"), usd("least")
    span = f"max by (model) ({series(metrics.CONTROLLER_HINDSIGHT_SPAN)})"
    ends = f"max by (model) ({series(metrics.CONTROLLER_HINDSIGHT_TIME)})"
    load_errors = lines(
        "Load less the one expected",
        "When a group asked for then could have been ready, of the last hour's decisions: below "
        "zero too much was expected. Recomputed hourly; only where load is measured in tokens.",
        "none",
        signed=True,
    ).span(6)
    wait_errors = lines(
        "Oldest wait less the one predicted",
        "Of the last hour's decisions that predicted one; recomputed hourly.",
        "s",
        signed=True,
    ).span(6)
    for share in ("0.1", "0.5", "0.9"):
        legend = f"{{{{model}}}} p{100 * float(share):.0f}"
        load_errors.with_target(
            query(
                f"max by (model) ({series(metrics.CONTROLLER_LOAD_ERROR, quantile=share)})",
                legend,
            )
        )
        wait_errors.with_target(
            query(
                f"max by (model) ({series(metrics.CONTROLLER_WAIT_ERROR, quantile=share)})",
                legend,
            )
        )
    return (
        number(
            "Regret",
            "Share of what groups have cost over the last day, or since the ledger began, that one "
            "who knew all requests in advance would not have paid for the same work. It holds "
            "nothing in hand for the unforeseen, so zero is out of reach. Recomputed hourly from "
            "the ledger: groups only, at the prices and learned rates of now.",
            "percentunit",
        )
        .height(8)
        .span(4)
        .with_target(query(f"1 - sum({least}) / (sum({spent}) > 0)", "of the cost")),
        lines(
            "Spent, and the least in hindsight",
            "Cost of the groups over the last day, and of the cheapest sequence of fleets that "
            "serves the same requests minute by minute, within the manifest's bounds, each start "
            "paid for: by dynamic programming.",
            "currencyUSD",
        )
        .span(8)
        .with_target(query(spent, "{{model}} spent"))
        .with_target(query(least, "{{model}} least")),
        lines(
            "Spent over the least",
            "1 is as cheap as one who knew the future; less means that groups did more than their "
            "learned rates say, or that fewer ran than the manifest wants. A model that stood idle "
            "all day has none.",
            "none",
        )
        .span(8)
        .with_target(query(f"{spent} / ({least} > 0)", "{{model}}")),
        lines(
            "Time looked at, and its age",
            "A day at most; less where the ledger is younger. The age grows until the next look.",
            "s",
        )
        .span(4)
        .with_target(query(span, "{{model}} looked at"))
        .with_target(query(f"time() - {ends}", "{{model}} ended")),
        load_errors,
        lines(
            "Load within what was kept ready",
            "Share of the last hour's loads that the expected one and its spare carried, beside "
            "the attainment that the manifest asks for.",
            "percentunit",
        )
        .max(1)
        .span(6)
        .with_target(
            query(f"max by (model) ({series(metrics.CONTROLLER_WITHIN_SPARE)})", "{{model}}")
        )
        .with_target(
            query(f"max by (model) ({series(metrics.CONTROLLER_SLO)})", "{{model}} asked for")
        ),
        wait_errors,
        lines(
            "Starts over what was expected",
            "Median time of the last hour's starts over the time expected of them; 1 is as "
            "expected. Recomputed hourly.",
            "none",
        )
        .span(6)
        .with_target(
            query(
                f"max by (model, option) ({series(metrics.CONTROLLER_START_ERROR)})",
                "{{model}} {{option}}",
            )
        ),
    )


def _forecast() -> Panels:
    errors = lines(
        "Forecast error",
        "Distance between the load and what had been forecast for it, in groups.",
        "none",
    ).span(8)
    for share in QUANTILES[:2]:
        errors.with_target(
            query(
                quantile(share, metrics.CONTROLLER_FORECAST_ERROR, ("model",)),
                f"{{{{model}}}} p{100 * share:.0f}",
            )
        )
    return (
        lines("Load expected and spare", "When a group asked for now is ready, in groups.", "none")
        .span(8)
        .with_target(
            query(
                f"sum by (model) ({series(metrics.CONTROLLER_LOAD, part='expected')})",
                "{{model}} expected",
            )
        )
        .with_target(
            query(
                f"sum by (model) ({series(metrics.CONTROLLER_LOAD, part='spare')})",
                "{{model}} spare",
            )
        ),
        errors,
        lines(
            "Margin",
            "Groups kept in hand, over the root of the groups forecast; learned from the errors.",
            "none",
        )
        .span(8)
        .with_target(query(series(metrics.CONTROLLER_FORECAST_MARGIN), "{{model}}")),
        lines(
            "Starts",
            "From asking for a group to its being ready: the median, and what the "
            "controller expects of each option.",
            "s",
        )
        .span(8)
        .with_target(
            query(
                "histogram_quantile(0.5, sum by (le, model, pool)"
                f" ({increase(metrics.CONTROLLER_START_DURATION)}))",
                "{{model}} on {{pool}}",
            )
        )
        .with_target(
            query(series(metrics.CONTROLLER_EXPECTED_START), "{{model}} {{option}} expected")
        ),
        lines(
            "Groups started, lost and failed",
            "In the time shown: starts that became ready, starts that failed, groups lost.",
            "short",
        )
        .span(8)
        .with_target(
            query(
                f"sum by (pool) (increase({count(metrics.CONTROLLER_START_DURATION)}[$__range]))",
                "{{pool}} ready",
            )
        )
        .with_target(
            query(
                f"sum by (pool, before) ({increase(metrics.CONTROLLER_TRANSITIONS, after='lost')})",
                "{{pool}} lost while {{before}}",
            )
        ),
        lines(
            "Time of a request over the plan",
            "Above 1 groups are slower than planned; what is learned corrects the capacity.",
            "none",
        )
        .span(8)
        .with_target(query(series(metrics.CONTROLLER_LEARNED_RATIO), "{{model}} {{option}}")),
        lines("Spot zones", "Losses expected each hour; 1 on the other line: avoided.", "none")
        .span(24)
        .with_target(query(series(metrics.CONTROLLER_ZONE_LOSSES), "{{zone}} losses/h"))
        .with_target(query(series(metrics.CONTROLLER_ZONE_AVOIDED), "{{zone}} avoided")),
    )


def _controller() -> Panels:
    loop = lines("Time of one loop", "Observing, deciding, recording and acting.", "s").span(8)
    for share in QUANTILES:
        loop.with_target(
            query(quantile(share, metrics.CONTROLLER_LOOP_DURATION), f"p{100 * share:.0f}")
        )
    return (
        loop,
        lines("Age of the gateways' reports", "Each reports once a second.", "s")
        .span(8)
        .with_target(query(series(metrics.CONTROLLER_REPORT_AGE), "{{gateway}}")),
        number("Leaders", "Controllers that lead: one.", "short")
        .height(8)
        .span(4)
        .with_target(query(f"sum({metrics.CONTROLLER_LEADS.name})", "leaders")),
        number("Loops", "Each second.", "ops")
        .height(8)
        .span(4)
        .with_target(
            query(
                f"sum(rate({count(metrics.CONTROLLER_LOOP_DURATION)}[$__rate_interval]))", "loops"
            )
        ),
        lines("Failing steps", "Failures in a row, of the steps that fail.", "short")
        .span(8)
        .with_target(query(series(metrics.CONTROLLER_FAILING), "{{step}}")),
        lines("Prices of pools", "Of a node each hour.", "currencyUSD")
        .span(8)
        .with_target(query(series(metrics.CONTROLLER_PRICE), "{{pool}}")),
        lines("Age of the prices", "Since they were last read.", "s")
        .span(8)
        .with_target(query(f"time() - {series(metrics.CONTROLLER_PRICE_TIME)}", "{{pool}}")),
    )
