"""Groups of a simulated run: starts and failed starts, drains, lost spot nodes, and the bill."""

import heapq
import itertools
import math
import random
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from fractions import Fraction
from typing import NamedTuple

from expertmesh.core.domain.fleet import GroupState
from expertmesh.core.scaling.naming import group_name
from expertmesh.errors import ManifestError
from expertmesh.simulator.policy import Drain, GroupView, Move, Recall, Start
from expertmesh.simulator.scenario import Availability, Scenario, Victims

WASTE_WINDOW_S = 600.0
"""A start is judged by this long after the group became ready."""
_WHOLE_S = 1e-6
"""Less than this of a further second is rounding, and is not billed."""


class Change(StrEnum):
    READY = "ready"
    FAILED = "failed"
    """A start; noticed when the group should have been ready."""
    NOTICE = "notice"
    """Its spot nodes will be taken."""
    LOST = "lost"
    """They were taken."""
    DEADLINE = "deadline"
    """It has drained for too long and is gone, with whatever it still served."""


@dataclass(frozen=True, slots=True)
class FleetEvent:
    at_s: float
    change: Change
    group: str


@dataclass(slots=True)
class SimulatedGroup:
    name: str
    option: int
    state: GroupState
    since_s: float
    requested_at_s: float
    number: int
    """In the order of asking, over all options."""
    initial: bool = False
    fails: bool = False
    taken_at_s: float | None = None
    """When its spot nodes will be taken, once that is known."""
    ready_at_s: float | None = None
    released_at_s: float | None = None
    needed: bool = False
    """See `Counts.wasted_starts`."""


class Measured(NamedTuple):
    """What a policy sees of one group's work; the fields are those of `GroupView`."""

    in_flight: float = 0.0
    waiting: float = 0.0
    kv_usage: float = 0.0
    prompt_tokens_per_s: float = 0.0
    output_tokens_per_s: float = 0.0
    ttft_s: float | None = None
    tpot_s: float | None = None


@dataclass(frozen=True, slots=True)
class Counts:
    starts: int
    """Groups that were asked for during the run."""
    cancelled: int
    """Of them, drained before they were ready."""
    failed_starts: int
    wasted_starts: int
    """Starts that were cancelled, or that nobody needed: in the first 10 minutes as a ready group,
    or until its drain when that came first, the load was never above what the groups asked for
    before it carry at the latency target, no request waited longer than allowed, and the minimum
    of groups stood without it. Failed starts, groups lost in that time and groups that are younger
    than that at the end of the run are not wasted."""
    lost: int
    """Groups whose spot nodes were taken."""
    deadlines: int
    """Drains that took too long."""
    refused_moves: int
    """Moves that could not be done: no room, or a group that is not there."""


_NOTHING = Measured()


class Fleet:
    """Driven by time: `advance` to a moment, then `apply` moves at it.

    Draws depend on the seed, the option and how many starts of it there were before, so the same
    start is as slow, and as likely to fail, under every policy.

    Raises ManifestError for a scenario that contradicts itself.
    """

    def __init__(self, scenario: Scenario) -> None:
        self._scenario = scenario
        self._options = scenario.options
        self._prices = tuple(
            Fraction(str(option.option.usd_per_hour)) for option in scenario.options
        )
        self._nodes = tuple(max(1, option.nodes) for option in scenario.options)
        self._pools = tuple(option.option.pool for option in scenario.options)
        self._zones = _zones(scenario)
        self._groups: dict[str, SimulatedGroup] = {}
        self._ended: list[SimulatedGroup] = []
        self._numbers = itertools.count(1)
        self._order = itertools.count()
        self._starts = [0] * len(self._options)
        self._due: list[tuple[float, int, Change, str, int]] = []
        self._billed_s = [0] * len(self._options)
        self._rate_usd_per_hour = Fraction(0)
        self._budget = (
            None
            if scenario.budget_usd_per_hour is None
            else Fraction(str(scenario.budget_usd_per_hour))
        )
        self._rate_since_s = 0.0
        self._over_budget_s = 0.0
        self._refused_moves = 0
        self._deadlines = 0
        self.version = 0
        """Grows whenever a group enters another state."""
        self._schedule_losses()
        self._start_initial()

    # What is there

    @property
    def groups(self) -> tuple[SimulatedGroup, ...]:
        """That hold nodes, in the order of asking."""
        return tuple(self._groups.values())

    def group(self, name: str) -> SimulatedGroup | None:
        """Only while it holds nodes."""
        return self._groups.get(name)

    @property
    def usd_per_hour(self) -> float:
        return float(self._rate_usd_per_hour)

    def notices(self) -> Mapping[str, float]:
        return {
            group.name: group.taken_at_s
            for group in self._groups.values()
            if group.taken_at_s is not None
        }

    def count(self, state: GroupState) -> tuple[int, ...]:
        """By option."""
        counts = [0] * len(self._options)
        for group in self._groups.values():
            counts[group.option] += group.state is state
        return tuple(counts)

    def room(self, now_s: float) -> tuple[int, ...]:
        """By option, groups that could be started now beside those that are there.

        Nodes that will be taken within the notice are not offered.
        """
        free = {pool: self._free_nodes(pool, now_s) for pool in set(self._pools)}
        held = [0] * len(self._options)
        for group in self._groups.values():
            held[group.option] += 1
        return tuple(
            max(0, min(option.max_groups - held[index], free[self._pools[index]] // nodes))
            for index, (option, nodes) in enumerate(zip(self._options, self._nodes, strict=True))
        )

    def views(self, now_s: float, measured: Mapping[str, Measured]) -> tuple[GroupView, ...]:
        """As a policy sees them; a group that ended by itself is seen as lost for two ticks."""
        shown_s = 2 * self._scenario.tick_s
        recent = itertools.takewhile(
            lambda group: now_s - group.since_s < shown_s, reversed(self._ended)
        )
        lost = [group for group in recent if group.state is GroupState.LOST]
        return tuple(
            GroupView(
                group.name,
                group.option,
                group.state,
                group.since_s,
                group.requested_at_s,
                *measured.get(group.name, _NOTHING),
            )
            for group in (*self._groups.values(), *reversed(lost))
        )

    # What happens

    def next_event_s(self) -> float:
        """When `advance` has something to do; infinity: never."""
        return self._due[0][0] if self._due else math.inf

    def advance(self, now_s: float) -> tuple[FleetEvent, ...]:
        """Everything that happened by itself until now, in the order of time."""
        events: list[FleetEvent] = []
        while self._due and self._due[0][0] <= now_s:
            at_s, _, change, subject, number = heapq.heappop(self._due)
            if change is Change.READY:
                events += self._finish_start(subject, at_s)
            elif change is Change.DEADLINE:
                events += self._end_drain(subject, number, at_s)
            else:
                events += self._zone_shrinks(subject, change, number, at_s)
        return tuple(events)

    def apply(self, moves: Sequence[Move], now_s: float) -> int:
        """Does what can be done, and counts the rest; how many moves were refused."""
        refused = 0
        for move in moves:
            match move:
                case Start(option):
                    done = self.start(option, now_s) is not None
                case Drain(group):
                    done = self.drain(group, now_s)
                case Recall(group):
                    done = self.recall(group, now_s)
            refused += not done
        self._refused_moves += refused
        return refused

    def start(self, option: int, now_s: float) -> SimulatedGroup | None:
        """None when there is no room."""
        if not 0 <= option < len(self._options) or self.room(now_s)[option] < 1:
            return None
        group = self._add(option, GroupState.STARTING, now_s)
        start = self._options[option].start
        draw = random.Random(f"{self._scenario.seed}/{option}/{self._starts[option]}")
        self._starts[option] += 1
        factors = [math.exp(draw.gauss(0.0, start.sigma)) for _ in range(self._nodes[option])]
        took_s = start.median_s * max(factors)
        group.fails = draw.random() < start.failure_probability
        self._plan(now_s + took_s, Change.READY, group.name, group.number)
        return group

    def drain(self, name: str, now_s: float) -> bool:
        """A start ends at once; False when there is no such group or it drains already."""
        group = self._groups.get(name)
        if group is None or group.state is GroupState.DRAINING:
            return False
        if group.state is GroupState.STARTING:
            self._end(group, GroupState.GONE, now_s)
            return True
        self._enter(group, GroupState.DRAINING, now_s)
        deadline_s = now_s + self._scenario.drain_deadline_s
        self._plan(deadline_s, Change.DEADLINE, name, group.number)
        return True

    def recall(self, name: str, now_s: float) -> bool:
        group = self._groups.get(name)
        if group is None or group.state is not GroupState.DRAINING:
            return False
        self._enter(group, GroupState.READY, now_s)
        return True

    def release(self, name: str, now_s: float) -> None:
        """A draining group has nothing left to do.

        Raises KeyError when there is no such group, ValueError when it does not drain.
        """
        group = self._groups[name]
        if group.state is not GroupState.DRAINING:
            raise ValueError(f"{name} is {group.state}: only a draining group can be released")
        self._end(group, GroupState.GONE, now_s)

    def note_need(self, now_s: float, loads: Sequence[float], *, waiting: bool) -> None:
        """The load of the moment, by option in groups of it, for the count of wasted starts.

        `waiting`: a request waits longer than its target allows.
        """
        carried, before = 0.0, 0
        for group in self._groups.values():
            if group.state is not GroupState.READY:
                continue
            load = loads[group.option]
            ready_s = now_s - (group.ready_at_s or 0.0)
            if not group.needed and ready_s <= WASTE_WINDOW_S:
                minimum = before < self._scenario.min_groups
                group.needed = waiting or minimum or (load > 0 and carried < 1.0)
            carried += 1 / load if load > 0 else math.inf
            before += 1

    # The bill

    def billed_s(self, now_s: float) -> tuple[int, ...]:
        """Group-seconds by option until now: each group's time from being asked for to its end,
        rounded up to a whole second."""
        billed = list(self._billed_s)
        for group in self._groups.values():
            billed[group.option] += _whole_seconds(now_s - group.requested_at_s)
        return tuple(billed)

    def usd(self, now_s: float) -> tuple[Fraction, ...]:
        """By option, exactly."""
        billed = self.billed_s(now_s)
        return tuple(s * price / 3600 for s, price in zip(billed, self._prices, strict=True))

    def over_budget_s(self, now_s: float) -> float:
        return self._over_budget_s + self._over_budget_until(now_s)

    def counts(self, now_s: float) -> Counts:
        started = [group for group in (*self._ended, *self._groups.values()) if not group.initial]
        cancelled = [group for group in started if group.ready_at_s is None and _gone(group)]
        unneeded = [
            group
            for group in started
            if group.ready_at_s is not None and not group.needed and _judged(group, now_s)
        ]
        lost = [group for group in started if group.state is GroupState.LOST]
        return Counts(
            starts=len(started),
            cancelled=len(cancelled),
            failed_starts=sum(group.fails for group in lost),
            wasted_starts=len(cancelled) + len(unneeded),
            lost=sum(group.state is GroupState.LOST and not group.fails for group in self._ended),
            deadlines=self._deadlines,
            refused_moves=self._refused_moves,
        )

    # Inside

    def _add(self, option: int, state: GroupState, now_s: float) -> SimulatedGroup:
        number = next(self._numbers)
        name = group_name(self._scenario.name, self._pools[option], number)
        group = SimulatedGroup(name, option, state, now_s, now_s, number)
        self._change_rate(self._prices[option], now_s)
        self._groups[name] = group
        self.version += 1
        return group

    def _start_initial(self) -> None:
        for option, count in enumerate(self._scenario.initial_groups):
            for _ in range(count):
                if self.room(0.0)[option] < 1:
                    name = self._options[option].option.name
                    raise ManifestError(
                        f"scenario {self._scenario.name}: there is no room for {count} initial "
                        f"groups of {name}; lower initial_groups or raise max_groups"
                    )
                group = self._add(option, GroupState.READY, 0.0)
                group.initial, group.ready_at_s = True, 0.0

    def _enter(self, group: SimulatedGroup, state: GroupState, at_s: float) -> None:
        group.state, group.since_s = state, at_s
        self.version += 1

    def _end(self, group: SimulatedGroup, state: GroupState, at_s: float) -> None:
        del self._groups[group.name]
        self._ended.append(group)
        self._enter(group, state, at_s)
        group.released_at_s = at_s
        self._billed_s[group.option] += _whole_seconds(at_s - group.requested_at_s)
        self._change_rate(-self._prices[group.option], at_s)

    def _finish_start(self, name: str, at_s: float) -> list[FleetEvent]:
        group = self._groups.get(name)
        if group is None:
            return []
        if group.fails:
            self._end(group, GroupState.LOST, at_s)
            return [FleetEvent(at_s, Change.FAILED, name)]
        self._enter(group, GroupState.READY, at_s)
        group.ready_at_s = at_s
        return [FleetEvent(at_s, Change.READY, name)]

    def _end_drain(self, name: str, number: int, at_s: float) -> list[FleetEvent]:
        group = self._groups.get(name)
        draining = group is not None and group.state is GroupState.DRAINING
        # A group that was recalled and drained again has a later deadline of its own.
        if group is None or not draining or group.since_s > at_s - self._drain_s:
            return []
        self._deadlines += 1
        self._end(group, GroupState.GONE, at_s)
        return [FleetEvent(at_s, Change.DEADLINE, name)]

    @property
    def _drain_s(self) -> float:
        return self._scenario.drain_deadline_s - _WHOLE_S

    def _plan(self, at_s: float, change: Change, subject: str, number: int) -> None:
        heapq.heappush(self._due, (at_s, next(self._order), change, subject, number))

    # Spot zones

    def _schedule_losses(self) -> None:
        for pool, zone in self._zones.items():
            if zone is None:
                continue
            for step, (before, after) in enumerate(itertools.pairwise(zone.nodes), start=1):
                at_s = zone.at_s[step]
                if after < before and at_s > 0:
                    self._plan(at_s - zone.notice_s, Change.NOTICE, pool, step)
                    self._plan(at_s, Change.LOST, pool, step)

    def _zone_shrinks(self, pool: str, change: Change, step: int, at_s: float) -> list[FleetEvent]:
        zone = self._zones[pool]
        assert zone is not None
        if change is Change.NOTICE:
            marked = self._mark(pool, zone, step)
            return [FleetEvent(at_s, Change.NOTICE, group.name) for group in marked]
        # Overlapping notices may leave more groups than nodes: those go without one.
        self._mark(pool, zone, step)
        taken = [
            group
            for group in self._in_pool(pool)
            if group.taken_at_s is not None and group.taken_at_s <= at_s
        ]
        for group in taken:
            group.fails = False
            self._end(group, GroupState.LOST, at_s)
        return [FleetEvent(at_s, Change.LOST, group.name) for group in taken]

    def _mark(self, pool: str, zone: Availability, step: int) -> list[SimulatedGroup]:
        """Groups that lose their nodes in this step of the zone, beside those marked before."""
        keep = [group for group in self._in_pool(pool) if not _noticed(group)]
        if zone.victims is Victims.RANDOM:
            random.Random(f"{self._scenario.seed}/{pool}/{step}").shuffle(keep)
        over = sum(self._nodes[group.option] for group in keep) - zone.nodes[step]
        marked: list[SimulatedGroup] = []
        for group in keep:
            if over <= 0:
                break
            over -= self._nodes[group.option]
            group.taken_at_s = zone.at_s[step]
            marked.append(group)
        return marked

    def _in_pool(self, pool: str) -> list[SimulatedGroup]:
        return [group for group in self._groups.values() if self._pools[group.option] == pool]

    def _free_nodes(self, pool: str, now_s: float) -> int:
        own = self._in_pool(pool)
        used = sum(self._nodes[group.option] for group in own)
        noticed = sum(self._nodes[group.option] for group in own if _noticed(group))
        zone = self._zones[pool]
        if zone is None:
            return self._own_nodes(pool) - used
        step = bisect_right(zone.at_s, now_s) - 1
        last = bisect_right(zone.at_s, now_s + zone.notice_s)
        now_nodes = zone.nodes[max(step, 0)]
        return min(now_nodes - used, min(zone.nodes[max(step, 0) : last]) - (used - noticed))

    def _own_nodes(self, pool: str) -> int:
        return max(
            option.max_groups * nodes
            for option, nodes, own in zip(self._options, self._nodes, self._pools, strict=True)
            if own == pool
        )

    # Money

    def _change_rate(self, usd_per_hour: Fraction, at_s: float) -> None:
        self._over_budget_s += self._over_budget_until(at_s)
        self._rate_since_s = at_s
        self._rate_usd_per_hour += usd_per_hour

    def _over_budget_until(self, at_s: float) -> float:
        if self._budget is None or self._rate_usd_per_hour <= self._budget:
            return 0.0
        return at_s - self._rate_since_s


def _zones(scenario: Scenario) -> dict[str, Availability | None]:
    zones: dict[str, Availability | None] = {}
    for option in scenario.options:
        pool = option.option.pool
        if zones.setdefault(pool, option.availability) != option.availability:
            raise ManifestError(
                f"scenario {scenario.name}: options of pool {pool} differ in availability; "
                "they share its nodes, so give all of them the same"
            )
    for pool, zone in zones.items():
        if zone is not None and (
            len(zone.at_s) != len(zone.nodes)
            or not zone.at_s
            or any(later <= earlier for earlier, later in itertools.pairwise(zone.at_s))
        ):
            raise ManifestError(
                f"scenario {scenario.name}: availability of pool {pool} needs as many times as "
                "node counts, at least one, and rising times"
            )
    return zones


def _noticed(group: SimulatedGroup) -> bool:
    return group.taken_at_s is not None


def _gone(group: SimulatedGroup) -> bool:
    return group.state is GroupState.GONE


def _judged(group: SimulatedGroup, now_s: float) -> bool:
    assert group.ready_at_s is not None
    if group.state in (GroupState.GONE, GroupState.DRAINING):
        return True
    until_s = now_s if group.released_at_s is None else group.released_at_s
    return until_s - group.ready_at_s >= WASTE_WINDOW_S


def _whole_seconds(seconds: float) -> int:
    return math.ceil(seconds - _WHOLE_S)
