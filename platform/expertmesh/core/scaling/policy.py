"""How many groups of one model there should be, of which kinds, and why.

One decision, in order: what is there (adopt, follow each group's life), what it does (demand,
learned rates, load, forecast), what there should be (the cheapest mix that carries the load, within
bounds), and what to do about it (end drains, recall, start, release).
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from expertmesh.core.domain.deployment import ScalingMode
from expertmesh.core.domain.fleet import ExternalUse, GroupSpec, GroupState
from expertmesh.core.domain.hardware import Market, Pool
from expertmesh.core.scaling.capacity import capacity_workers, held_workers, room_workers
from expertmesh.core.scaling.contract import (
    Action,
    ActionKind,
    Backoff,
    Binding,
    Decision,
    GroupRecord,
    GroupSeen,
    Load,
    ModelState,
    Observation,
    Rise,
    ScalingConfig,
    Transition,
    workers_of,
)
from expertmesh.core.scaling.demand import Demand, is_drained, measure
from expertmesh.core.scaling.kinds import (
    Kind,
    Kinds,
    kinds_of,
    miss_usd_per_hour,
    offer,
    option_name,
)
from expertmesh.core.scaling.learning import learn, usual_ratio
from expertmesh.core.scaling.lifecycle import Room, advance, enter
from expertmesh.core.scaling.load import Serving, measure_load
from expertmesh.core.scaling.mix import Bounds, Mix, Need, Offer
from expertmesh.core.scaling.naming import next_free_name, number_of
from expertmesh.core.scaling.spot import Zone
from expertmesh.core.scaling.target import (
    Obstacle,
    Problem,
    Target,
    find_target,
    with_offers,
    with_workers,
    without_budget,
    without_grant,
    without_max_groups,
)
from expertmesh.core.scaling.wording import groups, reason_of

LONGEST_SLEEP_S = 60.0
"""A journal entry and a gateway's clock need no more often than this."""
_CENT_OF_A_CENT_USD = 1e-4
"""Sums of prices are compared with the budget up to this."""
_START_AVERAGE_WEIGHT = 0.3
"""Weight of the newest start in an option's moving average."""
_LONGEST_STEP_S = 60.0
"""A longer time between two decisions teaches nothing about what happened in it."""
_ANY_LOAD = 1e-6
"""Of a model that is used at all: it needs a group."""
_ANY_WORKERS = 1 << 30
_SERVING = (GroupState.READY, GroupState.DRAINING)
_SHORTAGES = (
    Binding.BACKOFF,
    Binding.GRANT,
    Binding.BUDGET,
    Binding.MAX_GROUPS,
    Binding.ROOM,
)
_HOLD_STARTS = 2.0
"""A group that is not needed is kept for so many starts' times: one is what holding it may cost
before a restart is cheaper, the other what a restart makes requests miss (simulated days)."""
_WAKE_PENALTY = 3.0
"""A restart that makes a request wait is worth that many times its price."""


_NOTHING = Mix(counts=(), capacity=0.0, short=0.0, uncovered=0.0, usd=0.0, usd_per_hour=0.0)


def decide(
    config: ScalingConfig, state: ModelState, observation: Observation, now_s: float
) -> Decision:
    """One decision for one model; the caller records it and only then acts on it."""
    decision = _Turn(config, state, observation, now_s).run()
    if config.rules.mode is ScalingMode.ADVISE:
        acting = replace(config, rules=replace(config.rules, mode=ScalingMode.ACT))
        advice = _Turn(acting, state, observation, now_s).run().actions
        decision = replace(decision, advice=advice)
        would = ", ".join(f"{action.kind} {action.group}" for action in advice)
        if would:
            decision = replace(decision, reason=f"{decision.reason}; would {would}")
    return decision


@dataclass(frozen=True, slots=True)
class Question:
    """What a decision answers; all by the order of `kinds`."""

    problem: Problem
    obstacles: tuple[Obstacle, ...]
    kinds: Kinds
    load: Load
    ready: tuple[int, ...]
    """Of the active groups."""
    held_back: Mapping[str, str]
    """By option, why none is started of it now."""
    usd_per_hour_limit: float | None
    """Of the model's budgets by the hour and by the day."""


def question_at(
    config: ScalingConfig, state: ModelState, observation: Observation, now_s: float
) -> Question:
    """The question that `decide` answers, for those who explain its answer."""
    turn = _Turn(config, state, observation, now_s)
    turn.look()
    return turn.question()


class _Turn:
    """The working values of one decision, so that each step reads as one thing."""

    def __init__(
        self, config: ScalingConfig, state: ModelState, observation: Observation, now_s: float
    ) -> None:
        self.config = config
        self.rules = config.rules
        self.timing = config.timing
        self.observation = observation
        self.now_s = now_s
        self.pools = {pool.name: pool for pool in config.pools}
        self.pools_seen = {seen.name: seen for seen in observation.pools}
        self.seen = {seen.name: seen for seen in observation.groups}

        self.before = state
        since_s = now_s - state.seen_at_s if state.seen_at_s is not None else 0.0
        # A clock that jumps, or a long pause, is no time in which anything was seen.
        self.over_s = since_s if 0.0 < since_s <= _LONGEST_STEP_S else 0.0
        # A clock that was set back leaves times in the future, which would hold things for as long.
        self.groups = {
            record.spec.name: replace(record, since_s=min(record.since_s, now_s))
            for record in state.groups
        }
        self.next_n = state.next_n
        idle_s = state.idle_since_s
        self.idle_since_s = None if idle_s is None else min(idle_s, now_s)
        rise = state.rise
        self.rise = None if rise is None else replace(rise, since_s=min(rise.since_s, now_s))
        self.peak = state.peak
        self.work = state.work
        self.forecast = state.forecast
        self.learned = dict(state.learned)
        self.zones = dict(state.zones)
        self.spending = state.spending
        latest_s = now_s + self.timing.backoff_max_s
        self.backoff = {
            pool: replace(backoff, until_s=min(backoff.until_s, latest_s))
            for pool, backoff in state.backoff.items()
        }
        self.start_s = dict(state.start_s)

        self.demand = Demand()
        self.kinds = Kinds((), by_tokens=False)
        self.load = Load()
        self.planned_load = 0.0
        """Of the load that is needed, the part that has held for long enough."""
        self.target = Target({}, {}, _NOTHING, Binding.LOAD)
        self.binding = Binding.LOAD
        self.usd_per_hour_limit: float | None = None
        self.there: tuple[int, ...] = ()
        """Active groups by kind, when the target was chosen."""
        self.actions: list[Action] = []
        self.transitions: list[Transition] = []
        self.obstacles: list[str] = []
        self.notes: list[str] = []
        self.wakes_s: list[float] = []

    def run(self) -> Decision:
        self.look()
        self.find_target()
        self.end_drains()
        if self._may_act():
            self.leave_taken_nodes()
            self.fill()
            self.release()
        return self.decision()

    def look(self) -> None:
        self.adopt()
        self.advance_groups()
        self.measure_demand()
        self.learn_rates()
        self.measure_load()
        self.count_spending()

    def question(self) -> Question:
        reasons = {kind.name: self._why_held_back(kind) for kind in self.kinds.all}
        return Question(
            problem=self._problem(),
            obstacles=self._lifts(),
            kinds=self.kinds,
            load=self.load,
            ready=tuple(
                sum(r.state is GroupState.READY for r in self._active_of(kind.name))
                for kind in self.kinds.all
            ),
            held_back={name: why for name, why in reasons.items() if why is not None},
            usd_per_hour_limit=self.usd_per_hour_limit,
        )

    # What is there

    def adopt(self) -> None:
        """Take over running groups of this model that the state does not know.

        What Serve runs counts, not what was recorded: another spec would restart the group.
        """
        for seen in self.observation.groups:
            if seen.spec is None or seen.application is None:
                continue
            known = self.groups.get(seen.name)
            if known is not None:
                self.groups[seen.name] = replace(known, spec=seen.spec)
                continue
            leaving = seen.application.status == "DELETING"
            record = GroupRecord(
                spec=seen.spec,
                state=GroupState.DRAINING if leaving else GroupState.STARTING,
                since_s=self.now_s,
                requested_at_s=self.now_s if seen.held_since_s is None else seen.held_since_s,
                expected_ready_at_s=None if leaving else self.now_s,
                adopted=True,
                removed_at_s=self.now_s if leaving else None,
            )
            self._keep(record, None, "adopted: it runs and belongs to this model")
            self.next_n = max(self.next_n, number_of(seen.name) + 1)

    def advance_groups(self) -> None:
        # Newest first: when a pool has become too small, the newest group gives way.
        for record in sorted(self.groups.values(), key=_age_key, reverse=True):
            seen = self.seen.get(record.spec.name, GroupSeen(record.spec.name, None))
            after, removal = advance(
                self.config, record, seen, self.observation, self._room_for(record), self.now_s
            )
            if after.state is not record.state:
                self._keep(after, record.state, after.message)
                self._learn_start(record, after)
            else:
                self.groups[record.spec.name] = after
            self._watch_zone(after, seen)
            if after.state is GroupState.GONE:
                del self.groups[record.spec.name]
            elif removal is not None and self._may_act() and self.observation.settled:
                self._remove(after, removal.why)
            if after.state is GroupState.LOST and after.removed_at_s is None:
                self.wakes_s.append(after.since_s + self.timing.restart_grace_s)
            if after.state is GroupState.STARTING:
                self.wakes_s.append(after.since_s + self.config.start_deadline_s(after.spec))

    def _watch_zone(self, record: GroupRecord, seen: GroupSeen) -> None:
        zone_name = self._zone_of(record.spec.pool)
        if zone_name is None:
            return
        zone = self.zones.get(zone_name, Zone(up_since_s=self.now_s))
        dead = seen.application is not None and any(
            replica.node_alive is False for replica in seen.application.replicas
        )
        if dead or seen.leaving_at_s is not None:
            zone = zone.lost(self.now_s)
        elif record.state is GroupState.READY:
            share = sum(
                other.spec.pool == record.spec.pool and other.state is GroupState.READY
                for other in self.groups.values()
            )
            zone = zone.watched(self.over_s / max(1, share), self.now_s)
        self.zones[zone_name] = zone

    # What it does

    def measure_demand(self) -> None:
        self.demand = measure(
            self.observation.gateways,
            self.groups.keys(),
            self.now_s,
            stale_s=self.timing.gateway_stale_s,
            forget_s=self.timing.gateway_forget_s,
        )
        # What only external providers serve waits and runs nowhere here.
        comes = self.demand.work > 0 or self.demand.flow.arrivals_per_s > 0
        if comes or self._why_unseen() is not None:
            self.idle_since_s = None
        elif self.idle_since_s is None:
            self.idle_since_s = self.now_s

    def learn_rates(self) -> None:
        if self._why_unseen() is None:
            self.work = self.work.seen(self.demand, self.over_s)
        usual = usual_ratio(self.learned.values())
        for record in self._in_state(GroupState.READY):
            doing = self._seen_of(record).doing
            option = next(
                (o for o in self.config.options if o.name == option_name(record.spec)), None
            )
            settled_s = self.now_s - record.since_s
            if doing is None or option is None or settled_s < doing.span_s:
                continue
            if self.now_s - doing.at_s > self.timing.gateway_stale_s:
                continue
            learned = learn(
                self.learned.get(option.name),
                option.rates,
                doing,
                self.work,
                self.config.slo,
                self.over_s,
                usual,
            )
            if learned is not None:
                self.learned[option.name] = learned

    def measure_load(self) -> None:
        """The load now, when a group could be ready, and with what is kept in hand."""
        state = replace(self.before, learned=self.learned, start_s=self.start_s)
        active = self._active()
        self.kinds = kinds_of(self.config, state, self.work, [record.spec for record in active])
        load = measure_load(
            self.kinds,
            [
                Serving(
                    self._kind(record),
                    self.now_s - record.since_s if record.state is GroupState.READY else None,
                    self._in_flight(record),
                    self._seen_of(record).doing,
                )
                for record in active
            ],
            self.demand,
            self.work,
            self.config.slo,
        )
        if load.by_tokens:
            horizon_s = self._start_horizon_s()
            group = (load.ready + load.coming) / len(active) if active else 1.0
            if self._why_unseen() is None:
                self.forecast = self.forecast.seen(
                    load.now, self.over_s, horizon_s, self.config.slo.attainment, group
                )
            expected = self.forecast.expected(horizon_s, load.now)
            spare = self.forecast.spare(expected, group, self.config.slo.attainment)
            work_off_s = max(horizon_s, self.config.slo.ttft_s)
            load = replace(
                load,
                expected=expected,
                spare=spare,
                needed=expected + spare + load.backlog_s / work_off_s,
            )
        if self.demand.work > 0:
            load = replace(load, needed=max(load.needed, _ANY_LOAD))
        self._follow_need(load)

    def _follow_need(self, load: Load) -> None:
        """A higher need counts once it has held for a moment; a lower one after as long as a
        restart would take."""
        hold_s = self._hold_s()
        blind = self._why_unseen() is not None
        if blind:
            # A need that cannot be seen has not gone.
            self.peak = self.peak.later(max(0.0, self.now_s - (self.before.seen_at_s or 0.0)))
        else:
            # What runs is taken to be needed until it has been seen for long enough.
            first = self.before.seen_at_s is None
            there = load.ready + load.coming if first else 0.0
            self.peak = self.peak.seen(max(load.needed, there), self.now_s, hold_s)
        idle = self._is_idle() and not blind
        if idle:
            # Means fade slowly: what is left of them is no need.
            load = replace(load, needed=0.0)
        held = 0.0 if idle else max(load.needed, self.peak.since(self.now_s - hold_s))
        self.load = replace(load, held=held)
        self.planned_load = load.needed
        there = load.ready + load.coming
        if load.needed <= there + 1e-9:
            self.rise = None
            return
        if self.rules.up_delay_s == 0.0:
            return
        rise = self.rise
        if rise is None or 0.0 < rise.held <= there:
            # What has held is met by what is coming: this is another rise.
            rise = Rise(self.now_s, load.needed)
        self.rise = replace(rise, load=min(rise.load, load.needed))
        due_s = rise.since_s + self.rules.up_delay_s
        if self.now_s >= due_s:
            self.planned_load = self.rise.load
            self.rise = Rise(self.now_s, load.needed, held=self.rise.load)
            if not rise.held:
                held_s = self.now_s - rise.since_s
                self.notes.append(f"the higher need has held for {held_s:.1f} s")
            return
        self.wakes_s.append(due_s)
        if rise.held:
            self.planned_load = min(rise.held, load.needed)
            return
        self.binding = Binding.DELAY
        if there == 0:
            self.planned_load = _ANY_LOAD
            self.notes.append("waking from zero at once")
        else:
            self.planned_load = there
            need = math.ceil(load.needed - 1e-9)
            self.notes.append(f"a need of {need} must hold {due_s - self.now_s:.1f} s more")

    def _hold_s(self) -> float:
        if self.rules.down_delay_s is not None:
            return self.rules.down_delay_s
        return _HOLD_STARTS * max((kind.start_s for kind in self.kinds.all), default=0.0)

    def _is_idle(self) -> bool:
        """For as long as a restart takes, longer where the next request is likely within it."""
        if self.idle_since_s is None:
            return False
        hold_s = self._hold_s()
        if self.rules.down_delay_s is None:
            soon = 1.0 - math.exp(-self.work.seldom_arrivals_per_s * hold_s)
            hold_s *= 1.0 + _WAKE_PENALTY * soon
        due_s = self.idle_since_s + hold_s
        if self.now_s < due_s:
            self.wakes_s.append(due_s)
        return self.now_s >= due_s

    def count_spending(self) -> None:
        cost = sum(record.spec.usd_per_hour for record in self.groups.values())
        self.spending = self.spending.spent(cost, self.over_s, self.now_s)
        limits = []
        if self.rules.usd_per_hour_budget is not None:
            limits.append(self.rules.usd_per_hour_budget)
        if self.rules.usd_per_day_budget is not None:
            rate = self.spending.rate_usd_per_hour(
                self.rules.usd_per_day_budget, cost, self.rules.drain_deadline_s, self.now_s
            )
            limits.append(rate)
        self.usd_per_hour_limit = min(limits, default=None)

    # What there should be

    def find_target(self) -> None:
        problem, obstacles = self._problem(), self._lifts()
        self.target = find_target(problem, obstacles)
        if self._why_unseen() is not None:
            counts = self._counts(self._active())
            there = {kind.name: counts[kind.name] for kind in self.kinds.all}
            self.target = replace(self.target, kept=there)
        if self.binding is Binding.LOAD:
            self.binding = self.target.binding
        if not self._may_plan():
            self.binding = Binding.MODE

    def _problem(self) -> Problem:
        kinds, rules = self.kinds, self.rules
        hours = kinds.horizon_s / 3600.0
        miss_usd = self._miss_usd_per_hour()
        risk = max(
            (
                self._losses_per_hour(kind) * kind.start_s / 3600.0
                for kind in kinds.all
                if kind.zone is not None
            ),
            default=0.0,
        )
        external_usd, overflows = self._external(hours)
        grant = self.observation.grant
        limits = [
            limit
            for limit in (self.usd_per_hour_limit, grant.usd_per_hour if grant else None)
            if limit is not None
        ]
        counts = self._counts(self._active())
        self.there = tuple(counts[kind.name] for kind in kinds.all)
        in_use = self.planned_load > 0 or self.load.held > 0
        return Problem(
            offers=self._offers(held_back=True),
            need=Need(
                load=self.planned_load,
                cover=min(self.load.expected, self.planned_load),
                short_usd=miss_usd * hours,
                uncovered_usd=miss_usd * hours * risk,
            ),
            held_load=self.load.held,
            active=self.there,
            bounds=Bounds(
                min_groups=min(rules.max_groups, max(rules.min_groups, int(in_use))),
                max_groups=rules.max_groups,
                workers=self._workers(granted=True),
                usd_per_hour=min(limits, default=None),
            ),
            may_be_empty=rules.min_groups == 0,
            external_usd=external_usd,
            overflows=overflows,
        )

    def _offers(self, *, held_back: bool) -> tuple[Offer, ...]:
        """`held_back`: not from pools where starts failed lately or zones that were just lost."""
        load = self.load
        late = max(0.0, min(1.0, max(load.now, load.needed) - load.ready - load.coming))
        miss_usd_per_hour = self._miss_usd_per_hour()
        external_usd, _ = self._external(1.0)
        if external_usd is not None:
            # Until a group is ready, a provider serves what would wait.
            miss_usd_per_hour = min(miss_usd_per_hour, external_usd)
        late_usd_per_hour = late * miss_usd_per_hour
        kept = self._counts([*self._active(), *self._recallable()])
        return tuple(
            offer(
                self.kinds,
                kind,
                kept[kind.name],
                self._losses_per_hour(kind),
                late_usd_per_hour,
                may_start=not held_back or self._why_held_back(kind) is None,
            )
            for kind in self.kinds.all
        )

    def _miss_usd_per_hour(self) -> float:
        return miss_usd_per_hour(self.kinds, self.config.slo)

    def _why_held_back(self, kind: Kind) -> str | None:
        pool = kind.option.pool
        backoff = self.backoff.get(pool)
        if backoff is not None and self.now_s < backoff.until_s:
            self.wakes_s.append(backoff.until_s)
            return (
                f"pool {pool} is left alone for {backoff.until_s - self.now_s:.0f} s "
                f"after {backoff.failures} failed starts"
            )
        zone = self.zones.get(kind.zone) if kind.zone is not None else None
        if zone is not None and not zone.is_admitted(self.now_s):
            return f"spot zone {kind.zone} was lost lately"
        return None

    def _losses_per_hour(self, kind: Kind) -> float:
        if kind.zone is None:
            return 0.0
        zone = self.zones.get(kind.zone, Zone(up_since_s=self.now_s))
        return zone.losses_per_hour(self.now_s)

    def _workers(self, *, granted: bool) -> dict[str, int]:
        """By pool, for all groups of this model that stay: theirs and what is free.

        Of a pool that cannot be seen, what they have.
        """
        workers: dict[str, int] = {}
        grant = self.observation.grant
        mine = [*self._active(), *self._recallable()]
        for name in {kind.option.pool for kind in self.kinds.all}:
            own = sum(workers_of(r.spec.parallelism) for r in mine if r.spec.pool == name)
            pool = self.pools.get(name)
            room = self._room_in(pool) if pool else None
            workers[name] = max(0, own + (room or 0))
            if granted and grant is not None and name in grant.workers:
                workers[name] = min(workers[name], grant.workers[name])
        return workers

    def _lifts(self) -> tuple[Obstacle, ...]:
        unlimited = {kind.option.pool: _ANY_WORKERS for kind in self.kinds.all}
        return (
            Obstacle(
                Binding.BACKOFF,
                lambda problem: with_offers(self._offers(held_back=False))(problem),
            ),
            Obstacle(
                Binding.GRANT,
                lambda problem: without_grant(
                    self._workers(granted=False), self.usd_per_hour_limit
                )(problem),
            ),
            Obstacle(Binding.BUDGET, without_budget),
            Obstacle(Binding.MAX_GROUPS, without_max_groups),
            Obstacle(Binding.ROOM, with_workers(unlimited)),
        )

    def _external(self, hours: float) -> tuple[float | None, bool]:
        """What a provider would take for a load of 1 over the horizon."""
        unit = self.kinds.unit
        if not self.config.external or unit is None or not unit.seconds:
            return None, False
        prompt, output = self.work.prompt_tokens, self.work.output_tokens
        usd, overflows = min(
            (
                (prompt * route.usd_per_mtok_in + output * route.usd_per_mtok_out) / 1e6,
                route.use is ExternalUse.OVERFLOW,
            )
            for route in self.config.external
        )
        return usd / unit.seconds * 3600.0 * hours, overflows

    # What to do

    def end_drains(self) -> None:
        for record in self._in_state(GroupState.DRAINING):
            deadline_s = record.since_s + self.rules.drain_deadline_s
            leaving_at_s = self._seen_of(record).leaving_at_s
            if leaving_at_s is not None:
                deadline_s = min(deadline_s, max(leaving_at_s, record.since_s))
            name = record.spec.name
            if is_drained(
                name,
                record.since_s,
                self.observation.gateways,
                self.now_s,
                stale_s=self.timing.gateway_stale_s,
                forget_s=self.timing.gateway_forget_s,
            ):
                why = "every gateway reports nothing in flight"
            elif self.now_s >= deadline_s:
                left = self._in_flight(record)
                why = f"{left} in flight at the deadline of {deadline_s - record.since_s:g} s"
            else:
                self.wakes_s.append(deadline_s)
                continue
            if self._may_act() and self.observation.settled:
                self._remove(record, why)

    def leave_taken_nodes(self) -> None:
        """Groups whose nodes will be taken: nothing more is sent to them."""
        for record in self._in_state(GroupState.READY):
            leaving_at_s = self._seen_of(record).leaving_at_s
            if leaving_at_s is not None:
                left_s = max(0.0, leaving_at_s - self.now_s)
                self._drain(record, f"a node of it will be taken away in {left_s:.0f} s")

    def fill(self) -> None:
        """Recall what drains, then start what is missing."""
        for name, count in self.target.counts.items():
            kind = self.kinds.named(name)
            missing = count - len(self._active_of(name))
            draining = [r for r in self._recallable() if option_name(r.spec) == name]
            for record in sorted(draining, key=self._price_key):
                if missing > 0:
                    self._recall(record)
                    missing -= 1
            for _ in range(missing):
                problem = self._why_not_start(kind)
                if problem is not None:
                    self.obstacles.append(problem)
                    break
                self._start(kind)
        if self.target.binding in _SHORTAGES:
            self._explain_shortage()

    def _recallable(self) -> list[GroupRecord]:
        return [
            record
            for record in self._in_state(GroupState.DRAINING)
            if self._seen_of(record).leaving_at_s is None
        ]

    def _recall(self, record: GroupRecord) -> None:
        self._act(ActionKind.RECALL, record, "wanted again while draining")
        self._keep(enter(record, GroupState.READY, self.now_s, ""), record.state, "recalled")

    def _why_not_start(self, kind: Kind) -> str | None:
        """What draining groups still occupy and cost, the target does not know."""
        option = kind.option
        staying = sum(record.removed_at_s is None for record in self.groups.values())
        if staying >= self.rules.max_groups:
            return f"{groups(staying)} of at most {self.rules.max_groups} are still there"
        pool = self.pools.get(option.pool)
        room = self._room_in(pool) if pool is not None else None
        if room is None:
            return f"the nodes of pool {option.pool} could not be listed"
        if room < option.workers:
            free = max(0, room)
            return f"no room in pool {option.pool} ({free} of {option.workers} workers free)"
        limit = self.usd_per_hour_limit
        cost = sum(record.spec.usd_per_hour for record in self.groups.values())
        if limit is not None and cost + option.usd_per_hour > limit + _CENT_OF_A_CENT_USD:
            return (
                f"a group in pool {option.pool} at ${option.usd_per_hour:.2f}/h exceeds the "
                f"budget of ${limit:.2f}/h"
            )
        return None

    def _explain_shortage(self) -> None:
        for kind in self.kinds.all:
            why = self._why_held_back(kind) or self._why_not_start(kind)
            if why is not None and kind.is_offered and why not in self.obstacles:
                self.obstacles.append(why)
        grant = self.observation.grant
        if self.binding in (Binding.GRANT, Binding.ROOM) and grant is not None and grant.why:
            self.obstacles.append(grant.why)
        if not self.obstacles and not self.config.options:
            self.obstacles.append("the model has no pool")

    def release(self) -> None:
        """Let go of what is not to be kept, while the ready groups that stay carry the load."""
        forced = self._is_beyond_bounds()
        growing = self._is_starting_more()
        if not forced and self._why_unseen() is not None:
            return
        surplus = {
            name: there - keep
            for (name, keep), there in zip(self.target.kept.items(), self.there, strict=True)
        }
        fresh = {action.group for action in self.actions}
        for record in sorted(self._active(), key=_release_key):
            name = option_name(record.spec)
            if surplus[name] <= 0 or record.spec.name in fresh:
                continue
            broken = record.state is GroupState.LOST
            if not forced and not broken and (growing or not self._is_dispensable(record)):
                continue
            surplus[name] -= 1
            self._release(record, forced)

    def _is_starting_more(self) -> bool:
        """Never up and down in one decision, unless dearer groups make way for cheaper ones."""
        started = any(a.kind in (ActionKind.START, ActionKind.RECALL) for a in self.actions)
        return started and not self.target.replaces

    def _is_beyond_bounds(self) -> bool:
        active = self._active()
        limit = self.usd_per_hour_limit
        grant = self.observation.grant
        if grant is not None and grant.usd_per_hour is not None:
            limit = min(limit if limit is not None else math.inf, grant.usd_per_hour)
        cost = sum(record.spec.usd_per_hour for record in active)
        if len(active) > self.rules.max_groups:
            return self._why_unseen() is None
        if limit is not None and cost > limit + _CENT_OF_A_CENT_USD:
            self.notes.append(f"the groups cost ${cost:.2f}/h of ${limit:.2f}/h")
            return True
        if grant is None:
            return False
        return any(
            sum(workers_of(r.spec.parallelism) for r in active if r.spec.pool == pool) > workers
            for pool, workers in grant.workers.items()
        )

    def _is_dispensable(self, record: GroupRecord) -> bool:
        """Whether it has been there for long enough, and the ready groups that would stay carry
        the load of now and are not too few."""
        if self.now_s - record.since_s < self._hold_s() and not self._is_idle():
            return False
        if record.state is not GroupState.READY or self.target.binding is Binding.EXTERNAL:
            return True
        rest = [
            other
            for other in self._in_state(GroupState.READY)
            if other.spec.name != record.spec.name
        ]
        capacity = sum(self.kinds.capacity(self._kind(other)) for other in rest)
        least = max(self.rules.min_groups, int(self.load.held > 0))
        return len(rest) >= least and capacity >= min(self.load.needed, self.load.ready) - 1e-9

    def _release(self, record: GroupRecord, forced: bool) -> None:
        price = f"${record.spec.usd_per_hour:.2f}/h in pool {record.spec.pool}"
        if forced:
            why = f"the groups cost more than they may or are too many, {price}"
            if self.observation.grant is not None:
                why = f"it makes way, {price}: {self.observation.grant.why}"
        else:
            left = sum(self.target.kept.values())
            why = f"{left} groups carry a load of {self.load.held:.2f}, {price}"
        match record.state:
            case GroupState.READY:
                self._drain(record, why)
            case GroupState.STARTING:
                draining = enter(record, GroupState.DRAINING, self.now_s, "no longer needed")
                self._keep(draining, record.state, why)
                self._remove(draining, why)
            case _:
                self._remove(record, why)

    def _drain(self, record: GroupRecord, why: str) -> None:
        self._act(ActionKind.DRAIN, record, why)
        draining = enter(record, GroupState.DRAINING, self.now_s, "no longer needed")
        self._keep(draining, record.state, why)

    def _start(self, kind: Kind) -> None:
        option = kind.option
        pool = self.pools[option.pool]
        name, n = next_free_name(
            self.config.model,
            pool.name,
            self.next_n,
            {*self.observation.names_elsewhere, *self.groups},
        )
        self.next_n = n + 1
        spec = GroupSpec(
            name=name,
            model=self.config.model,
            model_source=self.config.source,
            pool=pool.name,
            parallelism=option.parallelism,
            max_model_len=self.config.max_model_len,
            usd_per_hour=option.usd_per_hour,
            accelerator=pool.accelerator,
            engine=option.engine,
        )
        record = GroupRecord(
            spec=spec,
            state=GroupState.STARTING,
            since_s=self.now_s,
            requested_at_s=self.now_s,
            expected_ready_at_s=self.now_s + kind.start_s,
            message="asked for",
        )
        why = f"the cheapest that can be had, ${option.usd_per_hour:.2f}/h"
        if self.target.replaces:
            why = f"cheaper than what there is, ${option.usd_per_hour:.2f}/h"
        self.actions.append(Action(ActionKind.START, name, why, spec))
        self._keep(record, None, why)
        self.wakes_s.append(self.now_s + self.config.start_deadline_s(spec))

    # Small questions

    def _may_act(self) -> bool:
        return (
            self._may_plan() and self.observation.serve_answers and self.observation.journal_writes
        )

    def _may_plan(self) -> bool:
        return self.rules.mode is ScalingMode.ACT

    def _why_unseen(self) -> str | None:
        if not self.observation.serve_answers:
            return "Serve does not answer"
        if not self.observation.journal_writes:
            return "the journal cannot be written"
        if not self.observation.settled:
            return "the controller has just started"
        if self.demand.stale_gateways:
            return f"{self.demand.stale_gateways} gateway workers are silent"
        if not self.demand.live_gateways:
            return "no gateway reports"
        return None

    def _active(self) -> list[GroupRecord]:
        """Groups that serve, or will: a lost one that Serve may restart is one of them, unless its
        node has been or will be taken away."""
        return [
            record
            for record in self.groups.values()
            if record.removed_at_s is None
            and record.state is not GroupState.DRAINING
            and not self._is_being_taken(record)
        ]

    def _is_being_taken(self, record: GroupRecord) -> bool:
        if self._seen_of(record).leaving_at_s is not None:
            return True
        zone_name = self._zone_of(record.spec.pool)
        zone = self.zones.get(zone_name) if zone_name is not None else None
        lost = record.state is GroupState.LOST
        return lost and zone is not None and not zone.is_admitted(self.now_s)

    def _counts(self, records: Iterable[GroupRecord]) -> Counter[str]:
        """By option."""
        return Counter(option_name(record.spec) for record in records)

    def _active_of(self, option: str) -> list[GroupRecord]:
        return [record for record in self._active() if option_name(record.spec) == option]

    def _in_state(self, state: GroupState) -> list[GroupRecord]:
        return [
            record
            for record in self.groups.values()
            if record.state is state and record.removed_at_s is None
        ]

    def _seen_of(self, record: GroupRecord) -> GroupSeen:
        return self.seen.get(record.spec.name, GroupSeen(record.spec.name, None))

    def _in_flight(self, record: GroupRecord) -> int:
        name = record.spec.name
        return sum(seen.in_flight.get(name, 0) for seen in self.observation.gateways)

    def _kind(self, record: GroupRecord) -> Kind:
        return self.kinds.named(option_name(record.spec))

    def _zone_of(self, pool_name: str) -> str | None:
        pool = self.pools.get(pool_name)
        if pool is None or pool.market is not Market.SPOT:
            return None
        return pool.zone or pool.name

    def _start_horizon_s(self) -> float:
        """The quickest start: a need within it can still be met."""
        offered = [kind.start_s for kind in self.kinds.all if kind.is_offered]
        return min(offered, default=0.0)

    def _price_key(self, record: GroupRecord) -> tuple[float, str, float, int]:
        pool = record.spec.pool
        n = number_of(record.spec.name)
        return (record.spec.usd_per_hour, pool, record.requested_at_s, n)

    def _held(self, record: GroupRecord) -> int:
        leaving = self._seen_of(record).leaving_workers
        return held_workers(self.pools.get(record.spec.pool), record, leaving)

    def _room_in(self, pool: Pool) -> int | None:
        own = sum(self._held(r) for r in self.groups.values() if r.spec.pool == pool.name)
        return room_workers(pool, self.pools_seen.get(pool.name), own)

    def _room_for(self, record: GroupRecord) -> Room:
        """The groups that come before it are those that serve, and the older ones."""
        name = record.spec.pool
        seen = self.pools_seen.get(name)
        used = seen.staying_elsewhere if seen else 0
        used += sum(
            self._held(other)
            for other in self.groups.values()
            if other.spec.pool == name
            and other.spec.name != record.spec.name
            and other.removed_at_s is None
            and (other.state in _SERVING or _age_key(other) < _age_key(record))
        )
        needed = used + self._held(record)
        pool = self.pools.get(name)
        limit = capacity_workers(pool, seen) if pool else None
        live = seen.live_workers if seen else None
        return Room(
            possible=None if limit is None else needed <= limit,
            now=None if live is None else needed <= live,
        )

    # Bookkeeping

    def _keep(self, record: GroupRecord, before: GroupState | None, why: str) -> None:
        self.groups[record.spec.name] = record
        self.transitions.append(
            Transition(record.spec.name, record.spec.pool, before, record.state, why)
        )

    def _act(self, kind: ActionKind, record: GroupRecord, why: str) -> None:
        self.actions.append(Action(kind, record.spec.name, why))

    def _remove(self, record: GroupRecord, why: str) -> None:
        self._act(ActionKind.REMOVE, record, why)
        self.groups[record.spec.name] = replace(
            record, removed_at_s=self.now_s, message=f"removed: {why}"
        )

    def _learn_start(self, before: GroupRecord, after: GroupRecord) -> None:
        """Start durations and failures, from a state that has just been entered."""
        pool, option = after.spec.pool, option_name(after.spec)
        if before.state is not GroupState.STARTING:
            if after.state is GroupState.STARTING:
                planned = (o.start_s for o in self.config.options if o.name == option)
                expected_s = self.now_s + self.start_s.get(option, next(planned, 0.0))
                self.groups[after.spec.name] = replace(after, expected_ready_at_s=expected_s)
            return
        if after.state is GroupState.READY:
            self.backoff.pop(pool, None)
            if not before.adopted and not before.served:
                took_s = self.now_s - before.requested_at_s
                known_s = self.start_s.get(option, took_s)
                self.start_s[option] = known_s + _START_AVERAGE_WEIGHT * (took_s - known_s)
        elif after.failed_start:
            known = self.backoff.get(pool)
            failures = (known.failures if known else 0) + 1
            wait_s = min(
                self.timing.backoff_max_s, self.timing.backoff_first_s * 2 ** (failures - 1)
            )
            self.backoff[pool] = Backoff(failures, self.now_s + wait_s)

    # The answer

    def decision(self) -> Decision:
        pending = f"pending: {', '.join(self.obstacles)}" if self.obstacles else None
        blind = self._why_unseen()
        by_load = math.ceil(self.load.needed - 1e-9)
        if blind is not None and len(self._active()) > max(by_load, self.rules.min_groups):
            self.binding = Binding.UNSEEN
        need = max(self.rules.min_groups, min(self.rules.max_groups, by_load))
        wanted = sum(
            max(count, self.target.kept.get(name, 0)) for name, count in self.target.counts.items()
        )
        wanted = min(max(wanted, self.rules.min_groups), self.rules.max_groups)
        if blind is not None:
            wanted = max(wanted, min(self.before.wanted, self.rules.max_groups))
        state = ModelState(
            wanted=wanted,
            next_n=self.next_n,
            groups=tuple(sorted(self.groups.values(), key=_age_key)),
            seen_at_s=self.now_s,
            idle_since_s=self.idle_since_s,
            rise=self.rise,
            peak=self.peak,
            work=self.work,
            forecast=self.forecast,
            learned=self.learned,
            zones=self.zones,
            spending=self.spending,
            backoff=self.backoff,
            start_s=self.start_s,
        )
        wakes_s = [at_s for at_s in self.wakes_s if at_s > self.now_s]
        decision = Decision(
            model=self.config.model,
            state=state,
            actions=tuple(self.actions),
            transitions=tuple(self.transitions),
            demand=self.demand,
            load=self.load,
            need=need,
            target={name: n for name, n in self.target.counts.items() if n},
            binding=self.binding,
            pending=pending,
            reason="",
            wake_at_s=min([*wakes_s, self.now_s + LONGEST_SLEEP_S]),
        )
        if self.binding is Binding.UNSEEN:
            self.notes.append(f"not scaling down: {blind}")
        elif self._may_plan() and not self._may_act():
            self.notes.append(f"holding: {blind}")
        return replace(decision, reason=reason_of(self.config, decision, tuple(self.notes)))


def _release_key(record: GroupRecord) -> tuple[int, float, float, int]:
    """Broken ones first, then those that start, then the dearest and of these the youngest."""
    order = {GroupState.LOST: 0, GroupState.STARTING: 1}
    n = number_of(record.spec.name)
    dear = record.spec.usd_per_hour
    return (order.get(record.state, 2), -dear, -record.requested_at_s, -n)


def _age_key(record: GroupRecord) -> tuple[float, int, str]:
    return (record.requested_at_s, number_of(record.spec.name), record.spec.name)
