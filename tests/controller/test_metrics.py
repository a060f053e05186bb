"""What decisions, ranks and the ledger say, as metrics."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
from tests.core.scaling.world import config

from expertmesh.controller.metrics import ControllerMetrics, forecast_errors
from expertmesh.controller.money import LAG_S, MoneyCounter
from expertmesh.core.domain.fleet import (
    GroupLoad,
    GroupSpec,
    GroupState,
    Parallelism,
    RankInfo,
)
from expertmesh.core.metering.report import Cell, UsageRow
from expertmesh.core.scaling.contract import (
    Action,
    ActionKind,
    Binding,
    Decision,
    GroupRecord,
    Load,
    ModelState,
    Transition,
)
from expertmesh.core.scaling.demand import Demand
from expertmesh.core.scaling.forecast import BIN_S, Forecaster
from expertmesh.core.scaling.spending import Spending
from expertmesh.core.scaling.spot import Zone
from expertmesh.errors import UpstreamUnavailable
from expertmesh.store.report import UsageCells

NOW_S = 100_000.0
GROUP = "em-tiny-cheap-1"
POOLS = {GROUP: "cheap"}


def rank(index: int, tokens: dict[str, int]) -> RankInfo:
    return RankInfo("em-tiny-cheap-1", "tiny", index, 2, 0, 0, 0.0, expert_tokens=tokens)


def counted(metrics: ControllerMetrics) -> dict[str, float]:
    lines = metrics.text().decode().splitlines()
    samples = [line for line in lines if line.startswith("em_expert_tokens_total{")]
    return {line.split('expert="')[1].split('"')[0]: float(line.split()[-1]) for line in samples}


def test_each_look_adds_what_is_new() -> None:
    metrics = ControllerMetrics()
    metrics.saw_ranks([rank(0, {"0": 10, "1": 5}), rank(1, {"2": 7})], POOLS)
    metrics.saw_ranks([rank(0, {"0": 12, "1": 5}), None], POOLS)
    assert counted(metrics) == {"0": 12, "1": 5, "2": 7}


def test_a_rank_that_was_not_seen_for_a_while_is_not_counted_twice() -> None:
    metrics = ControllerMetrics()
    metrics.saw_ranks([rank(0, {"0": 10})], POOLS)
    metrics.saw_ranks([None], POOLS)
    metrics.saw_ranks([rank(0, {"0": 11})], POOLS)
    assert counted(metrics) == {"0": 11}


def test_a_restarted_rank_goes_on_from_where_it_was() -> None:
    metrics = ControllerMetrics()
    metrics.saw_ranks([rank(0, {"0": 10, "1": 8})], POOLS)
    metrics.saw_ranks([rank(0, {"0": 3, "1": 9})], POOLS)
    assert counted(metrics) == {"0": 13, "1": 17}


def test_experts_are_counted_by_model_pool_and_group_of_known_groups() -> None:
    metrics = ControllerMetrics()
    metrics.saw_ranks([rank(1, {"0": 10})], {"em-other-1": "dear"})
    assert counted(metrics) == {}
    metrics.saw_ranks([rank(1, {"0": 10})], POOLS)
    found = values(metrics)
    labels = f'model="tiny",pool="cheap",group="{GROUP}"'
    assert found[f'em_expert_tokens_total{{{labels},expert="0"}}'] == 10
    assert found[f'em_rank_expert_tokens_total{{{labels},rank="1"}}'] == 10


def values(metrics: ControllerMetrics) -> dict[str, float]:
    lines = metrics.text().decode().splitlines()
    return {
        line.rpartition(" ")[0]: float(line.rpartition(" ")[2])
        for line in lines
        if not line.startswith("#")
    }


def record(state: GroupState = GroupState.READY) -> GroupRecord:
    spec = GroupSpec(GROUP, "tiny", "", "cheap", Parallelism(1, 2, 2), 1024, 3.6)
    return GroupRecord(spec, state, since_s=NOW_S, requested_at_s=NOW_S - 60)


def decision(**changes: Any) -> Decision:
    fields: dict[str, Any] = {
        "model": "tiny",
        "state": ModelState(wanted=2, spending=Spending(usd=12.5)),
        "actions": (Action(ActionKind.START, "em-tiny-cheap-2", "load"),),
        "transitions": (),
        "demand": Demand(queued=3, running=4, oldest_wait_s=1.5),
        "load": Load(now=1.2, expected=1.4, spare=0.5, needed=1.9, ready=1.0, coming=1.0),
        "need": 2,
        "target": {"cheap/t1d2e2": 2},
        "binding": Binding.BUDGET,
        "pending": None,
        "reason": "",
        "wake_at_s": NOW_S,
    }
    return Decision(**fields | changes)


def test_a_decision_is_shown_whole() -> None:
    metrics = ControllerMetrics()
    metrics.decided(decision(), ModelState())
    found = values(metrics)
    assert found['em_controller_queued_requests{model="tiny"}'] == 3
    assert found['em_controller_oldest_wait_seconds{model="tiny"}'] == 1.5
    assert found['em_controller_predicted_wait_seconds{model="tiny"}'] == float("inf")
    assert found['em_controller_load_groups{model="tiny",part="needed"}'] == 1.9
    assert found['em_controller_binding{model="tiny",binding="budget"}'] == 1
    assert found['em_controller_target_groups{model="tiny",option="cheap/t1d2e2"}'] == 2
    assert found['em_controller_spent_today_usd{model="tiny"}'] == 12.5
    name = 'em_controller_decisions_total{model="tiny",action="start",binding="budget"}'
    assert found[name] == 1


def test_what_bound_before_is_forgotten_and_so_is_a_model_that_is_gone() -> None:
    metrics = ControllerMetrics()
    metrics.decided(decision(), ModelState())
    advice = (Action(ActionKind.DRAIN, "g", "quiet"),)
    metrics.decided(
        decision(binding=Binding.LOAD, target={"dear/t1d2e2": 1}, advice=advice), ModelState()
    )
    found = values(metrics)
    assert [name for name in found if name.startswith("em_controller_binding{")] == [
        'em_controller_binding{model="tiny",binding="load"}'
    ]
    assert [name for name in found if name.startswith("em_controller_target_groups{")] == [
        'em_controller_target_groups{model="tiny",option="dear/t1d2e2"}'
    ]
    assert found['em_controller_advised_actions{model="tiny",action="drain"}'] == 1
    metrics.forget("tiny")
    left = {name.partition("{")[0] for name in values(metrics) if 'model="tiny"' in name}
    assert left == {"em_controller_decisions_total"}


def test_the_manifest_gives_budgets_prices_and_targets() -> None:
    metrics = ControllerMetrics()
    given = config()
    rules = replace(given.rules, usd_per_hour_budget=4.0, usd_per_day_budget=50.0)
    given = replace(given, model="tiny", rules=rules)
    zone = Zone(up_since_s=NOW_S - 10, lost_at_s=NOW_S - 10)
    state = ModelState(zones={"zone-a": zone})
    metrics.decided(decision(state=state), ModelState(), given, NOW_S)
    metrics.decided(decision(state=state), ModelState(), given, NOW_S + 60)
    found = values(metrics)
    assert found['em_controller_budget_usd_per_hour{model="tiny"}'] == 4
    assert found['em_controller_budget_usd_per_day{model="tiny"}'] == 50
    assert found['em_controller_wait_limit_seconds{model="tiny"}'] == given.max_wait_s
    assert found['em_controller_slo_attainment_target{model="tiny"}'] == given.slo.attainment
    assert found['em_controller_zone_avoided{zone="zone-a"}'] == 1
    pool = given.pools[0]
    price = f'{{pool="{pool.name}"}}'
    assert found[f"em_controller_pool_usd_per_node_hour{price}"] == pool.usd_per_node_hour
    # The price has been read once, however often it is used.
    assert found[f"em_controller_price_timestamp_seconds{price}"] == NOW_S
    metrics.priced(pool.name, pool.usd_per_node_hour, NOW_S + 99)
    assert values(metrics)[f"em_controller_price_timestamp_seconds{price}"] == NOW_S + 99
    lost = f'{{model="tiny",pool="{pool.name}",before="ready",after="lost"}}'
    assert found[f"em_controller_transitions_total{lost}"] == 0


def test_transitions_are_counted() -> None:
    metrics = ControllerMetrics()
    step = Transition(GROUP, "cheap", GroupState.READY, GroupState.LOST, "its node is dead")
    asked = Transition("em-tiny-cheap-2", "cheap", None, GroupState.STARTING, "load")
    metrics.decided(decision(transitions=(step, asked)), ModelState())
    found = values(metrics)
    labels = 'model="tiny",pool="cheap"'
    name = "em_controller_transitions_total"
    assert found[f'{name}{{{labels},before="ready",after="lost"}}'] == 1
    assert found[f'{name}{{{labels},before="",after="starting"}}'] == 1


def test_a_forecast_is_compared_with_what_came() -> None:
    states = [Forecaster()]
    for load in (2.0, 2.0, 2.0, 5.0):
        states.append(states[-1].seen(load, BIN_S, BIN_S, 0.9, 1.0))
    errors = [forecast_errors(a, b) for a, b in itertools.pairwise(states)]
    assert errors[0] == []
    assert errors[1] == errors[2] == [pytest.approx(0.0)]
    assert errors[3] == [pytest.approx(3.0)]
    # Several bins at once, as after a pause.
    late = states[1].seen(4.0, 3 * BIN_S, BIN_S, 0.9, 1.0)
    assert forecast_errors(states[1], late)[0] == pytest.approx(2.0)
    metrics = ControllerMetrics()
    metrics.decided(decision(state=ModelState(forecast=states[4])), ModelState(forecast=states[3]))
    found = values(metrics)
    assert found['em_controller_forecast_error_groups_sum{model="tiny"}'] == pytest.approx(3.0)


def test_engines_figures_go_when_their_group_goes() -> None:
    metrics = ControllerMetrics()
    states = {"tiny": ModelState(groups=(record(),))}
    metrics.turned(states, {"g1": 0.5}, NOW_S, 0.01, {"capacity ledger": 3})
    info = replace(
        rank(0, {"0": 10}),
        group=GROUP,
        uncached_prompt_tokens_total=50,
        cached_prompt_tokens_total=30,
        output_tokens_total=20,
        preemptions_total=2,
        layers={"0": (10, 12, 2)},
    )
    other = replace(info, rank=1, layers={"0": (4, 8, 2)})
    metrics.saw_ranks([info, other], POOLS)
    metrics.saw_loads([record()], {GROUP: GroupLoad(running=3, waiting=1, kv_usage=0.5)})
    found = values(metrics)
    labels = f'model="tiny",pool="cheap",group="{GROUP}"'
    assert found[f'em_group_tokens_total{{{labels},direction="in"}}'] == 100
    assert found[f'em_group_tokens_total{{{labels},direction="cached"}}'] == 60
    assert found[f"em_group_preemptions_total{{{labels}}}"] == 4
    assert found[f"em_group_running_requests{{{labels}}}"] == 3
    assert found[f"em_group_kv_use_ratio{{{labels}}}"] == 0.5
    # Ten of the busiest of four experts that have twenty together.
    layer = f'em_expert_layer_imbalance_ratio{{{labels},layer="0"}}'
    assert found[layer] == pytest.approx(2.0)
    assert found['em_controller_failing_step{step="capacity ledger"}'] == 3
    metrics.turned({"tiny": ModelState()}, {}, NOW_S + 1, 0.01)
    metrics.saw_loads([], {})
    assert not [name for name in values(metrics) if GROUP in name]
    assert not [name for name in values(metrics) if "failing_step" in name]


async def test_the_ledger_is_counted_once_and_late() -> None:
    metrics = ControllerMetrics()
    asked: list[tuple[float, float]] = []
    row = UsageRow(
        attributed_nano_usd=3_000_000_000,
        external_nano_usd=1_000_000_000,
        idle_nano_usd=500_000_000,
        energy_uj=2_000_000,
    )

    async def read(since_s: float, until_s: float) -> UsageCells:
        if len(asked) == 1:
            asked.append((0.0, 0.0))
            raise UpstreamUnavailable("the store is away")
        asked.append((since_s, until_s))
        return UsageCells(since_s, until_s, {Cell("", "cheap", "tiny", "t", "k"): row})

    money = MoneyCounter(read, metrics, NOW_S)
    await money.count(NOW_S + LAG_S)  # nothing is old enough
    assert asked == []
    for late_s in (10.0, 20.0, 30.0):
        await money.count(NOW_S + LAG_S + late_s)
    # What could not be read is read with the next part.
    assert asked == [(NOW_S, NOW_S + 10), (0.0, 0.0), (NOW_S + 10, NOW_S + 30)]
    found = values(metrics)
    labels = 'model="tiny",pool="cheap"'
    parts = {
        part: found[f'em_controller_cost_usd_total{{{labels},part="{part}"}}']
        for part in ("attributed", "external", "idle")
    }
    assert parts == {"attributed": 4.0, "external": 2.0, "idle": 1.0}
    assert found[f"em_controller_energy_joules_total{{{labels}}}"] == 4.0
    assert found["em_controller_ledger_timestamp_seconds"] == NOW_S + 30
