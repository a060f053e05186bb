"""The one dashboard of cost and latency: what is spent, what it earns, how fast requests are."""

from grafana_foundation_sdk.models import common
from grafana_foundation_sdk.models import dashboard as models

from dashboards.panels import (
    SECONDS_PER_HOUR,
    USD,
    Panels,
    bars,
    board,
    finished,
    latency,
    lines,
    number,
    query,
    stacked,
)
from dashboards.queries import increase, rate, series
from expertmesh.telemetry import metrics


def build() -> models.Dashboard:
    made = board(
        "cost and latency",
        "overview",
        "Cost, revenue, groups, queue, traffic and latency of all models and pools.",
    )
    return finished(
        made,
        (
            ("Money", _money()),
            ("Groups and queue", _groups()),
            ("Traffic and latency", _traffic()),
            ("Experts", _experts()),
        ),
    )


def _money() -> Panels:
    out_tokens = f"sum({increase(metrics.GATEWAY_TOKENS, direction='out')})"
    spent = f"sum({increase(metrics.CONTROLLER_SPEND)})"
    earned = f"sum({increase(metrics.GATEWAY_REVENUE)})"
    return (
        number("Spend rate now", "Price per hour of the groups held now.", USD)
        .span(6)
        .with_target(query(f"sum({series(metrics.CONTROLLER_SPEND_RATE)})", "USD per hour")),
        number("Spent", "Cost of the capacity held in the time shown.", USD)
        .span(6)
        .with_target(query(spent, "USD", instant=True)),
        number("Tariff revenue", "Tariff price of the usage served in the time shown.", USD)
        .span(6)
        .with_target(query(earned, "USD", instant=True)),
        number(
            "Cost of a million output tokens",
            "All that was spent in the time shown, idle capacity included, for each million tokens "
            "generated.",
            USD,
        )
        .span(6)
        .with_target(
            query(f"1e6 * {spent} / {out_tokens}", "USD per million tokens", instant=True)
        ),
        lines("Spend rate by model and pool", "Price per hour of the groups held.", USD)
        .span(8)
        .with_target(
            query(
                f"sum by (model, pool) ({series(metrics.CONTROLLER_SPEND_RATE)})",
                "{{model}} on {{pool}}",
            )
        ),
        lines("Spend by model and pool", "Cost of the capacity held in the hour before.", USD)
        .span(8)
        .with_target(
            query(
                f"sum by (model, pool) ({increase(metrics.CONTROLLER_SPEND, '1h')})",
                "{{model}} on {{pool}}",
            )
        ),
        lines(
            "Tariff revenue against cost",
            "Per hour, at the rates of the moment. Cost above revenue is idle capacity or a low "
            "tariff.",
            USD,
        )
        .span(8)
        .with_target(query(f"{SECONDS_PER_HOUR} * sum({rate(metrics.GATEWAY_REVENUE)})", "Revenue"))
        .with_target(query(f"{SECONDS_PER_HOUR} * sum({rate(metrics.CONTROLLER_SPEND)})", "Cost")),
    )


def _groups() -> Panels:
    ready = series(metrics.CONTROLLER_GROUPS, state="ready")
    return (
        stacked(lines("Groups by state", "Expert-parallel groups in each state.", "short"))
        .span(8)
        .with_target(query(f"sum by (state) ({series(metrics.CONTROLLER_GROUPS)})", "{{state}}")),
        lines(
            "Groups wanted and ready",
            "What the scaling policy wants beside what serves. A gap that stays means that a pool "
            "has no room or that a group does not start.",
            "short",
        )
        .span(8)
        .with_target(
            query(
                f"sum by (model) ({series(metrics.CONTROLLER_DESIRED_GROUPS)})", "{{model}} wanted"
            )
        )
        .with_target(query(f"sum by (model) ({ready})", "{{model}} ready")),
        lines("Queue", "Requests that wait for a group, and requests at a group.", "short")
        .span(8)
        .with_target(
            query(f"sum by (model) ({series(metrics.GATEWAY_QUEUED)})", "{{model}} queued")
        )
        .with_target(
            query(f"sum by (model) ({series(metrics.GATEWAY_IN_FLIGHT)})", "{{model}} in flight")
        ),
    )


def _traffic() -> Panels:
    return (
        lines("Requests by status", "Requests answered each second, by HTTP status.", "reqps")
        .span(12)
        .with_target(query(f"sum by (status) ({rate(metrics.GATEWAY_REQUESTS)})", "{{status}}")),
        lines(
            "Tokens",
            "Tokens each second: in (prompts without their cached part), cached, out (generated).",
            "suffix:tokens/s",
        )
        .span(12)
        .with_target(
            query(f"sum by (direction) ({rate(metrics.GATEWAY_TOKENS)})", "{{direction}}")
        ),
        latency(
            "Time to first token",
            "Streamed requests: from accepting one to its first body byte, any wait included.",
            metrics.GATEWAY_TTFT,
        ),
        latency(
            "Time per output token",
            "Streamed requests: mean time per token after the first.",
            metrics.GATEWAY_TPOT,
        ),
    )


def _experts() -> Panels:
    by_expert = f"sum by (model, group, expert) ({rate(metrics.EXPERT_TOKENS)})"
    return (
        lines(
            "Expert imbalance by group",
            "Tokens of the busiest expert over the mean of all experts: 1 is even, and the number "
            "of experts means that one does all the work. Counted by CPU workers alone.",
            "none",
        )
        .span(12)
        .with_target(
            query(
                f"max by (model, group) ({by_expert}) / avg by (model, group) ({by_expert})",
                "{{group}}",
            )
        ),
        bars(
            "Tokens by expert",
            "Share of the time shown's tokens that each expert was given, all groups together. "
            "Counted by CPU workers alone.",
            "percentunit",
        )
        .orientation(common.VizOrientation.VERTICAL)
        .span(12)
        .with_target(
            query(
                f"sum by (expert) ({increase(metrics.EXPERT_TOKENS)})"
                f" / scalar(sum({increase(metrics.EXPERT_TOKENS)}))",
                "{{expert}}",
                instant=True,
            )
        ),
    )
