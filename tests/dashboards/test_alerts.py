"""When each alert fires and when it does not, as sentences: by promtool on the generated file."""

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from dashboards.alerts import Alert, alerts, recordings, rules
from dashboards.build import GENERATED, files

from expertmesh.telemetry import metrics

REPOSITORY = Path(__file__).parents[2]
RUNBOOK = (REPOSITORY / "docs/operations.md").read_text()
ALERTS = {alert.name: alert for alert in alerts()}


@dataclass(frozen=True, slots=True)
class Case:
    sentence: str
    alert: str
    fires: bool
    series: dict[str, str]
    """In promtool's notation."""
    at: str = "1h"
    every: str = "30s"


def slo(met: str, missed: str, target: str = "0.99x800", start: int = 0) -> dict[str, str]:
    return {
        'em_gateway_slo_requests_total{model="m",result="met"}': f"{start}+{met}x800",
        'em_gateway_slo_requests_total{model="m",result="slow_start"}': f"{start}+{missed}x800",
        'em_controller_slo_attainment_target{model="m"}': target,
    }


def transitions(before: str, values: str) -> dict[str, str]:
    labels = f'model="m",pool="spot",before="{before}",after="lost"'
    return {f"em_controller_transitions_total{{{labels}}}": values}


def experts(busy: int, quiet: int) -> dict[str, str]:
    return {
        f'em_expert_tokens_total{{model="m",group="g",expert="{number}"}}': (
            f"0+{busy if number == 0 else quiet}x200"
        )
        for number in range(8)
    }


def day_budget(spent: float, rate: float) -> dict[str, str]:
    return {
        'em_controller_spent_today_usd{model="m"}': f"{spent}x400",
        'em_controller_spend_usd_per_hour{model="m",pool="a"}': f"{rate}x400",
        'em_controller_budget_usd_per_day{model="m"}': "240x400",
    }


CASES = (
    Case(
        "of a target of 99 %, every fifth request misses for an hour: somebody is called",
        "ExpertMeshSloBurnFast",
        True,
        slo("80", "20"),
    ),
    Case(
        "every hundredth request misses, as the target allows: nobody is called",
        "ExpertMeshSloBurnFast",
        False,
        slo("99", "1"),
    ),
    Case(
        "all requests missed, but that ended ten minutes ago: nobody is called",
        "ExpertMeshSloBurnFast",
        False,
        {
            'em_gateway_slo_requests_total{model="m",result="met"}': "0x100 0+100x20",
            'em_gateway_slo_requests_total{model="m",result="failed"}': "0+100x100 10000x20",
            'em_controller_slo_attainment_target{model="m"}': "0.99x120",
        },
        at="60m",
    ),
    Case(
        "the one request of the hour misses: nobody is called",
        "ExpertMeshSloBurnFast",
        False,
        slo("0", "0") | {'em_gateway_slo_requests_total{model="m",result="failed"}': "0x100 1x100"},
    ),
    Case(
        "of a target of 90 %, which cannot be missed fourteen times, six of ten requests miss: "
        "somebody is called",
        "ExpertMeshSloBurnFast",
        True,
        slo("40", "60", "0.9x800"),
    ),
    Case(
        "all requests miss and none has ever been met: somebody is called",
        "ExpertMeshSloBurnFast",
        True,
        {
            'em_gateway_slo_requests_total{model="m",result="failed"}': "0+10x200",
            'em_controller_slo_attainment_target{model="m"}': "0.99x200",
        },
    ),
    Case(
        "one request of twelve misses for six hours: a ticket",
        "ExpertMeshSloBurnSlow",
        True,
        slo("92", "8"),
        at="6h20m",
    ),
    Case(
        "one request of twelve misses for six hours: nobody is called",
        "ExpertMeshSloBurnFast",
        False,
        slo("92", "8"),
        at="6h20m",
    ),
    Case(
        "one request of forty misses for six hours: no ticket",
        "ExpertMeshSloBurnSlow",
        False,
        slo("975", "25"),
        at="6h20m",
    ),
    Case(
        "a request has waited for 20 s of the 30 s that it may: somebody is called",
        "ExpertMeshQueueAge",
        True,
        {
            'em_controller_oldest_wait_seconds{model="m"}': "20x20",
            'em_controller_wait_limit_seconds{model="m"}': "30x20",
        },
        at="5m",
    ),
    Case(
        "a request has waited for 20 s of the 300 s that it may: all is well",
        "ExpertMeshQueueAge",
        False,
        {
            'em_controller_oldest_wait_seconds{model="m"}': "20x20",
            'em_controller_wait_limit_seconds{model="m"}': "300x20",
        },
        at="5m",
    ),
    Case(
        "a request waited too long half a minute ago, and none does now: all is well",
        "ExpertMeshQueueAge",
        False,
        {
            'em_controller_oldest_wait_seconds{model="m"}': "0x8 20 0x20",
            'em_controller_wait_limit_seconds{model="m"}': "30x30",
        },
        at="5m",
    ),
    Case(
        "the load needs three groups, and one is ready for 20 minutes: a ticket",
        "ExpertMeshCapacityShort",
        True,
        {
            'em_controller_needed_groups{model="m"}': "3x60",
            'em_controller_groups{model="m",pool="a",state="ready"}': "1x60",
        },
        at="20m",
    ),
    Case(
        "the load needs a group, and none is ready or has ever been: a ticket",
        "ExpertMeshCapacityShort",
        True,
        {
            'em_controller_needed_groups{model="m"}': "1x60",
            'em_controller_groups{model="m",pool="a",state="starting"}': "1x60",
        },
        at="20m",
    ),
    Case(
        "two pools together have the three groups that are needed: all is well",
        "ExpertMeshCapacityShort",
        False,
        {
            'em_controller_needed_groups{model="m"}': "3x60",
            'em_controller_groups{model="m",pool="a",state="ready"}': "1x60",
            'em_controller_groups{model="m",pool="b",state="ready"}': "2x60",
        },
        at="20m",
    ),
    Case(
        "a ready group is lost: a ticket",
        "ExpertMeshGroupLost",
        True,
        transitions("ready", "0x10 1x10"),
        at="6m",
    ),
    Case(
        "a group was lost half an hour ago: no ticket any more",
        "ExpertMeshGroupLost",
        False,
        transitions("ready", "0x10 1x100"),
        at="40m",
    ),
    Case(
        "a group fails to start, which is no loss of one that served",
        "ExpertMeshGroupLost",
        False,
        transitions("starting", "0x10 1x10"),
        at="6m",
    ),
    Case(
        "three starts fail within half an hour: somebody is called",
        "ExpertMeshGroupStartFailing",
        True,
        transitions("starting", "0x10 1x10 2x10 3x30"),
        at="25m",
    ),
    Case(
        "one start fails: it is tried again, and nobody is called",
        "ExpertMeshGroupStartFailing",
        False,
        transitions("starting", "0x10 1x60"),
        at="25m",
    ),
    Case(
        "a gateway has had no answer of the controller for a minute: a ticket",
        "ExpertMeshGatewaySilent",
        True,
        {'em_gateway_fleet_age_seconds{instance="a"}': "0x4 30+30x10"},
        at="5m",
    ),
    Case(
        "gateways have their answer every second: all is well",
        "ExpertMeshGatewaySilent",
        False,
        {'em_gateway_fleet_age_seconds{instance="a"}': "0.5x20"},
        at="5m",
    ),
    Case(
        "the leader has no report younger than 15 s: somebody is called",
        "ExpertMeshNoReports",
        True,
        {
            "em_controller_leads": "1x20",
            'em_controller_gateway_report_age_seconds{gateway="g"}': "0x2 40+30x20",
        },
        at="6m",
    ),
    Case(
        "the leader has never had a report: somebody is called",
        "ExpertMeshNoReports",
        True,
        {"em_controller_leads": "1x20"},
        at="6m",
    ),
    Case(
        "one of two gateways has ended, and the other reports: all is well",
        "ExpertMeshNoReports",
        False,
        {
            "em_controller_leads": "1x20",
            'em_controller_gateway_report_age_seconds{gateway="g"}': "0x2 40+30x20",
            'em_controller_gateway_report_age_seconds{gateway="h"}': "0.5x20",
        },
        at="6m",
    ),
    Case(
        "there is no leader that could have reports: this alert leaves that to the other one",
        "ExpertMeshNoReports",
        False,
        {"em_controller_leads": "0x20"},
        at="6m",
    ),
    Case(
        "two controllers follow and none leads: somebody is called",
        "ExpertMeshNoLeader",
        True,
        {
            'em_controller_leads{instance="a"}': "0x20",
            'em_controller_leads{instance="b"}': "0x20",
        },
        at="5m",
    ),
    Case(
        "no controller is there at all: somebody is called",
        "ExpertMeshNoLeader",
        True,
        {"up": "1x20"},
        at="5m",
    ),
    Case(
        "one of two controllers leads: all is well",
        "ExpertMeshNoLeader",
        False,
        {
            'em_controller_leads{instance="a"}': "0x20",
            'em_controller_leads{instance="b"}': "1x20",
        },
        at="5m",
    ),
    Case(
        "the lead changes hands within half a minute: all is well",
        "ExpertMeshNoLeader",
        False,
        {
            'em_controller_leads{instance="a"}': "1x5 0x20",
            'em_controller_leads{instance="b"}': "0x6 1x20",
        },
        at="5m",
    ),
    Case(
        "one expert of eight gets five times the mean for 40 minutes: a ticket",
        "ExpertMeshExpertImbalance",
        True,
        experts(busy=20_000, quiet=1_500),
        at="40m",
    ),
    Case(
        "one expert of eight gets twice the mean: all is well",
        "ExpertMeshExpertImbalance",
        False,
        experts(busy=20_000, quiet=9_000),
        at="40m",
    ),
    Case(
        "one expert gets all of the few tokens of a night: all is well",
        "ExpertMeshExpertImbalance",
        False,
        experts(busy=50, quiet=0),
        at="40m",
    ),
    Case(
        "with 11 dollars an hour from midnight on, 240 dollars do not last for the day: a ticket",
        "ExpertMeshBudgetBurn",
        True,
        day_budget(spent=0, rate=11),
    ),
    Case(
        "with 9 dollars an hour, 240 dollars last for the day: all is well",
        "ExpertMeshBudgetBurn",
        False,
        day_budget(spent=9, rate=9),
    ),
    Case(
        "a model without a budget of a day cannot break it",
        "ExpertMeshBudgetBurn",
        False,
        {'em_controller_spend_usd_per_hour{model="m",pool="a"}': "1000x400"},
    ),
    Case(
        "a price was read when the clock began, eight days ago: a ticket",
        "ExpertMeshPriceStale",
        True,
        {'em_controller_price_timestamp_seconds{pool="a"}': "0x300"},
        at="8d",
        every="1h",
    ),
    Case(
        "the price is read every day: all is well",
        "ExpertMeshPriceStale",
        False,
        {'em_controller_price_timestamp_seconds{pool="a"}': "0+3600x300"},
        at="8d",
        every="1h",
    ),
    Case(
        "the cost of capacity could not be written three times: somebody is called",
        "ExpertMeshLedgerFailing",
        True,
        {'em_controller_failing_step{step="capacity ledger"}': "0x2 3+3x20"},
        at="5m",
    ),
    Case(
        "a gateway has given up a record of usage: somebody is called",
        "ExpertMeshLedgerFailing",
        True,
        {'em_gateway_usage_given_up_total{instance="a"}': "0x5 1x20"},
        at="6m",
    ),
    Case(
        "a hundred thousand records of usage wait: somebody is called",
        "ExpertMeshLedgerFailing",
        True,
        {'em_gateway_usage_pending_records{instance="a"}': "100000x20"},
        at="5m",
    ),
    Case(
        "another step of the loop fails, and some usage waits for its batch: this is quiet",
        "ExpertMeshLedgerFailing",
        False,
        {
            'em_controller_failing_step{step="observe nodes"}': "9x20",
            'em_gateway_usage_pending_records{instance="a"}': "300x20",
            'em_gateway_usage_given_up_total{instance="a"}': "4x20",
        },
        at="5m",
    ),
    Case(
        "a spot zone has just been lost: a ticket",
        "ExpertMeshSpotZoneRisk",
        True,
        {'em_controller_zone_avoided{zone="z"}': "0x4 1x20"},
        at="5m",
    ),
    Case(
        "a spot zone is new, and no more is known of it: all is well",
        "ExpertMeshSpotZoneRisk",
        False,
        {
            'em_controller_zone_avoided{zone="z"}': "0x20",
            'em_controller_zone_losses_per_hour{zone="z"}': "1.14x20",
        },
        at="5m",
    ),
)


@pytest.mark.parametrize("case", CASES, ids=[f"{c.alert}: {c.sentence}" for c in CASES])
def test_the_alert(case: Case, tmp_path: Path) -> None:
    if shutil.which("promtool") is None:
        pytest.fail("promtool is missing: run scripts/install-tools.sh")
    expected = [{"labels": f'{{alertname="{case.alert}"}}', "value": 1}] if case.fires else []
    firing = f'ALERTS{{alertname="{case.alert}",alertstate="firing"}}'
    checks = {
        "rule_files": [str(GENERATED / "alerts.yaml")],
        "evaluation_interval": case.every,
        "tests": [
            {
                "interval": case.every,
                "input_series": [
                    {"series": name, "values": values} for name, values in case.series.items()
                ],
                "promql_expr_test": [
                    {
                        "expr": f"count by (alertname) ({firing})",
                        "eval_time": case.at,
                        "exp_samples": expected,
                    }
                ],
            }
        ],
    }
    file = tmp_path / "cases.yaml"
    file.write_text(yaml.safe_dump(checks))
    answer = subprocess.run(
        ["promtool", "test", "rules", str(file)], capture_output=True, text=True, timeout=60
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr


def test_every_alert_has_a_case_in_which_it_fires_and_one_in_which_it_does_not() -> None:
    for fires in (True, False):
        assert {case.alert for case in CASES if case.fires is fires} == set(ALERTS)
    for case in CASES:
        asked = {name.partition("{")[0] for name in case.series} - {"up"}
        assert asked <= {metric.name for metric in metrics.ALL}, case.sentence


@pytest.mark.parametrize("alert", alerts(), ids=list(ALERTS))
def test_every_alert_leads_to_its_section_of_the_runbook(alert: Alert) -> None:
    assert f"\n### {alert.name}\n" in RUNBOOK
    assert alert.runbook() == f"docs/operations.md#{alert.name.lower()}"
    assert alert.severity in ("page", "ticket")
    assert alert.summary and alert.description.endswith(".")


def test_names_are_used_once_and_metrics_exist() -> None:
    names = [*(each.record for each in recordings()), *ALERTS]
    assert len(set(names)) == len(names)
    assert len(rules()["groups"]) == 2


def test_the_committed_files_are_those_that_are_built() -> None:
    stale = [
        path for path, text in files().items() if not path.is_file() or path.read_text() != text
    ]
    assert not stale, "run: python -m dashboards.build"
