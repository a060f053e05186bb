"""Alerts and recording rules, as the file of rules that Prometheus reads.

Thresholds hold for any installation; what differs between models (targets, waits, budgets) comes
from their manifests by metrics.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from expertmesh.telemetry import metrics
from expertmesh.telemetry.metrics import Metric

RUNBOOKS: Final = "docs/operations.md"
"""Each alert has a section there, named as the alert. Where the documents are served is not known
here: who serves them gives another base."""
INTERVAL: Final = "30s"
WINDOWS: Final = ("5m", "30m", "1h", "6h")


@dataclass(frozen=True, slots=True)
class Recording:
    record: str
    """`<level>:<metric>:<operations>`, as Prometheus' own advice has it."""
    expr: str


@dataclass(frozen=True, slots=True)
class Alert:
    name: str
    expr: str
    lasting: str
    """How long the expression must hold."""
    severity: str
    """`page`: somebody gets up for it. `ticket`: it can wait for the morning."""
    summary: str
    description: str
    labels: Mapping[str, str] = field(default_factory=dict)

    def runbook(self, base: str = RUNBOOKS) -> str:
        return f"{base}#{self.name.lower()}"


def missed(window: str) -> str:
    """Share of the requests that missed the targets."""
    return f"model:em_slo_missed:ratio_rate{window}"


def burn(window: str) -> str:
    """1 spends the error budget in just the time that it is for."""
    return f"model:em_slo_burn:ratio_rate{window}"


SLO_BUDGET: Final = "model:em_slo_budget:ratio"
IMBALANCE: Final = "group:em_expert_imbalance:ratio_rate5m"
USD_PER_MTOK: Final = "model:em_usd_per_mtok:ratio_rate1h"
CACHED: Final = "model:em_cached_prompt_tokens:ratio_rate5m"
SPEND_RATE: Final = "model:em_spend_usd_per_hour:sum"
READY: Final = "model:em_ready_groups:sum"


def _name(metric: Metric) -> str:
    return metric.name


def _missed_rule(window: str) -> Recording:
    slo = _name(metrics.GATEWAY_SLO)
    every = f"sum by (model) (rate({slo}[{window}]))"
    met = f'sum by (model) (rate({slo}{{result="met"}}[{window}]))'
    return Recording(missed(window), f"1 - ({met} or 0 * {every}) / {every}")


def recordings() -> tuple[Recording, ...]:
    expert = f"sum by (model, group, expert) (rate({_name(metrics.EXPERT_TOKENS)}[5m]))"
    tokens = _name(metrics.GATEWAY_TOKENS)
    cached = f'sum by (model) (rate({tokens}{{direction="cached"}}[5m]))'
    prompt = f'sum by (model) (rate({tokens}{{direction=~"in|cached"}}[5m]))'
    spent = f"sum by (model) (rate({_name(metrics.CONTROLLER_SPEND)}[1h]))"
    return (
        *(_missed_rule(window) for window in WINDOWS),
        # A target of 1 leaves no budget; one of ten thousand requests may still miss.
        Recording(
            SLO_BUDGET,
            f"clamp_min(1 - max by (model) ({_name(metrics.CONTROLLER_SLO)}), 0.0001)",
        ),
        *(
            Recording(burn(window), f"{missed(window)} / on (model) {SLO_BUDGET}")
            for window in WINDOWS
        ),
        Recording(
            IMBALANCE, f"max by (model, group) ({expert}) / avg by (model, group) ({expert})"
        ),
        Recording(
            USD_PER_MTOK,
            f'1e6 * {spent} / on (model) sum by (model) (rate({tokens}{{direction="out"}}[1h]))',
        ),
        Recording(CACHED, f"{cached} / {prompt}"),
        Recording(SPEND_RATE, f"sum by (model) ({_name(metrics.CONTROLLER_SPEND_RATE)})"),
        Recording(READY, f'sum by (model) ({_name(metrics.CONTROLLER_GROUPS)}{{state="ready"}})'),
    )


def _burns(factor: float, ceiling: float, long: str, short: str) -> str:
    """Both windows burn `factor` times too fast. A model that may miss much can never burn so fast:
    there a share of `ceiling` will do."""
    limit = f"clamp_max({factor:g} * {SLO_BUDGET}, {ceiling:g})"
    asked = f"sum by (model) (increase({_name(metrics.GATEWAY_SLO)}[{long}])) >= {_FEW}"
    return (
        f"{missed(long)} > on (model) {limit} and on (model) {missed(short)} > on (model) {limit}"
        f" and on (model) {asked}"
    )


_FEW: Final = 20
"""Requests below which a share of them says nothing."""


def alerts() -> tuple[Alert, ...]:
    left_h = "(86400 - time() % 86400) / 3600"
    transitions = _name(metrics.CONTROLLER_TRANSITIONS)
    leads = _name(metrics.CONTROLLER_LEADS)
    report_age = _name(metrics.CONTROLLER_REPORT_AGE)
    return (
        Alert(
            "ExpertMeshSloBurnFast",
            _burns(14.4, 0.5, "1h", "5m"),
            "2m",
            "page",
            "{{ $labels.model }} misses its latency targets",
            "{{ $value | humanizePercentage }} of the last hour's requests to {{ $labels.model }} "
            "missed their targets: a month's error budget lasts less than two days like this.",
        ),
        Alert(
            "ExpertMeshSloBurnSlow",
            _burns(6, 0.3, "6h", "30m"),
            "15m",
            "ticket",
            "{{ $labels.model }} slowly spends its error budget",
            "{{ $value | humanizePercentage }} of the last six hours' requests to "
            "{{ $labels.model }} missed their targets.",
        ),
        Alert(
            "ExpertMeshQueueAge",
            f"max by (model) ({_name(metrics.CONTROLLER_OLDEST_WAIT)}) > on (model)"
            f" 0.5 * max by (model) ({_name(metrics.CONTROLLER_WAIT_LIMIT)})",
            "1m",
            "page",
            "Requests to {{ $labels.model }} wait too long",
            "The oldest has waited for {{ $value | humanizeDuration }}, more than half of the time "
            "after which requests are turned away.",
        ),
        Alert(
            "ExpertMeshCapacityShort",
            f"max by (model) ({_name(metrics.CONTROLLER_NEED)}) > on (model)"
            f" ({READY} or on (model) 0 * max by (model) ({_name(metrics.CONTROLLER_NEED)}))",
            "15m",
            "ticket",
            "{{ $labels.model }} has fewer ready groups than its load needs",
            "The load of {{ $labels.model }} has needed {{ $value }} groups for a quarter of an "
            "hour, and fewer are ready.",
        ),
        Alert(
            "ExpertMeshGroupLost",
            f"sum by (model, pool) (increase({transitions}"
            '{before=~"ready|draining",after="lost"}[10m])) > 0',
            "0m",
            "ticket",
            "A group of {{ $labels.model }} on {{ $labels.pool }} was lost",
            "It served, and then failed or lost a node within the last ten minutes.",
        ),
        Alert(
            "ExpertMeshGroupStartFailing",
            f"sum by (model, pool) (increase({transitions}"
            '{before="starting",after="lost"}[30m])) >= 2',
            "0m",
            "page",
            "Groups of {{ $labels.model }} do not start on {{ $labels.pool }}",
            "{{ $value | humanize }} starts failed, or found no room, within half an hour.",
        ),
        Alert(
            "ExpertMeshGatewaySilent",
            f"max by (instance) ({_name(metrics.GATEWAY_FLEET_AGE)}) > 15",
            "1m",
            "ticket",
            "The gateway {{ $labels.instance }} does not reach the controller",
            "It serves with a fleet that is {{ $value | humanizeDuration }} old, and nothing is "
            "scaled down meanwhile.",
        ),
        Alert(
            "ExpertMeshNoReports",
            f"max(max_over_time({leads}[2m])) == 1 unless on () count({report_age} < 15)",
            "2m",
            "page",
            "No gateway reports to the controller",
            "The controller knows neither queues nor traffic, and scales nothing.",
        ),
        Alert(
            "ExpertMeshNoLeader",
            f"(sum({leads}) or vector(0)) < 1",
            "1m",
            "page",
            "No controller leads",
            "Groups go on serving, but nobody starts, drains or replaces one.",
        ),
        Alert(
            "ExpertMeshExpertImbalance",
            f"{IMBALANCE} > 4 and on (model, group)"
            f" sum by (model, group) (rate({_name(metrics.EXPERT_TOKENS)}[5m])) > 100",
            "30m",
            "ticket",
            "Experts of {{ $labels.group }} are loaded unevenly",
            "The busiest expert gets {{ $value | humanize }} times the mean, so its rank holds up "
            "all others.",
        ),
        Alert(
            "ExpertMeshBudgetBurn",
            f"max by (model) ({_name(metrics.CONTROLLER_SPENT_TODAY)})"
            f" + on (model) {SPEND_RATE} * ({left_h})"
            f" > on (model) max by (model) ({_name(metrics.CONTROLLER_BUDGET_DAY)})",
            "15m",
            "ticket",
            "{{ $labels.model }} will spend more than its budget of today",
            "With the groups of now it will have cost {{ $value | humanize }} dollars at midnight, "
            "UTC; the controller will take groups away before.",
        ),
        Alert(
            "ExpertMeshPriceStale",
            f"time() - max by (pool) ({_name(metrics.CONTROLLER_PRICE_TIME)}) > 7 * 86400",
            "1h",
            "ticket",
            "The price of the pool {{ $labels.pool }} is old",
            "It was read {{ $value | humanizeDuration }} ago; pools are chosen by it.",
        ),
        Alert(
            "ExpertMeshLedgerFailing",
            f'max by (step) ({_name(metrics.CONTROLLER_FAILING)}{{step="capacity ledger"}}) >= 3'
            f" or max by (instance) ({_name(metrics.GATEWAY_USAGE_PENDING)}) > 20000"
            f" or sum by (instance) (increase({_name(metrics.GATEWAY_USAGE_GIVEN_UP)}[10m])) > 0",
            "2m",
            "page",
            "Usage or cost does not reach the ledger",
            "The store is away or too slow. Records wait on disk; what cannot wait goes to the "
            "log of the gateway.",
        ),
        Alert(
            "ExpertMeshSpotZoneRisk",
            f"max by (zone) ({_name(metrics.CONTROLLER_ZONE_AVOIDED)}) == 1"
            f" or max by (zone) ({_name(metrics.CONTROLLER_ZONE_LOSSES)}) > 1.5",
            "1m",
            "ticket",
            "The spot zone {{ $labels.zone }} is unsafe",
            "It has lately been lost, or is lost more often than most: new groups go elsewhere, "
            "at a higher price.",
        ),
    )


def rules(runbooks: str = RUNBOOKS) -> dict[str, Any]:
    """The content of the file. `runbooks`: the page to whose sections alerts lead."""
    return {
        "groups": [
            {
                "name": "expertmesh-recordings",
                "interval": INTERVAL,
                "rules": [{"record": each.record, "expr": each.expr} for each in recordings()],
            },
            {
                "name": "expertmesh-alerts",
                "interval": INTERVAL,
                "rules": [_alert(each, runbooks) for each in alerts()],
            },
        ]
    }


def _alert(alert: Alert, runbooks: str) -> dict[str, Any]:
    return {
        "alert": alert.name,
        "expr": alert.expr,
        "for": alert.lasting,
        "labels": {"severity": alert.severity, **alert.labels},
        "annotations": {
            "summary": alert.summary,
            "description": alert.description,
            "runbook_url": alert.runbook(runbooks),
        },
    }
