"""How many groups of one model there should be, where, and why."""

import math
from dataclasses import replace

from expertmesh.core.domain.fleet import GroupSpec, GroupState
from expertmesh.core.domain.hardware import Pool
from expertmesh.core.scaling.capacity import capacity_workers, cheapest_first, room_workers
from expertmesh.core.scaling.contract import (
    Action,
    ActionKind,
    Backoff,
    Decision,
    GroupRecord,
    GroupSeen,
    ModelState,
    Observation,
    ScalingConfig,
    Transition,
    Window,
    WindowDirection,
    workers_of,
)
from expertmesh.core.scaling.demand import Demand, is_drained, measure
from expertmesh.core.scaling.lifecycle import Room, advance, enter
from expertmesh.core.scaling.naming import next_free_name, number_of

# A journal entry and a gateway's clock need no more often than this.
_LONGEST_SLEEP_S = 60.0
_CENT_OF_A_CENT_USD = 1e-4
"""Sums of prices are compared with the budget up to this."""
_START_AVERAGE_WEIGHT = 0.3
"""Weight of the newest start in a pool's moving average."""


def decide(
    config: ScalingConfig, state: ModelState, observation: Observation, now_s: float
) -> Decision:
    """One decision for one model; the caller records it and only then acts on it."""
    turn = _Turn(config, state, observation, now_s)
    turn.adopt()
    turn.advance_groups()
    turn.measure_demand()
    turn.settle_wanted()
    turn.end_drains()
    turn.fill()
    turn.shrink()
    return turn.decision()


_SERVING = (GroupState.READY, GroupState.DRAINING)


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
        self.workers = workers_of(config.parallelism)
        self.pools = {seen.name: seen for seen in observation.pools}
        self.seen = {seen.name: seen for seen in observation.groups}

        self.before = state
        self.groups = {record.spec.name: record for record in state.groups}
        self.wanted = state.wanted
        self.window = state.window
        self.next_n = state.next_n
        self.backoff = dict(state.backoff)
        self.start_s = dict(state.start_s)

        self.demand = Demand()
        self.need = 0
        self.actions: list[Action] = []
        self.transitions: list[Transition] = []
        self.obstacles: list[str] = []
        self.notes: list[str] = []
        self.wakes_s: list[float] = []

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
                self._learn(record, after)
            else:
                self.groups[record.spec.name] = after
            if after.state is GroupState.GONE:
                del self.groups[record.spec.name]
            elif removal is not None and self._may_act() and self.observation.settled:
                self._remove(after, removal.why)
            if after.state is GroupState.LOST and after.removed_at_s is None:
                self.wakes_s.append(after.since_s + self.timing.restart_grace_s)
            if after.state is GroupState.STARTING:
                self.wakes_s.append(after.since_s + self.timing.start_deadline_s)

    def measure_demand(self) -> None:
        self.demand = measure(
            self.observation.gateways,
            self.groups.keys(),
            self.now_s,
            stale_s=self.timing.gateway_stale_s,
            forget_s=self.timing.gateway_forget_s,
        )
        by_work = math.ceil(self.demand.work / self.rules.target_in_flight_per_group)
        self.need = max(self.rules.min_groups, min(self.rules.max_groups, by_work))

    # How many

    def settle_wanted(self) -> None:
        """Follow the need, but only once it has held for its delay."""
        if self.observation.first_look and not self.groups:
            # Everything was stopped meanwhile: what was wanted then is no need of today.
            self.wanted, self.window = 0, None
        self.wanted = max(self.rules.min_groups, min(self.rules.max_groups, self.wanted))
        if self.wanted == 0 and self.need > 0:
            self.wanted = 1
            self.notes.append("waking from zero at once")
        if self.need == self.wanted:
            self.window = None
        elif self.need > self.wanted:
            self._follow(WindowDirection.UP, self.rules.up_delay_s)
        elif self._why_not_down() is None:
            self._follow(WindowDirection.DOWN, self.rules.down_delay_s or 0.0)
        else:
            # A need that cannot be seen does not hold.
            self.window = None

    def _follow(self, direction: WindowDirection, delay_s: float) -> None:
        window = self.window
        nearest = min if direction is WindowDirection.UP else max
        if window is None or window.direction is not direction:
            window = Window(direction, self.now_s, self.need)
        else:
            window = replace(window, bound=nearest(window.bound, self.need))
        held_s = self.now_s - window.since_s
        if held_s >= delay_s:
            self.notes.append(
                f"the {'higher' if direction is WindowDirection.UP else 'lower'} need "
                f"has held for {held_s:.1f} s"
            )
            self.wanted = window.bound
            self.window = None
        else:
            self.window = window
            due_s = window.since_s + delay_s
            self.notes.append(f"a need of {self.need} must hold {due_s - self.now_s:.1f} s more")
            self.wakes_s.append(due_s)

    # What to do

    def end_drains(self) -> None:
        for record in self._in_state(GroupState.DRAINING):
            deadline_s = record.since_s + self.rules.drain_deadline_s
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
                left = sum(seen.in_flight.get(name, 0) for seen in self.observation.gateways)
                why = f"{left} in flight at the deadline of {self.rules.drain_deadline_s:g} s"
            else:
                self.wakes_s.append(deadline_s)
                continue
            if self._may_act() and self.observation.settled:
                self._remove(record, why)

    def fill(self) -> None:
        """Recall what drains, then start what is missing, in the cheapest pools with room."""
        if not self._may_act():
            return
        for record in sorted(self._in_state(GroupState.DRAINING), key=self._price_key):
            if len(self._active()) < self.wanted and not self._active_over_budget(record):
                self._act(ActionKind.RECALL, record, "wanted again while draining")
                self._keep(
                    enter(record, GroupState.READY, self.now_s, ""), record.state, "recalled"
                )
        while len(self._active()) < self.wanted:
            pool = self._cheapest_pool_with_room()
            if pool is None:
                return
            self._start(pool)

    def shrink(self) -> None:
        if self._why_not_down() is not None or not self._may_act():
            return
        while True:
            active = self._active()
            surplus = len(active) - self.wanted
            if surplus <= 0 and not self._active_over_budget():
                return
            record = self._least_needed(active)
            if record is None:
                return
            price = f"${record.spec.usd_per_hour:.2f}/h in pool {record.spec.pool}"
            why = f"{len(active)} groups for {self.wanted} wanted, {price}"
            if surplus <= 0:
                why = f"the groups cost more than the budget, {price}"
            match record.state:
                case GroupState.READY:
                    self._act(ActionKind.DRAIN, record, why)
                    draining = enter(record, GroupState.DRAINING, self.now_s, "no longer needed")
                    self._keep(draining, record.state, why)
                case GroupState.STARTING:
                    draining = enter(record, GroupState.DRAINING, self.now_s, "no longer needed")
                    self._keep(draining, record.state, why)
                    self._remove(draining, why)
                case _:
                    self._remove(record, why)

    def _least_needed(self, active: list[GroupRecord]) -> GroupRecord | None:
        """Lost ones first, then the dearest pool's newest; never a ready group that is needed."""
        ready = [record for record in active if record.state is GroupState.READY]
        spare_ready = len(ready) - self.wanted
        for record in sorted(active, key=self._price_key, reverse=True):
            if record.state is GroupState.LOST:
                return record
        for record in sorted(active, key=self._price_key, reverse=True):
            if record.state is not GroupState.READY or spare_ready > 0:
                return record
        return max(active, key=self._price_key) if self._active_over_budget() else None

    def _start(self, pool: Pool) -> None:
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
            parallelism=self.config.parallelism,
            max_model_len=self.config.max_model_len,
            usd_per_hour=pool.usd_per_hour(self.workers),
            accelerator=pool.accelerator,
            engine=self.config.engine,
        )
        expected_s = self.now_s + self.start_s.get(pool.name, self.timing.first_start_s)
        record = GroupRecord(
            spec=spec,
            state=GroupState.STARTING,
            since_s=self.now_s,
            requested_at_s=self.now_s,
            expected_ready_at_s=expected_s,
            message="asked for",
        )
        why = f"the cheapest pool with room, ${spec.usd_per_hour:.2f}/h"
        self.actions.append(Action(ActionKind.START, name, why, spec))
        self._keep(record, None, why)
        self.wakes_s.append(self.now_s + self.timing.start_deadline_s)

    def _cheapest_pool_with_room(self) -> Pool | None:
        """None leaves the reasons in `obstacles`."""
        obstacles: list[str] = []
        for pool in cheapest_first(self.config.pools, self.config.parallelism):
            backoff = self.backoff.get(pool.name)
            room = room_workers(pool, self.pools.get(pool.name), self.groups.values())
            if room is None:
                obstacles.append(f"the nodes of pool {pool.name} could not be listed")
            elif room < self.workers:
                free = max(0, room)
                obstacles.append(
                    f"no room in pool {pool.name} ({free} of {self.workers} workers free)"
                )
            elif backoff is not None and self.now_s < backoff.until_s:
                self.wakes_s.append(backoff.until_s)
                obstacles.append(
                    f"pool {pool.name} is left alone for {backoff.until_s - self.now_s:.0f} s "
                    f"after {backoff.failures} failed starts"
                )
            elif self._over_budget(pool.usd_per_hour(self.workers)):
                obstacles.append(
                    f"a group in pool {pool.name} at ${pool.usd_per_hour(self.workers):.2f}/h "
                    f"exceeds the budget of ${self.rules.usd_per_hour_budget:.2f}/h"
                )
            else:
                return pool
        self.obstacles.extend(obstacles or ["the model has no pool"])
        return None

    # Small questions

    def _may_act(self) -> bool:
        return self.observation.serve_answers and self.observation.journal_writes

    def _why_not_down(self) -> str | None:
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
        """Groups that serve, or will: a lost one that Serve may restart is one of them."""
        return [
            record
            for record in self.groups.values()
            if record.removed_at_s is None and record.state is not GroupState.DRAINING
        ]

    def _in_state(self, state: GroupState) -> list[GroupRecord]:
        return [
            record
            for record in self.groups.values()
            if record.state is state and record.removed_at_s is None
        ]

    def _over_budget(self, more_usd_per_hour: float) -> bool:
        """Whatever is not gone yet still costs."""
        budget = self.rules.usd_per_hour_budget
        cost = sum(record.spec.usd_per_hour for record in self.groups.values())
        return budget is not None and cost + more_usd_per_hour > budget + _CENT_OF_A_CENT_USD

    def _active_over_budget(self, *more: GroupRecord) -> bool:
        budget = self.rules.usd_per_hour_budget
        cost = sum(record.spec.usd_per_hour for record in (*self._active(), *more))
        return budget is not None and cost > budget + _CENT_OF_A_CENT_USD

    def _price_key(self, record: GroupRecord) -> tuple[float, str, float, int]:
        pool = record.spec.pool
        n = number_of(record.spec.name)
        return (record.spec.usd_per_hour, pool, record.requested_at_s, n)

    def _room_for(self, record: GroupRecord) -> Room:
        """The groups that come before it are those that serve, and the older ones."""
        name = record.spec.pool
        seen = self.pools.get(name)
        used = seen.staying_elsewhere if seen else 0
        used += sum(
            workers_of(other.spec.parallelism)
            for other in self.groups.values()
            if other.spec.pool == name
            and other.spec.name != record.spec.name
            and other.removed_at_s is None
            and (other.state in _SERVING or _age_key(other) < _age_key(record))
        )
        needed = used + workers_of(record.spec.parallelism)
        pool = next((pool for pool in self.config.pools if pool.name == name), None)
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

    def _learn(self, before: GroupRecord, after: GroupRecord) -> None:
        """Start durations and failures of the pool, from a state that has just been entered."""
        pool = after.spec.pool
        if before.state is not GroupState.STARTING:
            if after.state is GroupState.STARTING:
                expected_s = self.now_s + self.start_s.get(pool, self.timing.first_start_s)
                self.groups[after.spec.name] = replace(after, expected_ready_at_s=expected_s)
            return
        if after.state is GroupState.READY:
            self.backoff.pop(pool, None)
            if not before.adopted and not before.served:
                took_s = self.now_s - before.requested_at_s
                known_s = self.start_s.get(pool, took_s)
                self.start_s[pool] = known_s + _START_AVERAGE_WEIGHT * (took_s - known_s)
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
        state = ModelState(
            wanted=self.wanted,
            next_n=self.next_n,
            groups=tuple(sorted(self.groups.values(), key=_age_key)),
            window=self.window,
            backoff=self.backoff,
            start_s=self.start_s,
        )
        wakes_s = [at_s for at_s in self.wakes_s if at_s > self.now_s]
        return Decision(
            model=self.config.model,
            state=state,
            actions=tuple(self.actions),
            transitions=tuple(self.transitions),
            demand=self.demand,
            need=self.need,
            pending=pending,
            reason=self._reason(pending),
            wake_at_s=min([*wakes_s, self.now_s + _LONGEST_SLEEP_S]),
        )

    def _reason(self, pending: str | None) -> str:
        demand, rules = self.demand, self.rules
        by_work = math.ceil(demand.work / rules.target_in_flight_per_group)
        text = (
            f"{demand.queued} queued and {demand.running} running requests "
            f"at {rules.target_in_flight_per_group:g} per group need {_groups(by_work)}"
        )
        if self.need > by_work:
            text += f", {self.need} with min {rules.min_groups}"
        elif self.need < by_work:
            text += f", {self.need} with max {rules.max_groups}"
        active = self._active()
        ready = sum(record.state is GroupState.READY for record in active)
        text += f"; {self.wanted} wanted, {ready} ready"
        coming = [record for record in active if record.state is not GroupState.READY]
        if coming:
            notes = ", ".join(
                f"{record.spec.name} {record.message}"
                if record.state is GroupState.STARTING
                else f"{record.spec.name} {record.state}"
                for record in coming
            )
            text += f" and {len(coming)} on the way ({notes})"
        parts = [text, *self.notes]
        done = {action.group for action in self.actions}
        parts += [
            f"{step.group} is {step.after}: {step.why or 'all ranks answer'}"
            for step in self.transitions
            if step.group not in done or step.after is GroupState.LOST
        ]
        verbs = {
            ActionKind.START: "starting",
            ActionKind.DRAIN: "draining",
            ActionKind.RECALL: "recalling",
            ActionKind.REMOVE: "removing",
        }
        parts += [f"{verbs[act.kind]} {act.group}: {act.why}" for act in self.actions]
        holding = self._why_not_down()
        if holding is not None and len(active) > max(self.need, rules.min_groups):
            parts.append(f"not scaling down: {holding}")
        elif not self._may_act():
            parts.append(f"holding: {holding}")
        if pending is not None:
            parts.append(pending)
        return "; ".join(parts)


def _groups(count: int) -> str:
    return "1 group" if count == 1 else f"{count} groups"


def _age_key(record: GroupRecord) -> tuple[float, int, str]:
    return (record.requested_at_s, number_of(record.spec.name), record.spec.name)
