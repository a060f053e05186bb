"""The working values of one decision, and small questions about them.

Each step of a decision reads and changes them: `look`, `need`, `question`, `start`, `release`.
"""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

from expertmesh.core.domain.deployment import ScalingMode
from expertmesh.core.domain.fleet import GroupSpec, GroupState
from expertmesh.core.domain.hardware import Market, Pool
from expertmesh.core.scaling.capacity import held_workers, room_workers
from expertmesh.core.scaling.contract import (
    Action,
    ActionKind,
    Binding,
    GroupRecord,
    GroupSeen,
    Load,
    ModelState,
    Observation,
    ScalingConfig,
    Transition,
)
from expertmesh.core.scaling.demand import Demand
from expertmesh.core.scaling.kinds import Kind, Kinds, kind_of
from expertmesh.core.scaling.mix import Mix
from expertmesh.core.scaling.naming import number_of
from expertmesh.core.scaling.target import Target

CENT_OF_A_CENT_USD = 1e-4
"""Sums of prices are compared with the budget up to this."""
_LONGEST_STEP_S = 60.0
"""A longer time between two decisions teaches nothing about what happened in it."""
_HOLD_STARTS = 2.0
"""A group that is not needed is kept for so many starts' times: one is what holding it may cost
before a restart is cheaper, the other what a restart makes requests miss (simulated days)."""
_WAKE_PENALTY = 3.0
"""A restart that makes a request wait is worth that many times its price."""
_NOTHING = Mix(counts=(), capacity=0.0, short=0.0, uncovered=0.0, usd=0.0, usd_per_hour=0.0)


class Turn:
    """What one decision is made from and what it has come to so far."""

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
            record.spec.name: record if record.since_s <= now_s else replace(record, since_s=now_s)
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
        self._kind_names: dict[str, tuple[GroupSpec, str]] = {}

    def may_act(self) -> bool:
        return (
            self.may_plan() and self.observation.serve_answers and self.observation.journal_writes
        )

    def may_plan(self) -> bool:
        return self.rules.mode is ScalingMode.ACT

    def why_unseen(self) -> str | None:
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

    def active(self) -> list[GroupRecord]:
        """Groups that serve, or will: a lost one that Serve may restart is one of them, unless its
        node has been or will be taken away."""
        return [
            record
            for record in self.groups.values()
            if record.removed_at_s is None
            and record.state is not GroupState.DRAINING
            and not self.is_being_taken(record)
        ]

    def is_being_taken(self, record: GroupRecord) -> bool:
        if record.leaving_at_s is not None:
            return True
        zone_name = self.zone_of(record.spec.pool)
        zone = self.zones.get(zone_name) if zone_name is not None else None
        lost = record.state is GroupState.LOST
        return lost and zone is not None and not zone.is_admitted(self.now_s)

    def active_of(self, kind: str) -> list[GroupRecord]:
        return [record for record in self.active() if self.kind_name(record) == kind]

    def in_state(self, state: GroupState) -> list[GroupRecord]:
        return [
            record
            for record in self.groups.values()
            if record.state is state and record.removed_at_s is None
        ]

    def recallable(self) -> list[GroupRecord]:
        return [
            record for record in self.in_state(GroupState.DRAINING) if record.leaving_at_s is None
        ]

    def seen_of(self, record: GroupRecord) -> GroupSeen:
        return self.seen.get(record.spec.name) or GroupSeen(record.spec.name, None)

    def in_flight(self, record: GroupRecord) -> int:
        name = record.spec.name
        return sum(seen.in_flight.get(name, 0) for seen in self.observation.gateways)

    def kind_of(self, record: GroupRecord) -> Kind:
        return self.kinds.named(self.kind_name(record))

    def kind_name(self, record: GroupRecord) -> str:
        spec = record.spec
        known = self._kind_names.get(spec.name)
        if known is None or known[0] is not spec:
            known = self._kind_names[spec.name] = (spec, kind_of(self.config, spec))
        return known[1]

    def counts_of(self, records: Iterable[GroupRecord]) -> Counter[str]:
        """By kind."""
        return Counter(map(self.kind_name, records))

    def zone_of(self, pool_name: str) -> str | None:
        pool = self.pools.get(pool_name)
        if pool is None or pool.market is not Market.SPOT:
            return None
        return pool.zone or pool.name

    def held_workers(self, record: GroupRecord) -> int:
        leaving = self.seen_of(record).leaving_workers
        return held_workers(self.pools.get(record.spec.pool), record, leaving)

    def room_in(self, pool: Pool) -> int | None:
        own = sum(self.held_workers(r) for r in self.groups.values() if r.spec.pool == pool.name)
        return room_workers(pool, self.pools_seen.get(pool.name), own)

    def carried(self, load: float) -> float:
        """Of a load, what the groups are to carry: the target may leave the rest to a provider."""
        mix = self.target.mix
        return min(load, mix.capacity) if self.config.external and mix.short > 0 else load

    def hold_s(self) -> float:
        if self.rules.down_delay_s is not None:
            return self.rules.down_delay_s
        return _HOLD_STARTS * max((kind.start_s for kind in self.kinds.all), default=0.0)

    def is_idle(self) -> bool:
        """For as long as a restart takes, longer where the next request is likely within it."""
        if self.idle_since_s is None:
            return False
        hold_s = self.hold_s()
        if self.rules.down_delay_s is None:
            soon = 1.0 - math.exp(-self.work.seldom_arrivals_per_s * hold_s)
            hold_s *= 1.0 + _WAKE_PENALTY * soon
        due_s = self.idle_since_s + hold_s
        if self.now_s < due_s:
            self.wakes_s.append(due_s)
        return self.now_s >= due_s

    def keep(self, record: GroupRecord, before: GroupState | None, why: str) -> None:
        self.groups[record.spec.name] = record
        self.transitions.append(
            Transition(record.spec.name, record.spec.pool, before, record.state, why)
        )

    def act(self, kind: ActionKind, record: GroupRecord, why: str) -> None:
        self.actions.append(Action(kind, record.spec.name, why))

    def remove(self, record: GroupRecord, why: str) -> None:
        self.act(ActionKind.REMOVE, record, why)
        self.groups[record.spec.name] = replace(
            record, removed_at_s=self.now_s, message=f"removed: {why}"
        )


def age_key(record: GroupRecord) -> tuple[float, int, str]:
    return (record.requested_at_s, number_of(record.spec.name), record.spec.name)
