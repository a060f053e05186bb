"""The measurements. Each goes through all ways in turn, in an order that changes, several times."""

import asyncio
import gc
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from benchmarks.figures import percentile
from benchmarks.gateway_bench.contestants import DIRECT, Contestant
from benchmarks.gateway_bench.load import (
    WHOLE,
    Ask,
    ClosedLoop,
    LoadError,
    OneAtATime,
    OpenLoop,
    Tally,
    hold,
)

FAST_EVENTS = 512
PACED_EVENTS = 64
PACE_MS = 20
STALL_S = (PACE_MS + 40) / 1000
"""A gap this long is 40 ms more than the upstream makes."""
FAST_STREAMS = 64
PACED_STREAMS = 200
CONNECTIONS = (32, 128)
HELD = 2000
_PAIRS = 2000
_PAIRS_AT_ONCE = 50
_BLOCK_S = 0.2
"""A slow gateway makes fewer pairs, so that the others can make enough."""
_WARM_S = 0.4
_QUIET_S = 3.0
_FEW = 50
_MOST_WINDOWS = 3


class Turns:
    """An order that changes from round to round, so that nobody always follows the same one."""

    def __init__(self, contestants: Sequence[Contestant]) -> None:
        self._order = list(contestants)

    def __iter__(self) -> Iterator[Contestant]:
        yield from self._order
        self._order = [*self._order[1:], self._order[0]]
        self._order[1:] = reversed(self._order[1:])


@dataclass(slots=True)
class Added:
    """One request at a time: the same one direct and through, one after the other."""

    direct_s: list[float] = field(default_factory=list)
    through_s: list[float] = field(default_factory=list)

    @property
    def added_s(self) -> list[float]:
        return [b - a for a, b in zip(self.direct_s, self.through_s, strict=True)]


async def added_one_at_a_time(
    direct: Contestant, gateways: Sequence[Contestant], limit_s: float
) -> dict[str, Added]:
    """At most `_PAIRS` pairs of each; fewer when all together would take over `limit_s`."""
    results = {gateway.name: Added() for gateway in gateways}
    plain = OneAtATime(direct.way)
    lines = {gateway.name: OneAtATime(gateway.way) for gateway in gateways}
    try:
        await plain.start()
        for line in lines.values():
            await line.start()
            await _pairs(plain, line, Added())
        turns, until_s = Turns(gateways), time.monotonic() + limit_s
        with _no_collector():
            while time.monotonic() < until_s:
                for gateway in turns:
                    added = results[gateway.name]
                    if len(added.direct_s) < _PAIRS:
                        await _pairs(plain, lines[gateway.name], added)
                if all(len(added.direct_s) >= _PAIRS for added in results.values()):
                    break
    finally:
        for line in (plain, *lines.values()):
            line.stop()
    return results


async def _pairs(plain: OneAtATime, line: OneAtATime, added: Added) -> None:
    # The first request through wakes the gateway's core, which had nothing to do.
    await line.ask_s()
    until_s = time.monotonic() + _BLOCK_S
    for number in range(_PAIRS_AT_ONCE):
        if time.monotonic() > until_s:
            break
        if number % 2:
            direct_s = await plain.ask_s()
            through_s = await line.ask_s()
        else:
            through_s = await line.ask_s()
            direct_s = await plain.ask_s()
        added.direct_s.append(direct_s)
        added.through_s.append(through_s)


@dataclass(frozen=True, slots=True)
class Window:
    """What happened in one round, without its warm-up."""

    seconds: float
    done: int
    events: int
    failed: int
    first_failure: str
    cpu_s: float
    """Of the gateway."""
    load_cpu_s: float
    """Of upstream and load generator, which share a core."""
    times_s: tuple[float, ...]
    firsts_s: tuple[float, ...]
    gaps_s: tuple[float, ...]
    unsent: int = 0

    @property
    def rate(self) -> float:
        return self.done / self.seconds

    @property
    def event_rate(self) -> float:
        return self.events / self.seconds

    @property
    def busy(self) -> float:
        """Share of the gateway's core."""
        return self.cpu_s / self.seconds

    @property
    def load_busy(self) -> float:
        """Share of the other core."""
        return self.load_cpu_s / self.seconds


@dataclass(frozen=True, slots=True)
class _Mark:
    at_s: float
    cpu_s: float
    load_cpu_s: float
    done: int
    events: int
    times: int
    firsts: int
    gaps: int

    @classmethod
    def now(cls, tally: Tally, contestant: Contestant) -> "_Mark":
        return cls(
            time.perf_counter(),
            contestant.cpu_s,
            contestant.load_cpu_s,
            tally.done,
            tally.events,
            len(tally.times_s),
            len(tally.firsts_s),
            len(tally.gaps_s),
        )


async def _watched(
    load: ClosedLoop | OpenLoop, contestant: Contestant, seconds: float, warm_s: float = _WARM_S
) -> Window:
    """The load has been started; it is stopped here. Slow ones get more time, or one would count
    nothing but the edges of the window."""
    tally = load.tally
    try:
        with _no_collector():
            await asyncio.sleep(warm_s)
            first = last = _Mark.now(tally, contestant)
            for _ in range(_MOST_WINDOWS):
                await asyncio.sleep(seconds)
                last = _Mark.now(tally, contestant)
                if last.done - first.done >= _FEW or last.events - first.events >= _FEW:
                    break
    finally:
        await load.stop()
    window = Window(
        seconds=last.at_s - first.at_s,
        done=last.done - first.done,
        events=last.events - first.events,
        failed=tally.failed,
        first_failure=tally.first_failure,
        cpu_s=last.cpu_s - first.cpu_s,
        load_cpu_s=last.load_cpu_s - first.load_cpu_s,
        times_s=tuple(tally.times_s[first.times : last.times]),
        firsts_s=tuple(tally.firsts_s[first.firsts : last.firsts]),
        gaps_s=tuple(tally.gaps_s[first.gaps : last.gaps]),
        unsent=load.unsent if isinstance(load, OpenLoop) else 0,
    )
    await _quiet(contestant)
    return window


async def _quiet(contestant: Contestant) -> None:
    """Until the gateway has nothing left to do: the next round is another one's."""
    if contestant.name == DIRECT:
        return
    until_s = time.monotonic() + _QUIET_S
    while time.monotonic() < until_s:
        before_s = contestant.cpu_s
        await asyncio.sleep(0.1)
        if contestant.cpu_s - before_s <= 0.02:
            return


Rounds = dict[str, list[Window]]


async def saturated(
    contestants: Sequence[Contestant], connections: int, rounds: int, seconds: float
) -> Rounds:
    results: Rounds = defaultdict(list)
    turns = Turns(contestants)
    for _ in range(rounds):
        for contestant in turns:
            load = ClosedLoop(contestant.way, WHOLE, connections)
            await load.start()
            results[contestant.name].append(await _watched(load, contestant, seconds))
    return results


@dataclass(frozen=True, slots=True)
class HalfLoad:
    rate: float
    direct: Window
    through: Window


async def at_half_load(
    direct: Contestant, gateways: Sequence[Contestant], most: dict[str, float], seconds: float
) -> dict[str, HalfLoad]:
    """At half of what each one does at most, sent at a fixed rate, and direct at the same rate."""
    results = {}
    for gateway in gateways:
        rate = most[gateway.name] / 2
        windows = []
        for contestant in (direct, gateway):
            load = OpenLoop(contestant.way, WHOLE, rate)
            await load.start()
            windows.append(await _watched(load, contestant, seconds))
        results[gateway.name] = HalfLoad(rate, *windows)
    return results


async def full_speed_streams(
    contestants: Sequence[Contestant], rounds: int, seconds: float
) -> Rounds:
    results: Rounds = defaultdict(list)
    turns = Turns(contestants)
    ask = Ask(stream=True, events=FAST_EVENTS)
    for _ in range(rounds):
        for contestant in turns:
            load = ClosedLoop(contestant.way, ask, FAST_STREAMS)
            await load.start()
            results[contestant.name].append(await _watched(load, contestant, seconds))
    return results


async def paced_streams(contestants: Sequence[Contestant], rounds: int, seconds: float) -> Rounds:
    """Their beginnings are spread over the time of one stream, so the load is even."""
    results: Rounds = defaultdict(list)
    turns = Turns(contestants)
    ask = Ask(stream=True, events=PACED_EVENTS, pace_ms=PACE_MS)
    stream_s = PACED_EVENTS * PACE_MS / 1000
    for _ in range(rounds):
        for contestant in turns:
            load = ClosedLoop(contestant.way, ask, PACED_STREAMS, keeps_gaps=True)
            await load.start(spread_s=stream_s)
            results[contestant.name].append(
                await _watched(load, contestant, seconds, warm_s=stream_s)
            )
    return results


@dataclass(frozen=True, slots=True)
class HeldMemory:
    held: int
    refused: int
    reason: str
    growth_bytes: int

    @property
    def bytes_each(self) -> float:
        return self.growth_bytes / self.held if self.held else 0.0


async def held_memory(gateway: Contestant) -> HeldMemory:
    """To be measured in a gateway that has not had much to do yet."""
    warm = ClosedLoop(gateway.way, WHOLE, 32)
    await warm.start()
    await _watched(warm, gateway, 0.5, 0.0)
    before = gateway.rss_bytes
    tally, connections = await hold(gateway.way, HELD)
    try:
        await asyncio.sleep(1.0)
        growth = gateway.rss_bytes - before
        held = sum(connection.busy for connection in connections)
    finally:
        for connection in connections:
            connection.abort()
    await _quiet(gateway)
    if not held:
        raise LoadError(f"no request was held: {tally.first_failure}")
    return HeldMemory(held, HELD - held, tally.first_failure, growth)


@contextmanager
def _no_collector() -> Iterator[None]:
    """The load generator's own garbage collection would show as a slow gateway."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def middle(values: Sequence[float]) -> float:
    return statistics.median(values) if values else 0.0


def joined(windows: Sequence[Window], name: str) -> list[float]:
    """The times of all rounds: `times_s`, `firsts_s` or `gaps_s`."""
    return [value for window in windows for value in getattr(window, name)]


def p99(values: Sequence[float]) -> float:
    return percentile(values, 0.99) if values else 0.0
