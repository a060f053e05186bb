"""One group in depth: its load, its cache, its experts, its ranks."""

from grafana_foundation_sdk.models import common
from grafana_foundation_sdk.models import dashboard as models

from dashboards.panels import Panels, bars, board, choice, finished, lines, number, query
from dashboards.queries import increase, rate, series
from expertmesh.telemetry import metrics
from expertmesh.telemetry.metrics import Metric


def build() -> models.Dashboard:
    made = board(
        "one group", "group", "Everything that is known of the chosen groups."
    ).with_variable(choice("group", "Group", metrics.GROUP_RUNNING))
    return finished(made, (("Load", _load()), ("Experts and ranks", _experts())))


def _of(metric: Metric, **labels: str) -> str:
    return series(metric, group="$group", **labels)


def _load() -> Panels:
    tokens = metrics.GROUP_TOKENS
    cached = f"sum({increase(tokens, group='$group', direction='cached')})"
    prompts = f"sum({increase(tokens, group='$group', direction='~in|cached')})"
    return (
        number("In flight", "Requests that gateways have at it.", "short")
        .span(6)
        .with_target(query(f"sum({_of(metrics.GATEWAY_IN_FLIGHT)})", "requests")),
        number("KV cache", "Tokens that fit into it, over all ranks.", "short")
        .span(6)
        .with_target(query(f"sum({_of(metrics.GROUP_KV_TOKENS)})", "tokens")),
        number("KV cache in use", "Mean over the ranks.", "percentunit")
        .span(6)
        .with_target(query(f"avg({_of(metrics.GROUP_KV_USE)})", "share")),
        number("Prompt tokens from the cache", "In the time shown.", "percentunit")
        .span(6)
        .with_target(query(f"{cached} / {prompts}", "share", instant=True)),
        lines("Requests", "In the engines' batches, behind them, and in flight.", "short")
        .span(12)
        .with_target(query(f"sum by (group) ({_of(metrics.GROUP_RUNNING)})", "{{group}} running"))
        .with_target(query(f"sum by (group) ({_of(metrics.GROUP_WAITING)})", "{{group}} waiting"))
        .with_target(
            query(f"sum by (group) ({_of(metrics.GATEWAY_IN_FLIGHT)})", "{{group}} in flight")
        ),
        lines("Tokens", "Each second: prompts computed, from the cache, generated.", "short")
        .span(12)
        .with_target(
            query(
                f"sum by (group, direction) ({rate(tokens, group='$group')})",
                "{{group}} {{direction}}",
            )
        ),
        lines("KV cache in use over time", "Mean over the ranks.", "percentunit")
        .max(1)
        .span(12)
        .with_target(query(f"avg by (group) ({_of(metrics.GROUP_KV_USE)})", "{{group}}")),
        lines("Preemptions", "Requests each second that are computed again.", "ops")
        .span(12)
        .with_target(
            query(
                f"sum by (group) ({rate(metrics.GROUP_PREEMPTIONS, group='$group')})", "{{group}}"
            )
        ),
    )


def _experts() -> Panels:
    return (
        lines(
            "Tokens by rank",
            "Routed to the experts of each rank, each second; counted by CPU workers alone.",
            "short",
        )
        .span(12)
        .with_target(
            query(
                f"sum by (group, rank) ({rate(metrics.RANK_TOKENS, group='$group')})",
                "{{group}} rank {{rank}}",
            )
        ),
        lines(
            "Layer imbalance",
            "Of each layer: busiest expert over the mean; counted by CPU workers alone.",
            "none",
        )
        .span(12)
        .with_target(query(_of(metrics.LAYER_IMBALANCE), "{{group}} layer {{layer}}")),
        bars(
            "Tokens by expert",
            "Routed to each expert in the time shown; counted by CPU workers alone.",
            "short",
        )
        .orientation(common.VizOrientation.VERTICAL)
        .span(24)
        .with_target(
            query(
                f"sum by (expert) ({increase(metrics.EXPERT_TOKENS, group='$group')})",
                "{{expert}}",
                instant=True,
            )
        ),
    )
