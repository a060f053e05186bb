"""Requests that wait for a group of one model, fairly among tenants and within bounds."""

from collections import OrderedDict
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from expertmesh.core.admission.keyed_heap import KeyedHeap
from expertmesh.core.domain.tenant import Priority

_MOST_PUSHED_OUT = 16
"""By one newcomer: a huge request must not cost many small ones their place."""
_IDLE_TENANTS = 1024
"""Tenants without waiting requests that are remembered, per priority."""


@dataclass(eq=False, slots=True)
class Waiting:
    call: Any
    tenant: str
    weight: float
    """Above 0."""
    priority: Priority
    tokens: int
    """Prompt and maximum completion, estimated."""
    size_bytes: int
    queued_at_s: float
    deadline_s: float


class Bound(StrEnum):
    REQUESTS = "requests"
    TOKENS = "tokens"
    SIZE = "size_bytes"


@dataclass(frozen=True, slots=True)
class QueueBounds:
    requests: int = 1000
    tokens: int = 50_000_000
    size_bytes: int = 256 * 1024 * 1024
    """Bodies of the waiting requests, which stay in memory."""
    age_s: float | None = None
    """Longest wait, whatever the deadline; None for the deadline alone."""


@dataclass(frozen=True, slots=True)
class Full:
    bound: Bound
    """The one that the newcomer would break."""
    limit: int


class _Line:
    """The requests of one tenant in one priority, and what it has been served there."""

    __slots__ = ("counter", "requests", "size_bytes", "tenant", "tokens", "waiting", "weight")

    def __init__(self, tenant: str) -> None:
        self.tenant = tenant
        self.waiting: OrderedDict[Waiting, None] = OrderedDict()
        self.weight = 1.0
        self.counter = 0.0
        """Tokens served, divided by weight."""
        self.requests = 0
        self.tokens = 0
        self.size_bytes = 0

    def backlog(self, bound: Bound) -> float:
        """In proportion to the weight."""
        if bound is Bound.REQUESTS:
            return self.requests / self.weight
        if bound is Bound.TOKENS:
            return self.tokens / self.weight
        return self.size_bytes / self.weight

    def backlog_with(self, waiting: Waiting, bound: Bound) -> float:
        if bound is Bound.REQUESTS:
            return (self.requests + 1) / waiting.weight
        if bound is Bound.TOKENS:
            return (self.tokens + waiting.tokens) / waiting.weight
        return (self.size_bytes + waiting.size_bytes) / waiting.weight


class _Band:
    """One priority: lines in the order of a virtual token counter.

    Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024, algorithm 2, with weights.
    """

    __slots__ = ("idle", "largest", "last_left", "lines", "next")

    def __init__(self) -> None:
        self.lines: dict[str, _Line] = {}
        """Tenants with waiting requests."""
        self.next: KeyedHeap[_Line] = KeyedHeap()
        """By counter."""
        self.largest: dict[Bound, KeyedHeap[_Line]] = {}
        """By backlog, the largest first; for the bounds that were reached since the last time that
        nobody waited."""
        self.idle: OrderedDict[str, _Line] = OrderedDict()
        """Tenants without waiting requests, in the order in which they left."""
        self.last_left: _Line | None = None

    def floor(self) -> float:
        """No tenant that comes back starts below this: idleness is not saved up."""
        key = self.next.first_key()
        if key is not None:
            return key
        return 0.0 if self.last_left is None else self.last_left.counter

    def enter(self, tenant: str) -> _Line:
        """The line of a tenant that has a request to add."""
        line = self.lines.get(tenant)
        if line is None:
            line = self.idle.pop(tenant, None) or _Line(tenant)
            floor = self.floor()
            if line.counter < floor:
                line.counter = floor
        return line

    def add(self, line: _Line, waiting: Waiting) -> None:
        line.waiting[waiting] = None
        line.weight = waiting.weight
        line.tokens += waiting.tokens
        line.size_bytes += waiting.size_bytes
        line.requests = requests = line.requests + 1
        if requests == 1:
            self.idle.pop(line.tenant, None)
            self.lines[line.tenant] = line
            self.next.set(line, line.counter)
        if self.largest:
            self._rank(line)

    def take(self, line: _Line, waiting: Waiting) -> None:
        del line.waiting[waiting]
        line.tokens -= waiting.tokens
        line.size_bytes -= waiting.size_bytes
        line.requests = requests = line.requests - 1
        if requests:
            if self.largest:
                self._rank(line)
            return
        del self.lines[line.tenant]
        self.next.discard(line)
        for heap in self.largest.values():
            heap.discard(line)
        if not self.lines:
            self.largest.clear()
        self.last_left = line
        self._rest(line)

    def charge(self, tenant: str, tokens: int, weight: float) -> None:
        line = self.lines.get(tenant)
        if line is not None:
            line.counter += tokens / weight
            self.next.set(line, line.counter)
            return
        line = self.idle.get(tenant)
        if line is None:
            # It was not queued here so far, or so long ago that it would start at the floor.
            if tokens <= 0:
                return
            line = _Line(tenant)
            line.counter = self.floor()
            self._rest(line)
        line.counter += tokens / weight

    def youngest_of_largest(self, bound: Bound) -> Waiting | None:
        heap = self.largest.get(bound)
        if heap is None:
            heap = self.largest[bound] = KeyedHeap()
            for line in self.lines.values():
                heap.set(line, -line.backlog(bound))
        first = heap.first()
        return None if first is None else next(reversed(first.waiting))

    def _rest(self, line: _Line) -> None:
        idle = self.idle
        idle[line.tenant] = line
        if len(idle) > _IDLE_TENANTS:
            idle.popitem(last=False)

    def _rank(self, line: _Line) -> None:
        for bound, heap in self.largest.items():
            heap.set(line, -line.backlog(bound))


class FairQueue:
    """Strict order of priorities, fair shares among the tenants of one, and FIFO within a tenant.

    Every request that is pushed leaves once: popped, removed, expired or pushed out.
    """

    def __init__(self, bounds: QueueBounds | None = None) -> None:
        self.bounds = QueueBounds() if bounds is None else bounds
        """May be changed: what waits already stays."""
        self._bands: Final = {priority: _Band() for priority in Priority}
        self._by_priority: Final = tuple(self._bands.values())
        self._leave_by: Final[KeyedHeap[Waiting]] = KeyedHeap()
        self._tokens = 0
        self._size_bytes = 0

    @property
    def requests(self) -> int:
        return len(self._leave_by)

    @property
    def tokens(self) -> int:
        return self._tokens

    @property
    def size_bytes(self) -> int:
        return self._size_bytes

    @property
    def oldest_at_s(self) -> float | None:
        """When the request was queued that has waited for longest. Looks at every tenant."""
        return min(
            (
                next(iter(line.waiting)).queued_at_s
                for band in self._by_priority
                for line in band.lines.values()
            ),
            default=None,
        )

    @property
    def tokens_by_tenant(self) -> dict[str, int]:
        """Of the waiting requests."""
        tokens: dict[str, int] = {}
        for band in self._by_priority:
            for tenant, line in band.lines.items():
                tokens[tenant] = tokens.get(tenant, 0) + line.tokens
        return tokens

    def __contains__(self, waiting: Waiting) -> bool:
        return waiting in self._leave_by

    def push(self, waiting: Waiting, now_s: float) -> tuple[Waiting, ...] | Full:
        """Returns those that were pushed out to make room, or why there is none.

        Room is made by the youngest request of the tenant that has most waiting, for its weight, of
        what is scarce (requests, tokens or bytes), in the lowest priority that waits: if the
        newcomer has a higher priority, or if its tenant has less even with the newcomer.
        """
        if waiting in self._leave_by:
            raise ValueError("a request waits only once")
        pushed_out: tuple[Waiting, ...] = ()
        if self._broken_by(waiting) is not None:
            made = self._make_room(waiting)
            if isinstance(made, Full):
                return made
            pushed_out = made
        band = self._bands[waiting.priority]
        self._add(band, band.enter(waiting.tenant), waiting)
        return pushed_out

    def head(self) -> Waiting | None:
        """Who is next."""
        for band in self._by_priority:
            line = band.next.first()
            if line is not None:
                return next(iter(line.waiting))
        return None

    def pop(self) -> Waiting:
        """The head leaves, and its tenant is charged for it. IndexError when nobody waits."""
        for band in self._by_priority:
            line = band.next.first()
            if line is not None:
                waiting = next(iter(line.waiting))
                # At least one token, or requests of none would go before all others for ever.
                line.counter += (waiting.tokens or 1) / waiting.weight
                self._take(band, line, waiting)
                if line.requests:
                    band.next.set(line, line.counter)
                return waiting
        raise IndexError("nobody waits")

    def remove(self, waiting: Waiting) -> bool:
        """False when it does not wait any more."""
        if waiting not in self._leave_by:
            return False
        self._leave(waiting)
        return True

    def expire(self, now_s: float) -> list[Waiting]:
        """Those that are past their deadline or too old leave."""
        expired: list[Waiting] = []
        while (leave_by_s := self._leave_by.first_key()) is not None and leave_by_s <= now_s:
            waiting = self._leave_by.first()
            assert waiting is not None
            self._leave(waiting)
            expired.append(waiting)
        return expired

    def charge(
        self, tenant: str, tokens: int, weight: float, priority: Priority | None = None
    ) -> None:
        """More tokens were served than `pop` charged, or fewer: then negative.

        Without a priority in every one in which the tenant is known, which is one for most.
        """
        if priority is not None:
            self._bands[priority].charge(tenant, tokens, weight)
            return
        for band in self._by_priority:
            if tenant in band.lines or tenant in band.idle:
                band.charge(tenant, tokens, weight)

    def _broken_by(self, waiting: Waiting) -> Bound | None:
        bounds = self.bounds
        if len(self._leave_by) + 1 > bounds.requests:
            return Bound.REQUESTS
        if self._tokens + waiting.tokens > bounds.tokens:
            return Bound.TOKENS
        if self._size_bytes + waiting.size_bytes > bounds.size_bytes:
            return Bound.SIZE
        return None

    def _youngest_to_go(self, newcomer: Waiting, bound: Bound) -> Waiting | None:
        own = self._bands[newcomer.priority]
        for band in reversed(self._by_priority):
            youngest = band.youngest_of_largest(bound) if band.lines else None
            if band is not own:
                if youngest is not None:
                    return youngest
                continue
            if youngest is None:
                return None
            line = own.lines.get(newcomer.tenant) or _Line(newcomer.tenant)
            largest = own.lines[youngest.tenant].backlog(bound)
            return youngest if line.backlog_with(newcomer, bound) < largest else None
        return None

    def _make_room(self, newcomer: Waiting) -> tuple[Waiting, ...] | Full:
        """Nothing has changed when it is Full."""
        taken: list[tuple[_Line, Waiting]] = []
        while (bound := self._broken_by(newcomer)) is not None:
            youngest = self._youngest_to_go(newcomer, bound)
            if youngest is None or len(taken) >= _MOST_PUSHED_OUT:
                for line, waiting in reversed(taken):
                    self._add(self._bands[waiting.priority], line, waiting)
                return Full(bound, getattr(self.bounds, bound.value))
            band = self._bands[youngest.priority]
            line = band.lines[youngest.tenant]
            taken.append((line, youngest))
            self._take(band, line, youngest)
        return tuple(waiting for _, waiting in taken)

    def _leave(self, waiting: Waiting) -> None:
        band = self._bands[waiting.priority]
        self._take(band, band.lines[waiting.tenant], waiting)

    def _add(self, band: _Band, line: _Line, waiting: Waiting) -> None:
        band.add(line, waiting)
        leave_by_s = waiting.deadline_s
        age_s = self.bounds.age_s
        if age_s is not None:
            leave_by_s = min(leave_by_s, waiting.queued_at_s + age_s)
        self._leave_by.set(waiting, leave_by_s)
        self._tokens += waiting.tokens
        self._size_bytes += waiting.size_bytes

    def _take(self, band: _Band, line: _Line, waiting: Waiting) -> None:
        band.take(line, waiting)
        self._leave_by.discard(waiting)
        self._tokens -= waiting.tokens
        self._size_bytes -= waiting.size_bytes
