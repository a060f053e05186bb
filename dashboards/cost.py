"""Where the money goes: spend, idle time, price of tokens, tenants, budgets, energy."""

from grafana_foundation_sdk.models import dashboard as models

from dashboards.alerts import SPEND_RATE, USD_PER_MTOK
from dashboards.panels import (
    GREEN,
    RED,
    SECONDS_PER_HOUR,
    USD,
    YELLOW,
    Panels,
    bars,
    board,
    finished,
    lines,
    number,
    query,
    stacked,
    thresholds,
)
from dashboards.queries import increase, rate, recorded, series
from expertmesh.telemetry import metrics

_HOURS_LEFT = "(86400 - time() % 86400) / 3600"
_UNUSED = "idle|starting|draining|idle_nodes"


def build() -> models.Dashboard:
    made = board(
        "cost",
        "cost",
        "What capacity costs, what of it serves somebody, and who that is.",
        "now-6h",
    )
    return finished(
        made,
        (
            ("Spend", _spend()),
            ("Price of tokens", _tokens()),
            ("By tenant", _tenants()),
            ("Budget and energy", _budget()),
        ),
    )


def _spend() -> Panels:
    rate_now = f"sum({series(metrics.CONTROLLER_SPEND_RATE)})"
    all_cost = f"sum({increase(metrics.CONTROLLER_COST)})"
    unused = f"(sum({increase(metrics.CONTROLLER_COST, part='~' + _UNUSED)}) or vector(0))"
    return (
        number("Spend rate", "Price per hour of the groups held now.", USD)
        .span(6)
        .with_target(query(rate_now, "USD per hour")),
        number(
            "Month at this rate",
            "The mean spend rate of the last day, or of what there is of it, for all hours of this "
            "month.",
            USD,
        )
        .span(6)
        .with_target(
            query(
                f"sum(avg_over_time({recorded(SPEND_RATE)}[1d])) * 24 * days_in_month()",
                "USD per month",
                instant=True,
            )
        ),
        number(
            "Not attributed",
            "Share of the cost in the time shown that served no request: idle, starting and "
            "draining groups, and nodes without a group. By the ledger, two minutes late.",
            "percentunit",
        )
        .span(6)
        .thresholds(thresholds((None, GREEN), (0.5, YELLOW), (0.8, RED)))
        .with_target(query(f"{unused} / {all_cost}", "share", instant=True)),
        number(
            "Margin",
            "Tariff revenue less the cost of capacity, in the time shown.",
            USD,
        )
        .span(6)
        .thresholds(thresholds((None, RED), (0, GREEN)))
        .with_target(
            query(
                f"(sum({increase(metrics.GATEWAY_REVENUE)}) or vector(0))"
                f" - sum({increase(metrics.CONTROLLER_SPEND)})",
                "USD",
                instant=True,
            )
        ),
        stacked(
            lines(
                "What the cost was for",
                "Dollars per hour by the ledger, two minutes late: attributed to requests, paid to "
                "providers, idle, starting and draining groups, nodes without a group.",
                USD,
            )
        )
        .span(12)
        .with_target(
            query(
                f"{SECONDS_PER_HOUR} * sum by (part) ({rate(metrics.CONTROLLER_COST)})", "{{part}}"
            )
        ),
        lines(
            "Spend rate by model and pool",
            "Price per hour of the groups held, and the budgets by the hour.",
            USD,
        )
        .span(12)
        .with_target(
            query(
                f"sum by (model, pool) ({series(metrics.CONTROLLER_SPEND_RATE)})",
                "{{model}} on {{pool}}",
            )
        )
        .with_target(
            query(f"max by (model) ({series(metrics.CONTROLLER_BUDGET_RATE)})", "{{model}} budget")
        ),
    )


def _tokens() -> Panels:
    out = f"sum by (model) ({increase(metrics.GATEWAY_TOKENS, direction='out')})"
    out_pool = f"sum by (model, pool) ({increase(metrics.GATEWAY_TOKENS, direction='out')})"
    spent_pool = f"sum by (model, pool) ({increase(metrics.CONTROLLER_SPEND)})"
    earned = f"sum by (model) ({increase(metrics.GATEWAY_REVENUE)})"
    prices = f"max by (model, pool, direction) ({_provider_prices()})"
    tokens = f"sum by (model, direction) ({increase(metrics.GATEWAY_TOKENS)})"
    bill = f"sum by (model, pool) ({prices} * on (model, direction) group_left {tokens})"
    return (
        lines(
            "Cost of a million output tokens by model",
            "All that the model's groups cost in an hour, idle time included, for each million "
            "tokens generated; beside it what the tariff earned for them.",
            USD,
        )
        .span(8)
        .with_target(query(recorded(USD_PER_MTOK), "{{model}} cost"))
        .with_target(
            query(
                f"1e6 * sum by (model) (rate({series(metrics.GATEWAY_REVENUE)}[1h])) / sum by "
                f"(model) (rate({series(metrics.GATEWAY_TOKENS, direction='out')}[1h]))",
                "{{model}} tariff",
            )
        ),
        bars(
            "Cost by model and pool, of a million output tokens",
            "In the time shown. Pools that are not chosen but held cost all the same.",
            USD,
        )
        .span(8)
        .with_target(
            query(
                f"1e6 * {spent_pool} / on (model, pool) {out_pool}",
                "{{model}} on {{pool}}",
                instant=True,
            )
        ),
        bars(
            "Earned, and the same at providers",
            "Tariff revenue of a million output tokens, their prompts included, in the time shown; "
            "and what the same tokens, prompts and cached ones too, would have cost at each "
            "provider that the model may use.",
            USD,
        )
        .span(8)
        .with_target(query(f"1e6 * {earned} / {out}", "{{model}} tariff", instant=True))
        .with_target(
            query(
                f"{bill} / on (model) group_left {out}",
                "{{model}} at {{pool}}",
                instant=True,
            )
        ),
    )


def _provider_prices() -> str:
    """Of a million tokens; of all providers, whichever pools are chosen."""
    return series(metrics.CONTROLLER_EXTERNAL_PRICE, pool="~.*")


def _tenants() -> Panels:
    return (
        bars("Tariff by tenant", "Tariff price of each tenant's usage in the time shown.", USD)
        .span(8)
        .with_target(
            query(
                f"topk(20, sum by (tenant) ({increase(metrics.GATEWAY_TENANT_REVENUE)}))",
                "{{tenant}}",
                instant=True,
            )
        ),
        stacked(lines("Requests by tenant", "Each second.", "reqps"))
        .span(8)
        .with_target(
            query(
                f"topk(10, sum by (tenant) ({rate(metrics.GATEWAY_TENANT_REQUESTS)}))", "{{tenant}}"
            )
        ),
        stacked(
            lines("Tokens by tenant", "Tokens each second, prompts and answers.", "suffix:tokens/s")
        )
        .span(8)
        .with_target(
            query(
                f"topk(10, sum by (tenant) ({rate(metrics.GATEWAY_TENANT_TOKENS)}))", "{{tenant}}"
            )
        ),
    )


def _budget() -> Panels:
    spent = f"max by (model) ({series(metrics.CONTROLLER_SPENT_TODAY)})"
    of_day = f"max by (model) ({series(metrics.CONTROLLER_BUDGET_DAY)})"
    return (
        lines(
            "Spent today and at midnight",
            "Cost of each model's groups since midnight UTC, and what it will be at the next one "
            "with the groups of now.",
            USD,
        )
        .span(8)
        .with_target(query(spent, "{{model}} today"))
        .with_target(
            query(
                f"{spent} + on (model) {recorded(SPEND_RATE)} * ({_HOURS_LEFT})",
                "{{model}} at midnight",
            )
        ),
        bars("Budget left today", "Of models that have a budget by the day.", USD)
        .span(8)
        .with_target(query(f"{of_day} - on (model) {spent}", "{{model}}", instant=True)),
        lines(
            "Power of the accelerators",
            "By the ledger, from what the groups did and the known draw of their accelerators; CPU "
            "groups have none.",
            "watt",
        )
        .span(8)
        .with_target(
            query(
                f"sum by (model, pool) ({rate(metrics.CONTROLLER_ENERGY)})",
                "{{model}} on {{pool}}",
            )
        ),
    )
