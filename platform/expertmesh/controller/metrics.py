"""The controller's own metrics, set after every turn of its loop."""

from collections import Counter as Count
from collections.abc import Iterable, Mapping
from typing import Final

from expertmesh.controller.rank_totals import RankTotals
from expertmesh.core.domain.fleet import GroupLoad, GroupState, RankInfo
from expertmesh.core.metering.report import By, Cell, UsageRow
from expertmesh.core.scaling.calibration import Calibration
from expertmesh.core.scaling.contract import Decision, GroupRecord, ModelState, ScalingConfig
from expertmesh.core.scaling.forecast import Forecaster
from expertmesh.core.scaling.hindsight import Regret
from expertmesh.telemetry import metrics as names
from expertmesh.telemetry.tally import Family, GaugeChild, Tally
from expertmesh.telemetry.text import TextWriter

_SECONDS_PER_HOUR: Final = 3600.0
_NANO_USD_PER_USD: Final = 10**9
_UJ_PER_J: Final = 10**6
_LOST: Final = GroupState.LOST.value
_MOST_CHILDREN: Final = 60_000
"""Of one metric: each expert of a hundred large groups."""


class ControllerMetrics:
    def __init__(self) -> None:
        self._tally = tally = Tally(_MOST_CHILDREN)
        # Fleet
        self._groups = tally.gauge(names.CONTROLLER_GROUPS)
        self._desired = tally.gauge(names.CONTROLLER_DESIRED_GROUPS)
        self._transitions = tally.counter(names.CONTROLLER_TRANSITIONS)
        self._start = tally.histogram(names.CONTROLLER_START_DURATION)
        # Demand and capacity
        self._demand = tally.gauge(names.CONTROLLER_DEMAND)
        self._queued = tally.gauge(names.CONTROLLER_QUEUED)
        self._oldest_wait = tally.gauge(names.CONTROLLER_OLDEST_WAIT)
        self._predicted_wait = tally.gauge(names.CONTROLLER_PREDICTED_WAIT)
        self._load = tally.gauge(names.CONTROLLER_LOAD)
        # Decisions
        self._need = tally.gauge(names.CONTROLLER_NEED)
        self._target = tally.gauge(names.CONTROLLER_TARGET)
        self._binding = tally.gauge(names.CONTROLLER_BINDING)
        self._decisions = tally.counter(names.CONTROLLER_DECISIONS)
        self._advice = tally.gauge(names.CONTROLLER_ADVICE)
        # What is learned
        self._forecast_error = tally.histogram(names.CONTROLLER_FORECAST_ERROR)
        self._forecast_margin = tally.gauge(names.CONTROLLER_FORECAST_MARGIN)
        self._expected_start = tally.gauge(names.CONTROLLER_EXPECTED_START)
        self._learned_ratio = tally.gauge(names.CONTROLLER_LEARNED_RATIO)
        self._zone_losses = tally.gauge(names.CONTROLLER_ZONE_LOSSES)
        self._zone_avoided = tally.gauge(names.CONTROLLER_ZONE_AVOIDED)
        # What came of it
        self._hindsight = tally.gauge(names.CONTROLLER_HINDSIGHT)
        self._hindsight_span = tally.gauge(names.CONTROLLER_HINDSIGHT_SPAN)
        self._hindsight_time = tally.gauge(names.CONTROLLER_HINDSIGHT_TIME)
        self._load_error = tally.gauge(names.CONTROLLER_LOAD_ERROR)
        self._within_spare = tally.gauge(names.CONTROLLER_WITHIN_SPARE)
        self._wait_error = tally.gauge(names.CONTROLLER_WAIT_ERROR)
        self._start_error = tally.gauge(names.CONTROLLER_START_ERROR)
        # Targets
        self._slo = tally.gauge(names.CONTROLLER_SLO)
        self._wait_limit = tally.gauge(names.CONTROLLER_WAIT_LIMIT)
        # Money
        self._spend = tally.counter(names.CONTROLLER_SPEND)
        self._spend_rate = tally.gauge(names.CONTROLLER_SPEND_RATE)
        self._budget_rate = tally.gauge(names.CONTROLLER_BUDGET_RATE)
        self._budget_day = tally.gauge(names.CONTROLLER_BUDGET_DAY)
        self._spent_today = tally.gauge(names.CONTROLLER_SPENT_TODAY)
        self._price = tally.gauge(names.CONTROLLER_PRICE)
        self._price_time = tally.gauge(names.CONTROLLER_PRICE_TIME)
        self._external_price = tally.gauge(names.CONTROLLER_EXTERNAL_PRICE)
        self._cost = tally.counter(names.CONTROLLER_COST)
        self._energy = tally.counter(names.CONTROLLER_ENERGY)
        self._money_time = tally.gauge(names.CONTROLLER_MONEY_TIME)
        # The loop
        self._report_age = tally.gauge(names.CONTROLLER_REPORT_AGE)
        self._failing = tally.gauge(names.CONTROLLER_FAILING)
        self._loop = tally.histogram(names.CONTROLLER_LOOP_DURATION)
        # Engines
        self._running = tally.gauge(names.GROUP_RUNNING)
        self._waiting = tally.gauge(names.GROUP_WAITING)
        self._kv_use = tally.gauge(names.GROUP_KV_USE)
        self._kv_tokens = tally.gauge(names.GROUP_KV_TOKENS)
        self._preemptions = tally.counter(names.GROUP_PREEMPTIONS)
        self._group_tokens = tally.counter(names.GROUP_TOKENS)
        self._expert_tokens = tally.counter(names.EXPERT_TOKENS)
        self._rank_tokens = tally.counter(names.RANK_TOKENS)
        self._layer_imbalance = tally.gauge(names.LAYER_IMBALANCE)
        self._writer = TextWriter()
        self._ranks = RankTotals()
        self._kept_groups: set[str] = set()
        self._spent_at_s: float | None = None

    def text(self) -> bytes:
        return self._writer.plain(self._tally.snapshot(), self._tally.metrics)

    def decided(
        self,
        decision: Decision,
        before: ModelState,
        config: ScalingConfig | None = None,
        now_s: float | None = None,
    ) -> None:
        """`config` and `now_s` are those of the decision; budgets, prices and zones need them."""
        model, load, demand, state = decision.model, decision.load, decision.demand, decision.state
        for action in decision.actions:
            self._decisions.labels(model, action.kind.value, decision.binding.value).inc()
        self._desired.labels(model).set(state.wanted)
        self._need.labels(model).set(decision.need)
        self._demand.labels(model).set(demand.work)
        self._queued.labels(model).set(demand.queued)
        self._oldest_wait.labels(model).set(demand.oldest_wait_s)
        self._predicted_wait.labels(model).set(load.wait_s)
        for part in ("now", "expected", "spare", "needed", "held", "ready", "coming"):
            self._load.labels(model, part).set(getattr(load, part))
        for family in (self._binding, self._target, self._advice):
            family.drop("model", model)
        self._binding.labels(model, decision.binding.value).set(1)
        for option, count in decision.target.items():
            self._target.labels(model, option).set(count)
        for kind, count in Count(action.kind.value for action in decision.advice).items():
            self._advice.labels(model, kind).set(count)
        for error in forecast_errors(before.forecast, state.forecast):
            self._forecast_error.labels(model).observe(abs(error))
        self._forecast_margin.labels(model).set(state.forecast.margin)
        for option, start_s in state.start_s.items():
            self._expected_start.labels(model, option).set(start_s)
        for option, learned in state.learned.items():
            self._learned_ratio.labels(model, option).set(learned.seconds_ratio)
        self._spent_today.labels(model).set(state.spending.usd)
        self._see_transitions(decision, before)
        if config is not None and now_s is not None:
            self._see_config(config, state, now_s)

    def forget(self, model: str) -> None:
        """It is in no manifest any more, and its last group is gone."""
        gauges = (
            *(self._desired, self._need, self._demand, self._queued, self._oldest_wait),
            *(self._predicted_wait, self._load, self._binding, self._target, self._advice),
            *(self._forecast_margin, self._expected_start, self._learned_ratio),
            *(self._slo, self._wait_limit, self._spent_today),
            *(self._budget_rate, self._budget_day, self._external_price),
            *self._looked_back(),
        )
        for family in gauges:
            family.drop("model", model)

    def priced(self, pool: str, usd_per_node_hour: float, at_s: float) -> None:
        """Whenever the price of a pool has been read."""
        self._price.labels(pool).set(usd_per_node_hour)
        self._price_time.labels(pool).set(at_s)

    def turned(
        self,
        states: Mapping[str, ModelState],
        report_ages_s: Mapping[str, float],
        now_s: float,
        duration_s: float,
        failing: Mapping[str, int] | None = None,
    ) -> None:
        """`failing`: failures in a row by step of the loop."""
        records = [record for state in states.values() for record in state.groups]
        self._count_groups(records)
        self._count_spend(records, now_s)
        self._report_age.clear()
        for gateway, age_s in report_ages_s.items():
            self._report_age.labels(gateway).set(age_s)
        self._failing.clear()
        for step, count in (failing or {}).items():
            self._failing.labels(step).set(count)
        self._loop.labels().observe(duration_s)
        self._keep_groups(records)

    def saw_ranks(self, ranks: Iterable[RankInfo | None], pools: Mapping[str, str]) -> None:
        """Adds what each rank has done since the last look; one that restarted counts from zero.
        `pools`: by group; a rank of another group is passed over."""
        layers: dict[tuple[str, str, str, str], list[tuple[int, int, int]]] = {}
        for info in ranks:
            pool = None if info is None else pools.get(info.group)
            if info is None or pool is None:
                continue
            labels = (info.model, pool, info.group)
            grown = self._ranks.grown(info)
            for expert, tokens in grown.expert_tokens.items():
                self._expert_tokens.labels(*labels, expert).inc(tokens)
            if grown.expert_tokens:
                self._rank_tokens.labels(*labels, str(info.rank)).inc(
                    sum(grown.expert_tokens.values())
                )
            for layer, peak in info.layers.items():
                layers.setdefault((*labels, layer), []).append(peak)
            tokens_of = self._group_tokens.labels
            tokens_of(*labels, "in").inc(grown.prompt_tokens)
            tokens_of(*labels, "cached").inc(grown.cached_tokens)
            tokens_of(*labels, "out").inc(grown.output_tokens)
            self._preemptions.labels(*labels).inc(grown.preemptions)
        for of_layer, peaks in layers.items():
            total, experts = sum(peak[1] for peak in peaks), sum(peak[2] for peak in peaks)
            busiest = max(peak[0] for peak in peaks)
            self._layer_imbalance.labels(*of_layer).set(busiest * experts / total if total else 1.0)

    def saw_loads(self, records: Iterable[GroupRecord], loads: Mapping[str, GroupLoad]) -> None:
        """What engines do now, by group."""
        for family in (self._running, self._waiting, self._kv_use, self._kv_tokens):
            family.clear()
        for record in records:
            load = loads.get(record.spec.name)
            if load is None or record.state not in (GroupState.READY, GroupState.DRAINING):
                continue
            labels = (record.spec.model, record.spec.pool, record.spec.name)
            self._running.labels(*labels).set(load.running)
            self._waiting.labels(*labels).set(load.waiting)
            self._kv_use.labels(*labels).set(load.kv_usage)
            self._kv_tokens.labels(*labels).set(load.kv_tokens)

    def counted_money(self, cells: Mapping[Cell, UsageRow], until_s: float) -> None:
        """What the ledger says of the time since the last call, which ends with `until_s`."""
        for cell, row in cells.items():
            parts = {
                "attributed": row.attributed_nano_usd - row.external_nano_usd,
                "external": row.external_nano_usd,
                "idle": row.idle_nano_usd,
                "starting": row.starting_nano_usd,
                "draining": row.draining_nano_usd,
                "idle_nodes": row.idle_nodes_nano_usd,
            }
            model, pool = cell.under(By.MODEL), cell.under(By.POOL)
            for part, nano_usd in parts.items():
                if nano_usd:
                    self._cost.labels(model, pool, part).inc(nano_usd / _NANO_USD_PER_USD)
            if row.energy_uj:
                self._energy.labels(model, pool).inc(row.energy_uj / _UJ_PER_J)
        self._money_time.labels().set(until_s)

    def looked_back(self, model: str, regret: Regret | None, found: Calibration | None) -> None:
        """Of the last day's cost, and of the last hour's expectations; None: nothing is known."""
        for family in self._looked_back():
            family.drop("model", model)
        if regret is not None:
            self._hindsight.labels(model, "spent").set(regret.spent_usd)
            self._hindsight.labels(model, "least").set(regret.least.usd)
            self._hindsight_span.labels(model).set(regret.until_s - regret.since_s)
            self._hindsight_time.labels(model).set(regret.until_s)
        if found is None:
            return
        for family, errors in (
            (self._load_error, found.load_error),
            (self._wait_error, found.wait_error_s),
        ):
            if errors is not None:
                family.labels(model, "0.1").set(errors.p10)
                family.labels(model, "0.5").set(errors.p50)
                family.labels(model, "0.9").set(errors.p90)
        if found.within_spare is not None:
            self._within_spare.labels(model).set(found.within_spare)
        for starts in found.starts:
            if starts.took_s is not None and starts.expected_s > 0:
                ratio = starts.took_s.p50 / starts.expected_s
                self._start_error.labels(model, starts.option).set(ratio)

    def _looked_back(self) -> tuple[Family[GaugeChild], ...]:
        return (
            *(self._hindsight, self._hindsight_span, self._hindsight_time),
            *(self._load_error, self._within_spare, self._wait_error, self._start_error),
        )

    def _see_transitions(self, decision: Decision, before: ModelState) -> None:
        known = {record.spec.name: record for record in before.groups}
        for step in decision.transitions:
            was = "" if step.before is None else step.before.value
            self._transitions.labels(decision.model, step.pool, was, step.after.value).inc()
            record = known.get(step.group)
            if (
                step.before is GroupState.STARTING
                and step.after is GroupState.READY
                and record is not None
                and not record.served
                and not record.adopted
            ):
                after = next(r for r in decision.state.groups if r.spec.name == step.group)
                took_s = after.since_s - record.requested_at_s
                self._start.labels(decision.model, step.pool).observe(took_s)

    def _see_config(self, config: ScalingConfig, state: ModelState, now_s: float) -> None:
        rules = config.rules
        if rules.usd_per_hour_budget is not None:
            self._budget_rate.labels(config.model).set(rules.usd_per_hour_budget)
        if rules.usd_per_day_budget is not None:
            self._budget_day.labels(config.model).set(rules.usd_per_day_budget)
        self._slo.labels(config.model).set(config.slo.attainment)
        self._wait_limit.labels(config.model).set(config.max_wait_s)
        for pool in config.pools:
            # An increase can only be seen of a series that was there before.
            for before in (GroupState.STARTING, GroupState.READY):
                self._transitions.labels(config.model, pool.name, before.value, _LOST)
            if self._price.labels(pool.name).value != pool.usd_per_node_hour or not (
                self._price_time.labels(pool.name).value
            ):
                self.priced(pool.name, pool.usd_per_node_hour, now_s)
        for route in config.external:
            price = self._external_price.labels
            price(config.model, route.pool, "in").set(route.usd_per_mtok_in)
            price(config.model, route.pool, "cached").set(route.usd_per_mtok_cached)
            price(config.model, route.pool, "out").set(route.usd_per_mtok_out)
        for name, zone in state.zones.items():
            self._zone_losses.labels(name).set(zone.losses_per_hour(now_s))
            self._zone_avoided.labels(name).set(not zone.is_admitted(now_s))

    def _count_groups(self, records: list[GroupRecord]) -> None:
        count = Count((r.spec.model, r.spec.pool, r.state.value) for r in records)
        self._groups.clear()
        for labels, groups in count.items():
            self._groups.labels(*labels).set(groups)

    def _count_spend(self, records: list[GroupRecord], now_s: float) -> None:
        passed_s = max(0.0, now_s - self._spent_at_s) if self._spent_at_s is not None else 0.0
        self._spent_at_s = now_s
        self._spend_rate.clear()
        for record in records:
            spec = record.spec
            self._spend_rate.labels(spec.model, spec.pool).inc(spec.usd_per_hour)
            self._spend.labels(spec.model, spec.pool).inc(
                spec.usd_per_hour * passed_s / _SECONDS_PER_HOUR
            )

    def _keep_groups(self, records: list[GroupRecord]) -> None:
        """Names of groups are never used again: the series of those that are gone go too."""
        groups = {record.spec.name for record in records}
        if groups == self._kept_groups:
            return
        self._kept_groups = groups
        self._ranks.keep(groups)
        for family in (
            *(self._expert_tokens, self._rank_tokens, self._group_tokens, self._preemptions),
            self._layer_imbalance,
        ):
            family.keep("group", groups)


def forecast_errors(before: Forecaster, after: Forecaster) -> list[float]:
    """In groups, of each forecast that has fallen due: positive where the load was above it."""
    closed = after.bin_number - before.bin_number
    if closed <= 0:
        return []
    means = after.bins[-closed:]
    first = after.bin_number - len(means)
    actual = {first + index: mean for index, mean in enumerate(means)}
    due = {each.bin_number: each.guess for each in before.due}
    return [mean - due[number] for number, mean in actual.items() if number in due]
