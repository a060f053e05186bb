"""A group with some slots behind a queue, as a deterministic simulation of discrete events."""

from collections import deque
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count
from random import Random
from typing import Protocol

from expertmesh.core.admission.fair_queue import FairQueue, Full, QueueBounds, Waiting
from expertmesh.core.domain.tenant import Priority

TOKENS_PER_S = 100.0
"""Of one slot."""


class Queue(Protocol):
    def push(self, waiting: Waiting, now_s: float) -> tuple[Waiting, ...] | Full: ...
    def head(self) -> Waiting | None: ...
    def pop(self) -> Waiting: ...
    def expire(self, now_s: float) -> list[Waiting]: ...


class FirstComeQueue:
    """What most gateways have: one line for all, and whoever finds it full is refused."""

    def __init__(self, bounds: QueueBounds) -> None:
        self.bounds = bounds
        self.line: deque[Waiting] = deque()

    def push(self, waiting: Waiting, now_s: float) -> tuple[Waiting, ...] | Full:
        if len(self.line) >= self.bounds.requests:
            return FairQueue(QueueBounds(requests=0)).push(waiting, now_s)
        self.line.append(waiting)
        return ()

    def head(self) -> Waiting | None:
        return self.line[0] if self.line else None

    def pop(self) -> Waiting:
        return self.line.popleft()

    def expire(self, now_s: float) -> list[Waiting]:
        return []


@dataclass(frozen=True)
class Arrival:
    at_s: float
    tenant: str
    tokens: int
    weight: float = 1.0


@dataclass
class Waits:
    """Of one tenant."""

    waits_s: list[float] = field(default_factory=list)
    refused: int = 0

    @property
    def p99_s(self) -> float:
        return sorted(self.waits_s)[int(0.99 * len(self.waits_s))]


def bursts(
    tenant: str, random: Random, *, period_s: float, size: int, until_s: float, weight: float = 1.0
) -> list[Arrival]:
    """`size` requests at once, at random times `period_s` apart on average, of 50 to 150 tokens."""
    arrivals, at_s = [], 0.0
    while (at_s := at_s + random.uniform(0.5, 1.5) * period_s) < until_s:
        arrivals += [Arrival(at_s, tenant, random.randint(50, 150), weight) for _ in range(size)]
    return arrivals


def steady(tenant: str, random: Random, *, per_s: float, until_s: float) -> list[Arrival]:
    arrivals, at_s = [], 0.0
    while (at_s := at_s + random.expovariate(per_s)) < until_s:
        arrivals.append(Arrival(at_s, tenant, random.randint(50, 150)))
    return arrivals


def simulate(queue: Queue, slots: int, arrivals: list[Arrival]) -> dict[str, Waits]:
    waits: dict[str, Waits] = {}
    numbers = count()
    events: list[tuple[float, int, Arrival | None]] = []
    for arrival in arrivals:
        heappush(events, (arrival.at_s, next(numbers), arrival))
    free = slots
    while events:
        now_s, _, arrival = heappop(events)
        if arrival is None:
            free += 1
        else:
            tenant = waits.setdefault(arrival.tenant, Waits())
            waiting = Waiting(
                tenant,
                arrival.tenant,
                arrival.weight,
                Priority.STANDARD,
                arrival.tokens,
                0,
                now_s,
                1e9,
            )
            pushed_out = queue.push(waiting, now_s)
            for victim in (waiting,) if isinstance(pushed_out, Full) else pushed_out:
                victim.call.refused += 1
        if events and events[0][0] == now_s and events[0][2] is not None:
            continue  # All of a burst is in the queue before the first of it is served.
        while free and queue.head() is not None:
            served = queue.pop()
            served.call.waits_s.append(now_s - served.queued_at_s)
            free -= 1
            heappush(events, (now_s + served.tokens / TOKENS_PER_S, next(numbers), None))
    return waits
