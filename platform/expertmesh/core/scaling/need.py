"""What the load needs: demand, learned rates, load and forecast, and when a change of it counts."""

import math
from dataclasses import replace

from expertmesh.core.domain.fleet import GroupState
from expertmesh.core.scaling.contract import Binding, Load, Rise
from expertmesh.core.scaling.demand import measure
from expertmesh.core.scaling.kinds import kinds_of, option_name
from expertmesh.core.scaling.learning import learn, usual_ratio
from expertmesh.core.scaling.load import Serving
from expertmesh.core.scaling.load import measure_load as load_of
from expertmesh.core.scaling.turn import Turn

_ANY_LOAD = 1e-6
"""Of a model that is used at all: it needs a group."""


def measure_demand(turn: Turn) -> None:
    turn.demand = measure(
        turn.observation.gateways,
        turn.groups.keys(),
        turn.now_s,
        stale_s=turn.timing.gateway_stale_s,
        forget_s=turn.timing.gateway_forget_s,
    )
    # What only external providers serve waits and runs nowhere here.
    comes = turn.demand.work > 0 or turn.demand.flow.arrivals_per_s > 0
    if comes or turn.why_unseen() is not None:
        turn.idle_since_s = None
    elif turn.idle_since_s is None:
        turn.idle_since_s = turn.now_s


def learn_rates(turn: Turn) -> None:
    if turn.why_unseen() is None:
        turn.work = turn.work.seen(turn.demand, turn.over_s)
    usual = usual_ratio(turn.learned.values(), turn.now_s)
    for record in turn.in_state(GroupState.READY):
        doing = turn.seen_of(record).doing
        option = next((o for o in turn.config.options if o.name == option_name(record.spec)), None)
        settled_s = turn.now_s - record.since_s
        if doing is None or option is None or settled_s < doing.span_s:
            continue
        if not turn.config.is_current(record.spec):
            continue
        if turn.now_s - doing.at_s > turn.timing.gateway_stale_s:
            continue
        learned = learn(
            turn.learned.get(option.name),
            option.rates,
            doing,
            turn.work,
            turn.config.slo,
            turn.over_s,
            usual,
        )
        if learned is not None:
            turn.learned[option.name] = learned


def measure_load(turn: Turn) -> None:
    """The load now, when a group could be ready, and with what is kept in hand."""
    state = replace(turn.before, seen_at_s=turn.now_s, learned=turn.learned, start_s=turn.start_s)
    active = turn.active()
    leaving = [r for r in turn.in_state(GroupState.READY) if r.leaving_at_s is not None]
    there = [*active, *leaving]
    turn.kinds = kinds_of(turn.config, state, turn.work, [record.spec for record in there])
    waking = _is_waking(turn)
    load = load_of(
        turn.kinds,
        [
            Serving(
                turn.kind_of(record),
                turn.now_s - record.since_s if record.state is GroupState.READY else None,
                turn.in_flight(record),
                turn.seen_of(record).doing,
                stays=record.leaving_at_s is None,
            )
            for record in there
        ],
        turn.demand,
        turn.work,
        turn.config.slo,
        waking=waking,
    )
    if load.by_tokens:
        horizon_s = _start_horizon_s(turn)
        group = (load.ready + load.coming) / len(active) if active else 1.0
        if turn.why_unseen() is None:
            turn.forecast = turn.forecast.seen(
                load.now, turn.over_s, horizon_s, turn.config.slo.attainment, group
            )
        expected = turn.forecast.expected(horizon_s, load.now)
        spare = turn.forecast.spare(expected, group, turn.config.slo.attainment)
        work_off_s = max(horizon_s, turn.config.slo.ttft_s)
        if waking:
            work_off_s = max(work_off_s, _patience_s(turn))
        load = replace(
            load,
            expected=expected,
            spare=spare,
            needed=expected + spare + load.backlog_s / work_off_s,
        )
    if turn.demand.work > 0:
        load = replace(load, needed=max(load.needed, _ANY_LOAD))
    _follow_need(turn, load)


def _is_waking(turn: Turn) -> bool:
    """What waits has waited for a cold start: no group has been ready for as long as requests
    may wait."""
    return all(
        not record.adopted and turn.now_s - record.since_s < turn.config.max_wait_s
        for record in turn.in_state(GroupState.READY)
    )


def _patience_s(turn: Turn) -> float:
    """Of the oldest request that waits, from when the first group is ready: in so long the queue
    of a cold start may be worked off."""
    if turn.in_state(GroupState.READY):
        first_s = 0.0
    else:
        coming = [
            max(0.0, record.expected_ready_at_s - turn.now_s)
            for record in turn.active()
            if record.expected_ready_at_s is not None
        ]
        first_s = min(coming, default=_start_horizon_s(turn))
    return turn.config.max_wait_s - turn.demand.oldest_wait_s - first_s


def _follow_need(turn: Turn, load: Load) -> None:
    """A higher need counts once it has held for a moment; a lower one after as long as a
    restart would take."""
    hold_s = turn.hold_s()
    blind = turn.why_unseen() is not None
    if blind:
        # A need that cannot be seen has not gone.
        turn.peak = turn.peak.later(max(0.0, turn.now_s - (turn.before.seen_at_s or 0.0)))
    else:
        # What runs is taken to be needed until it has been seen for long enough.
        first = turn.before.seen_at_s is None
        there = load.ready + load.coming if first else 0.0
        turn.peak = turn.peak.seen(max(load.needed, there), turn.now_s, hold_s)
    idle = turn.is_idle() and not blind
    if idle:
        # Means fade slowly: what is left of them is no need.
        load = replace(load, needed=0.0)
    held = 0.0 if idle else max(load.needed, turn.peak.since(turn.now_s - hold_s))
    turn.load = replace(load, held=held)
    turn.planned_load = load.needed
    there = load.ready + load.coming
    if load.needed <= there + 1e-9:
        turn.rise = None
        return
    if turn.rules.up_delay_s == 0.0:
        return
    rise = turn.rise
    if rise is None or 0.0 < rise.held <= there:
        # What has held is met by what is coming: this is another rise.
        rise = Rise(turn.now_s, load.needed)
    turn.rise = replace(rise, load=min(rise.load, load.needed))
    due_s = rise.since_s + turn.rules.up_delay_s
    if turn.now_s >= due_s:
        turn.planned_load = turn.rise.load
        turn.rise = Rise(turn.now_s, load.needed, held=turn.rise.load)
        if not rise.held:
            held_s = turn.now_s - rise.since_s
            turn.notes.append(f"the higher need has held for {held_s:.1f} s")
        return
    turn.wakes_s.append(due_s)
    if rise.held:
        turn.planned_load = min(rise.held, load.needed)
        return
    turn.binding = Binding.DELAY
    if there == 0:
        turn.planned_load = _ANY_LOAD
        turn.notes.append("waking from zero at once")
    else:
        turn.planned_load = there
        need = math.ceil(load.needed - 1e-9)
        turn.notes.append(f"a need of {need} must hold {due_s - turn.now_s:.1f} s more")


def _start_horizon_s(turn: Turn) -> float:
    """The quickest start: a need within it can still be met."""
    offered = [kind.start_s for kind in turn.kinds.all if kind.is_offered]
    return min(offered, default=0.0)


def count_spending(turn: Turn) -> None:
    cost = sum(record.spec.usd_per_hour for record in turn.groups.values())
    turn.spending = turn.spending.spent(cost, turn.over_s, turn.now_s)
    limits = []
    if turn.rules.usd_per_hour_budget is not None:
        limits.append(turn.rules.usd_per_hour_budget)
    if turn.rules.usd_per_day_budget is not None:
        rate = turn.spending.rate_usd_per_hour(
            turn.rules.usd_per_day_budget, turn.rules.drain_deadline_s, turn.now_s
        )
        limits.append(rate)
    turn.usd_per_hour_limit = min(limits, default=None)
