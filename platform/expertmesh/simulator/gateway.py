"""The gateway of a simulated run: the real queue, slots and router before simulated engines."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from expertmesh.core.admission.fair_queue import FairQueue, Full, QueueBounds, Waiting
from expertmesh.core.admission.slots import SlotRules, has_room
from expertmesh.core.domain.fleet import Fleet, Group, GroupLoad, GroupState, Rank, ServedModel
from expertmesh.core.domain.tenant import Priority
from expertmesh.core.routing.candidate import Candidate
from expertmesh.core.routing.router import Router, RoutingConfig
from expertmesh.simulator.engine import Engine, Sequence
from expertmesh.simulator.fleet import SimulatedGroup
from expertmesh.simulator.scenario import Scenario

_MODEL = "model"


@dataclass(frozen=True, slots=True)
class GatewayRules:
    slots: SlotRules = field(default_factory=SlotRules)
    bounds: QueueBounds = field(
        default_factory=lambda: QueueBounds(10_000_000, 1_000_000_000_000, 1_000_000_000_000)
    )
    """Of the queue; as good as none, as a fleet has as many gateways as it needs."""
    exchange_period_s: float = 1.0
    """Between two reports about the groups' load."""


class Place:
    """A group that serves, as the gateway sees it, and its engine."""

    __slots__ = (
        "engine",
        "finished",
        "full",
        "in_flight_limit",
        "load",
        "name",
        "number",
        "option",
        "sent_prompt_tokens",
        "tpot_count",
        "tpot_s_sum",
        "ttft_s_sum",
    )

    def __init__(self, group: SimulatedGroup, scenario: Scenario) -> None:
        option = scenario.options[group.option]
        self.name = group.name
        self.number = group.number
        self.option = group.option
        self.engine = Engine(option.service)
        limit = min(option.service.max_seqs, int(option.option.rates.in_flight))
        self.in_flight_limit = max(1, limit)
        self.load = GroupLoad()
        self.sent_prompt_tokens = 0
        """Since the last report."""
        self.full = False
        self.finished = 0
        self.ttft_s_sum = 0.0
        """Without the wait in the gateway; so are those of all that have finished."""
        self.tpot_s_sum = 0.0
        self.tpot_count = 0

    def report(self, now_s: float) -> GroupLoad:
        engine = self.engine
        self.load = load = GroupLoad(
            in_flight=engine.in_flight,
            running=engine.in_flight - engine.waiting,
            waiting=engine.waiting,
            kv_usage=engine.kv_usage(now_s),
            kv_tokens=engine.kv_tokens,
            max_running=self.in_flight_limit,
        )
        self.sent_prompt_tokens = 0
        return load


@dataclass(slots=True)
class GatewayCounts:
    """Since the start."""

    arrivals: int = 0
    arrived_prompt_tokens: int = 0
    finished: int = 0
    finished_prompt_tokens: int = 0
    """Uncached ones."""
    finished_output_tokens: int = 0
    queued_prompt_tokens: int = 0
    """Now."""


class Gateway:
    """Its callers tell it what happens; it sends requests to engines and says to which."""

    def __init__(self, scenario: Scenario, rules: GatewayRules) -> None:
        self._scenario = scenario
        self._rules = rules
        self._router = Router(RoutingConfig())
        self._queue = FairQueue(rules.bounds)
        self._models = (ServedModel(_MODEL, 2**31, 0.0, 0.0, 0.0, scenario.max_wait_s),)
        self._groups: tuple[Group, ...] = ()
        self._version = 0
        self.places: dict[str, Place] = {}
        """By name of the group: those that are ready or drain."""
        self.counts = GatewayCounts()
        self.use((), 0.0)

    @property
    def queued(self) -> int:
        return self._queue.requests

    def oldest_wait_s(self, now_s: float) -> float:
        oldest_at_s = self._queue.oldest_at_s
        return 0.0 if oldest_at_s is None else now_s - oldest_at_s

    def use(self, groups: Iterable[SimulatedGroup], now_s: float) -> list[Place]:
        """The groups that serve or drain now; returns the places of those that are new."""
        known, new = self.places, []
        self.places = {}
        shown = []
        for group in groups:
            place = known.get(group.name)
            if place is None:
                place = Place(group, self._scenario)
                new.append(place)
            self.places[group.name] = place
            rank = Rank(0, f"sim://{group.name}")
            pool = self._scenario.options[group.option].option.pool
            shown.append(Group(group.name, _MODEL, pool, group.state, (rank,)))
        self._groups = tuple(shown)
        self._version += 1
        self.exchange(now_s)
        return new

    def exchange(self, now_s: float) -> None:
        """The groups' loads, as gateways learn of them now and then."""
        loads = {name: place.report(now_s) for name, place in self.places.items()}
        self._router.apply(Fleet(self._version, self._models, self._groups, loads))
        for place in self.places.values():
            self._set_full(place)

    def arrive(self, sequence: Sequence, tenant: str, now_s: float) -> Place | bool:
        """The place that it was sent to, True when it waits, or False when it is refused."""
        counts = self.counts
        counts.arrivals += 1
        counts.arrived_prompt_tokens += sequence.prompt_tokens
        if not self._queue.requests:
            candidate = self._router.choose(_MODEL)
            if candidate is not None:
                return self._send(candidate, sequence) or False
        return self._wait(sequence, tenant, now_s)

    def again(self, sequence: Sequence, tenant: str, now_s: float) -> bool:
        """Its group has ended before its first token: False when it has waited too long."""
        return self._wait(sequence, tenant, now_s)

    def next_to_send(self) -> tuple[Sequence, Place | None] | None:
        """The head of the queue with its place, None for one that no engine can hold; as long as
        there is room. Its caller submits it to the place's engine before it asks again."""
        if not self._queue.requests:
            return None
        candidate = self._router.choose(_MODEL)
        if candidate is None:
            return None
        sequence: Sequence = self._queue.pop().call
        self.counts.queued_prompt_tokens -= sequence.prompt_tokens
        return sequence, self._send(candidate, sequence)

    def expire(self, now_s: float) -> list[Sequence]:
        """Those that have waited too long."""
        expired = [waiting.call for waiting in self._queue.expire(now_s)]
        for sequence in expired:
            self.counts.queued_prompt_tokens -= sequence.prompt_tokens
        return expired

    def finished(self, place: Place, sequence: Sequence, now_s: float) -> None:
        """It has its whole answer."""
        counts = self.counts
        counts.finished += 1
        counts.finished_prompt_tokens += sequence.prompt_tokens - sequence.cached_tokens
        counts.finished_output_tokens += sequence.output_tokens
        place.finished += 1
        place.ttft_s_sum += sequence.first_token_at_s - sequence.sent_at_s
        if sequence.output_tokens > 1:
            further = sequence.output_tokens - 1
            place.tpot_s_sum += (now_s - sequence.first_token_at_s) / further
            place.tpot_count += 1
        self.ended(place, sequence, now_s)

    def ended(self, place: Place, sequence: Sequence, now_s: float) -> None:
        """It has left its engine."""
        self._router.end(sequence.place, now_s)
        sequence.place = None
        if place.full:
            self._set_full(place)

    def _wait(self, sequence: Sequence, tenant: str, now_s: float) -> bool:
        deadline_s = sequence.arrived_at_s + self._scenario.max_wait_s
        if deadline_s <= now_s:
            return False
        tokens = sequence.prompt_tokens + sequence.output_tokens
        waiting = Waiting(
            sequence, tenant, 1.0, Priority.STANDARD, tokens, 0, sequence.arrived_at_s, deadline_s
        )
        pushed = self._queue.push(waiting, now_s)
        if isinstance(pushed, Full):
            return False
        self.counts.queued_prompt_tokens += sequence.prompt_tokens
        return True

    def _send(self, candidate: Candidate, sequence: Sequence) -> Place | None:
        """None when the engine cannot hold it, as vLLM says of what is longer than its cache."""
        place = self.places[candidate.group]
        if not place.engine.fits(sequence):
            return None
        sequence.place = self._router.begin(candidate)
        place.sent_prompt_tokens += sequence.prompt_tokens
        # The engine has it only in a moment.
        self._set_full(place, 1)
        return place

    def _set_full(self, place: Place, coming: int = 0) -> None:
        full = not has_room(
            self._rules.slots,
            place.load,
            1,
            0,
            place.engine.in_flight + coming,
            0,
            place.sent_prompt_tokens,
            1,
            1,
        )
        if full is not place.full:
            place.full = full
            self._router.set_full(place.name, full)


def serves(group: SimulatedGroup) -> bool:
    """It has requests, or may get some."""
    return group.state in (GroupState.READY, GroupState.DRAINING)
