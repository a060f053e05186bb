"""Tokens per second and time to first token of a running group, direct and through the gateway."""

import time
from dataclasses import dataclass, field

import aiohttp
from benchmarks.figures import Figure, Row, percentile, spread
from benchmarks.load import Pair, Target, client_session, first_token_pairs, tokens_per_s

CONCURRENCIES = (1, 4, 16)
_ROUNDS = 3
_RATE_LIMIT_S = 110.0
"""Rounds that would begin later are left out."""
_PAIRS = 150
_PAIRS_LIMIT_S = 35.0
_GOAL_MS = 3.0


@dataclass(slots=True)
class Rates:
    direct: list[float] = field(default_factory=list)
    gateway: list[float] = field(default_factory=list)


async def measure_rates(direct: Target, gateway: Target, model: str) -> dict[int, Rates]:
    """By concurrency. Each round measures both ways, so that both see the same machine."""
    rates = {concurrency: Rates() for concurrency in CONCURRENCIES}
    until_s = time.monotonic() + _RATE_LIMIT_S
    async with client_session() as http:
        for target in (direct, gateway):
            await tokens_per_s(http, target, model, 4, 8)
        for number in range(_ROUNDS):
            for concurrency, seen in rates.items():
                if number and time.monotonic() > until_s:
                    break
                await _measure_both(http, direct, gateway, model, concurrency, seen, number)
    return rates


async def _measure_both(
    http: aiohttp.ClientSession,
    direct: Target,
    gateway: Target,
    model: str,
    concurrency: int,
    seen: Rates,
    number: int,
) -> None:
    requests = max(4, 2 * concurrency)
    ways = [(direct, seen.direct), (gateway, seen.gateway)]
    for target, values in ways if number % 2 == 0 else reversed(ways):
        values.append(await tokens_per_s(http, target, model, concurrency, requests))


def rates_figure(rates: dict[int, Rates]) -> Figure:
    rows: list[Row] = []
    for concurrency, seen in rates.items():
        ratios = [
            gateway / direct for gateway, direct in zip(seen.gateway, seen.direct, strict=True)
        ]
        rows.append(
            (
                str(concurrency),
                spread(seen.direct),
                spread(seen.gateway),
                spread(ratios, 2),
                str(len(ratios)),
            )
        )
    return Figure(
        "Tokens per second of one group of two ranks",
        ("requests at once", "direct", "through the gateway", "gateway / direct", "rounds"),
        tuple(rows),
        (
            "64 tokens a request, streamed; direct requests go to the ranks in turn. "
            "Medians (smallest to largest) over interleaved rounds.",
        ),
    )


async def measure_first_token(direct: Target, gateway: Target, model: str) -> list[Pair]:
    async with client_session() as http:
        await first_token_pairs(http, direct, gateway, model, 8, _PAIRS_LIMIT_S)
        return await first_token_pairs(http, direct, gateway, model, _PAIRS, _PAIRS_LIMIT_S)


def first_token_figure(rank: str, pairs: list[Pair]) -> Figure:
    added_ms = [pair.added_s * 1000 for pair in pairs]
    rows = tuple(
        (name, spread(values, 2), f"{percentile(values, 0.95):.2f}")
        for name, values in (
            ("direct", [pair.direct_s * 1000 for pair in pairs]),
            ("through the gateway", [pair.gateway_s * 1000 for pair in pairs]),
            ("added", added_ms),
        )
    )
    verdict = "met" if percentile(added_ms, 0.5) <= _GOAL_MS else "missed"
    return Figure(
        f"Time to first token at one request at a time, {rank}",
        ("milliseconds", "median (smallest to largest)", "95th percentile"),
        rows,
        (
            f"{len(pairs)} pairs of one request direct and one through the gateway, in turns.",
            f"Goal: at most {_GOAL_MS:g} ms added at the median: {verdict}.",
        ),
    )
