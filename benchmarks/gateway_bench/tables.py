"""Measured values as tables, each way beside ours."""

from collections.abc import Mapping, Sequence

from benchmarks.figures import Figure, Row
from benchmarks.gateway_bench.contestants import DIRECT, OURS
from benchmarks.gateway_bench.load import PROMPT_BYTES
from benchmarks.gateway_bench.measure import (
    FAST_EVENTS,
    FAST_STREAMS,
    PACE_MS,
    PACED_EVENTS,
    PACED_STREAMS,
    STALL_S,
    Added,
    HalfLoad,
    HeldMemory,
    Rounds,
    Window,
    joined,
    middle,
    p99,
)

Missing = Mapping[str, str]
"""What could not be measured, and why."""


def added_figure(results: Mapping[str, Added], missing: Missing) -> Figure:
    rows = []
    ours = middle(results[OURS].added_s) if OURS in results else None
    for name, added in results.items():
        rows.append(
            (
                name,
                _ms(middle(added.direct_s)),
                _ms(middle(added.through_s)),
                _ms(middle(added.added_s)),
                _ms(p99(added.added_s)),
                _ratio(middle(added.added_s), ours),
                str(len(added.direct_s)),
            )
        )
    return Figure(
        "Added to one request at a time",
        (
            "gateway",
            "direct p50, ms",
            "through p50, ms",
            "added p50, ms",
            "added p99, ms",
            "added p50, ours = 1",
            "pairs",
        ),
        (*rows, *_missing(missing, 7)),
        (
            f"Not streamed, {PROMPT_BYTES} bytes of prompt, kept connections. Added is the "
            "difference inside a pair of the same request direct and through; smaller is better.",
            *_reasons(missing),
        ),
    )


def rate_figure(connections: int, rounds: Rounds, missing: Missing) -> Figure:
    rows = []
    failures: list[str] = []
    ours = middle([window.rate for window in rounds[OURS]]) if OURS in rounds else None
    for name, windows in rounds.items():
        rate = middle([window.rate for window in windows])
        times = joined(windows, "times_s")
        rows.append(
            (
                name,
                f"{rate:,.0f}",
                _ratio(rate, ours),
                _ms(middle(times)),
                _ms(p99(times)),
                *_cpu(windows, [window.done for window in windows]),
            )
        )
        failures += _failures(name, windows)
    return Figure(
        f"Requests per second, {connections} connections",
        (
            "way",
            "requests/s",
            "ours = 1",
            "p50, ms",
            "p99, ms",
            "CPU µs a request",
            "its core busy",
            "load's core busy",
        ),
        (*rows, *_missing(missing, 8)),
        (
            "Closed loop, not streamed. Medians over interleaved rounds; larger is better. "
            f"`{DIRECT}` is what upstream and load reach together on their core. Where no "
            "core is busy, others took it; then the CPU time tells more than the rate.",
            *failures,
            *_reasons(missing),
        ),
    )


def half_load_figure(results: Mapping[str, HalfLoad], missing: Missing) -> Figure:
    rows = []
    failures: list[str] = []
    for name, half in results.items():
        direct, through = half.direct.times_s, half.through.times_s
        rows.append(
            (
                name,
                f"{half.rate:,.0f}",
                _ms(middle(direct)),
                _ms(p99(direct)),
                _ms(middle(through) - middle(direct)),
                _ms(p99(through) - p99(direct)),
            )
        )
        failures += _failures(name, [half.through])
        if half.through.unsent:
            failures.append(f"{name}: {half.through.unsent} requests found no free connection.")
    return Figure(
        "Added at half of the most requests per second",
        (
            "gateway",
            "requests/s",
            "direct p50, ms",
            "direct p99, ms",
            "added p50, ms",
            "added p99, ms",
        ),
        (*rows, *_missing(missing, 6)),
        (
            "Open loop: requests leave at a fixed rate, whatever becomes of the earlier ones. "
            "Each gateway has its own rate, so rows cannot be compared without it.",
            *failures,
            *_reasons(missing),
        ),
    )


def streams_figure(rounds: Rounds, missing: Missing) -> Figure:
    rows = []
    failures: list[str] = []
    ours = middle([w.event_rate for w in rounds[OURS]]) if OURS in rounds else None
    for name, windows in rounds.items():
        rate = middle([window.event_rate for window in windows])
        rows.append(
            (
                name,
                f"{rate:,.0f}",
                _ratio(rate, ours),
                *_cpu(windows, [window.events for window in windows]),
                str(sum(window.done for window in windows)),
            )
        )
        failures += _failures(name, windows)
    return Figure(
        f"Server-sent events per second, {FAST_STREAMS} streams at full speed",
        (
            "way",
            "events/s",
            "ours = 1",
            "CPU µs an event",
            "its core busy",
            "load's core busy",
            "whole streams",
        ),
        (*rows, *_missing(missing, 7)),
        (
            f"{FAST_EVENTS} events with text a stream, each written by itself as fast as the "
            "upstream can; larger is better.",
            *failures,
            *_reasons(missing),
        ),
    )


def paced_figure(rounds: Rounds, missing: Missing) -> Figure:
    rows = []
    failures: list[str] = []
    direct = joined(rounds[DIRECT], "firsts_s")
    ours = middle(joined(rounds[OURS], "firsts_s")) - middle(direct) if OURS in rounds else None
    for name, windows in rounds.items():
        firsts, gaps = joined(windows, "firsts_s"), joined(windows, "gaps_s")
        added = middle(firsts) - middle(direct)
        stalls = sum(gap > STALL_S for gap in gaps)
        own = name == DIRECT
        rows.append(
            (
                name,
                _ms(middle(firsts)),
                _ms(p99(firsts)),
                "-" if own else _ms(added),
                "-" if own else _ms(p99(firsts) - p99(direct)),
                "-" if own else _ratio(added, ours),
                _ms(middle(gaps)),
                _ms(p99(gaps)),
                f"{1000 * stalls / len(gaps):.2f}" if gaps else "-",
                f"{middle([window.busy for window in windows]):.0%}",
            )
        )
        failures += _failures(name, windows)
    return Figure(
        f"{PACED_STREAMS} streams at once, an event each {PACE_MS} ms",
        (
            "way",
            "first p50, ms",
            "p99, ms",
            "added p50, ms",
            "added p99, ms",
            "ours = 1",
            "gap p50, ms",
            "gap p99, ms",
            "stalls/1,000 gaps",
            "its core busy",
        ),
        (*rows, *_missing(missing, 10)),
        (
            f"{PACED_EVENTS} events with text a stream, so "
            f"{PACED_STREAMS * 1000 // PACE_MS:,} events/s. A stall is a gap over "
            f"{STALL_S * 1000:.0f} ms.",
            *failures,
            *_reasons(missing),
        ),
    )


def held_figure(memory: HeldMemory) -> Figure:
    notes = ["Growth of the resident memory; body and connection of each request included."]
    if memory.refused:
        reason = memory.reason.splitlines()[0] if memory.reason else "no reason"
        notes.append(f"{memory.refused} more were refused: {reason}.")
    return Figure(
        "Memory of requests that wait for a group",
        ("gateway", "held", "growth, MiB", "KiB a request"),
        (
            (
                OURS,
                f"{memory.held:,}",
                f"{memory.growth_bytes / 2**20:.1f}",
                f"{memory.bytes_each / 1024:.1f}",
            ),
        ),
        tuple(notes),
    )


def _ms(seconds: float) -> str:
    value = seconds * 1000
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.2f}"


def _ratio(value: float, ours: float | None) -> str:
    return f"{value / ours:.2f}" if ours else "-"


def _cpu(windows: Sequence[Window], counts: Sequence[int]) -> tuple[str, str, str]:
    cpu_s, count = sum(window.cpu_s for window in windows), sum(counts)
    known = cpu_s > 0 and count > 0
    return (
        f"{cpu_s / count * 1e6:.1f}" if known else "-",
        f"{middle([window.busy for window in windows]):.0%}" if known else "-",
        f"{middle([window.load_busy for window in windows]):.0%}",
    )


def _missing(missing: Missing, columns: int) -> tuple[Row, ...]:
    return tuple((name, "not run", *("-",) * (columns - 2)) for name in missing)


def _reasons(missing: Missing) -> list[str]:
    return [f"{name} was not run: {reason}" for name, reason in missing.items()]


def _failures(name: str, windows: Sequence[Window]) -> list[str]:
    failed = sum(window.failed for window in windows)
    if not failed:
        return []
    first = next(window.first_failure for window in windows if window.failed)
    return [f"{name}: {failed} requests failed, the first with: {' '.join(first.split())[:160]}"]
