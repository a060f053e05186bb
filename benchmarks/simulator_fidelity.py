"""The simulator against the live system: the same arrivals, the tiny model on this machine.

    python -m benchmarks.simulator_fidelity                  # about 6 minutes
    python -m benchmarks.simulator_fidelity --save FILE      # and keep what was measured
    python -m benchmarks.simulator_fidelity --measured FILE  # simulate again what was measured

First a few requests at a time, and prompts of several lengths, give the service times of one group.
Then requests arrive as in a synthetic trace, at two rates, live through the gateway and in the
simulator. The goal: throughput within 10 %, and the 90th percentile of the time to first token
within 15 %.
"""

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import aiohttp
import numpy as np
from benchmarks.bench_system import bench_system
from benchmarks.figures import Conditions, Figure, Row
from benchmarks.load import Target, client_session
from rich.console import Console

from expertmesh.core.domain.fleet import Parallelism
from expertmesh.core.domain.hardware import Market
from expertmesh.core.domain.option import GroupOption, GroupRates
from expertmesh.core.domain.slo import Slo
from expertmesh.simulator.events import run_events
from expertmesh.simulator.fitting import MeasuredIteration, fit_iterations
from expertmesh.simulator.policy import Move, ScalingPolicy, View
from expertmesh.simulator.scenario import Scenario, SimulatedOption, StartTime
from expertmesh.simulator.service_time import ServiceTime
from expertmesh.simulator.synthetic import poisson
from expertmesh.simulator.workload import Requests

BATCHES = ((1, 16), (2, 16), (4, 16), (8, 16), (16, 16), (32, 16), (16, 500))
"""Requests at once, and their prompt tokens."""
BATCH_OUTPUT = 64
PROMPTS = (16, 128, 256, 512, 900)
BESIDE = 4
BESIDE_OUTPUT = 400
REPEATS = 2
PROMPT_REPEATS = 16
WARM_UP = 20
LEVELS = (8.0, 20.0)
"""Requests a second."""
LEVEL_S = 90.0
MEAN_PROMPT, MEAN_OUTPUT, SPREAD = 120, 40, 0.6
LONGEST = 400
GOAL_THROUGHPUT, GOAL_FIRST_TOKEN = 0.10, 0.15
_VOCABULARY = range(100, 2000)
_TIMEOUT_S = 200.0
_SETTLE_S = 0.5
_PAUSE_S = 0.1


@dataclass(frozen=True, slots=True)
class Answered:
    at_s: float
    """When it was sent, from the beginning of its measurement."""
    first_s: float
    """From sending to the first token."""
    total_s: float
    tokens: int

    @property
    def tpot_s(self) -> float:
        return (self.total_s - self.first_s) / max(1, self.tokens - 1)


@dataclass(frozen=True, slots=True)
class Batch:
    requests: int
    prompt_tokens: int
    tpot_s: float


@dataclass(frozen=True, slots=True)
class FirstToken:
    prompt_tokens: int
    took_s: float
    """With `BESIDE` others that decode: a group that sleeps must be woken first, and a busy one is
    what this is about."""


@dataclass(frozen=True, slots=True)
class Level:
    requests_per_s: float
    seed: int
    answers: tuple[Answered, ...]
    """In the order of the trace."""


@dataclass(frozen=True, slots=True)
class Measured:
    batches: tuple[Batch, ...]
    first_tokens: tuple[FirstToken, ...]
    kv_tokens: int
    max_seqs: int
    levels: tuple[Level, ...]


@dataclass(frozen=True, slots=True)
class Calibrated:
    service: ServiceTime
    overhead_s: float
    """Of a first token, beyond its iteration: client, gateway, rank."""
    errors: tuple[float, ...]
    """Of the time per token of each kind of batch: fitted by measured, less 1."""


def calibrate(measured: Measured) -> Calibrated:
    """Times per token give what a decode step takes; the slope of first tokens what a prompt adds,
    and where it begins what is not the engine's.

    Of what was measured several times the median counts: one batch whose tokens came late and all
    together looks several times as fast as it was, and would draw the whole fit to itself.
    """
    took: dict[tuple[int, int], list[float]] = {}
    for batch in measured.batches:
        took.setdefault((batch.requests, batch.prompt_tokens), []).append(batch.tpot_s)
    iterations = [
        MeasuredIteration(
            requests,
            requests * (prompt_tokens + BATCH_OUTPUT / 2),
            0,
            statistics.median(times_s),
        )
        for (requests, prompt_tokens), times_s in took.items()
    ]
    fit = fit_iterations(iterations)
    prompts = np.array([first.prompt_tokens for first in measured.first_tokens], dtype=np.float64)
    took_s = np.array([first.took_s for first in measured.first_tokens])
    slope, start = np.polyfit(prompts, took_s, 1)
    beside_s = fit.alpha_s + BESIDE * (fit.beta_s + fit.gamma_s * BESIDE_OUTPUT / 2)
    return Calibrated(
        ServiceTime(
            fit.alpha_s,
            fit.beta_s,
            fit.gamma_s,
            measured.kv_tokens,
            measured.max_seqs,
            max_batched_tokens=10 * max(PROMPTS),
            prompt_s=max(0.0, float(slope)),
        ),
        # It comes in the middle of an iteration, and is computed in the next one.
        max(0.0, float(start) - 1.5 * beside_s),
        fit.errors,
    )


def trace(requests_per_s: float, seed: int) -> Requests:
    asked = poisson(requests_per_s, LEVEL_S, seed, MEAN_PROMPT, MEAN_OUTPUT, SPREAD)
    return Requests.of(
        asked.at_s,
        np.clip(asked.prompt_tokens, 4, LONGEST),
        np.clip(asked.output_tokens, 2, LONGEST),
        span_s=asked.span_s,
    )


def as_sent(level: Level) -> Requests:
    """Its trace at the times when the client really sent it: a busy machine is late, and then sends
    several at once."""
    asked = trace(level.requests_per_s, level.seed)
    at_s = np.array([answer.at_s for answer in level.answers], dtype=np.float64)
    return Requests.of(at_s, asked.prompt_tokens, asked.output_tokens, span_s=asked.span_s)


@dataclass(slots=True)
class _Nothing:
    name: str = "one group"

    def decide(self, view: View) -> tuple[Move, ...]:
        return ()


def leave_it(scenario: Scenario) -> ScalingPolicy:
    return _Nothing()


@dataclass(frozen=True, slots=True)
class Side:
    """One way, live or simulated."""

    tokens_per_s: float
    first_s: tuple[float, float]
    """50th and 90th percentile."""
    tpot_s: float
    """Median."""

    @classmethod
    def of(
        cls, ends_s: Sequence[float], first_s: Sequence[float], tpot_s: Sequence[float], tokens: int
    ) -> "Side":
        p50, p90 = np.percentile(np.array(first_s), (50, 90))
        return cls(
            tokens / max(ends_s), (float(p50), float(p90)), float(np.median(np.array(tpot_s)))
        )


def live(level: Level) -> Side:
    answers = level.answers
    return Side.of(
        [answer.at_s + answer.total_s for answer in answers],
        [answer.first_s for answer in answers],
        [answer.tpot_s for answer in answers],
        sum(answer.tokens for answer in answers),
    )


def scenario_of(service: ServiceTime) -> Scenario:
    """One group, as long as it lasts."""
    option = SimulatedOption(
        GroupOption("cpu", Parallelism(1, 2, 2), 0.6, GroupRates(service.max_seqs), 60.0),
        service,
        StartTime(60.0),
        2,
        Market.LOCAL,
        1,
    )
    return Scenario("live", (option,), Slo(), max_wait_s=_TIMEOUT_S, initial_groups=(1,))


def simulated(calibrated: Calibrated, level: Level) -> Side:
    scenario = scenario_of(calibrated.service)
    requests = as_sent(level)
    times = run_events(scenario, requests, leave_it).times
    several = ~np.isnan(times.tpot_s)
    return Side.of(
        (times.end_s + calibrated.overhead_s).tolist(),
        (times.ttft_s + calibrated.overhead_s).tolist(),
        times.tpot_s[several].tolist(),
        int(times.output_tokens.sum()),
    )


def figure(calibrated: Calibrated, levels: Sequence[Level], conditions: str) -> Figure:
    rows: list[Row] = []
    met = True
    for level in levels:
        real, model = live(level), simulated(calibrated, level)
        ratios = [
            model.tokens_per_s / real.tokens_per_s,
            model.first_s[0] / real.first_s[0],
            model.first_s[1] / real.first_s[1],
            model.tpot_s / real.tpot_s,
        ]
        met = met and abs(ratios[0] - 1) <= GOAL_THROUGHPUT
        met = met and abs(ratios[2] - 1) <= GOAL_FIRST_TOKEN
        for name, side in (("live", real), ("simulated", model)):
            rows.append(
                (
                    f"{level.requests_per_s:g} requests/s, {name}",
                    f"{side.tokens_per_s:.0f}",
                    *(f"{1000 * each:.0f}" for each in (*side.first_s, side.tpot_s)),
                )
            )
        rows.append(("simulated / live", *(f"{ratio:.2f}" for ratio in ratios)))
    service = calibrated.service
    return Figure(
        "The simulator beside the live system, on the same arrivals",
        ("", "tokens/s", "TTFT p50, ms", "TTFT p90, ms", "time per token, ms"),
        tuple(rows),
        (
            f"Tiny model, one group of two ranks; {LEVEL_S:.0f} s of Poisson arrivals a rate, of "
            f"about {MEAN_PROMPT} prompt and {MEAN_OUTPUT} output tokens.",
            f"Fitted: an iteration takes {1000 * service.alpha_s:.1f} ms, "
            f"{1000 * service.beta_s:.3f} ms a sequence, {1e6 * service.gamma_s:.2f} µs a thousand "
            f"tokens of context, {1000 * service.prompt_token_s:.3f} ms a prompt token; "
            f"{1000 * calibrated.overhead_s:.1f} ms of a first token are not the engine's.",
            f"Goal: throughput within 10 % and the 90th percentile of TTFT within 15 %: "
            f"{'met' if met else 'missed'}.",
            conditions,
        ),
    )


# Live


@dataclass(slots=True)
class _Client:
    http: aiohttp.ClientSession
    target: Target
    model: str
    chance: Random = field(default_factory=lambda: Random(7))

    async def ask(self, prompt_tokens: int, output_tokens: int, began_s: float) -> Answered:
        """Raises RuntimeError when the answer is not whole."""
        body = {
            "model": self.model,
            "prompt": self.chance.choices(_VOCABULARY, k=prompt_tokens),
            "max_tokens": output_tokens,
            "ignore_eos": True,
            "temperature": 0.0,
            "stream": True,
        }
        sent_s = time.perf_counter()
        first_s: float | None = None
        received = b""
        async with self.http.post(
            f"{self.target.urls[0]}/v1/completions", json=body, headers=self.target.headers
        ) as response:
            while chunk := await response.content.readany():
                if first_s is None and b'"text"' in chunk:
                    first_s = time.perf_counter() - sent_s
                received += chunk
        total_s = time.perf_counter() - sent_s
        if response.status != 200 or first_s is None or b"data: [DONE]" not in received:
            raise RuntimeError(f"{response.status}: {received[-300:]!r}")
        return Answered(sent_s - began_s, first_s, total_s, output_tokens)

    async def at_once(
        self, requests: int, prompt_tokens: int, output_tokens: int
    ) -> list[Answered]:
        began_s = time.perf_counter()
        return await asyncio.gather(
            *(self.ask(prompt_tokens, output_tokens, began_s) for _ in range(requests))
        )

    async def replay(self, requests: Requests) -> list[Answered]:
        began_s = time.perf_counter()

        async def one(at_s: float, prompt_tokens: int, output_tokens: int) -> Answered:
            await asyncio.sleep(max(0.0, began_s + at_s - time.perf_counter()))
            return await self.ask(prompt_tokens, output_tokens, began_s)

        columns = (requests.at_s, requests.prompt_tokens, requests.output_tokens)
        return await asyncio.gather(
            *(one(*row) for row in zip(*(column.tolist() for column in columns), strict=True))
        )


async def measure(
    gateway: Target, model: str, capacity: tuple[int, int], console: Console
) -> Measured:
    async with client_session() as http:
        client = _Client(http, gateway, model)
        await client.at_once(WARM_UP, 64, 32)
        batches, first_tokens = await _calibration(client, console)
        levels = []
        for number, rate in enumerate(LEVELS):
            console.print(f"{rate:g} requests/s for {LEVEL_S:.0f} s")
            answers = await client.replay(trace(rate, number + 1))
            levels.append(Level(rate, number + 1, tuple(answers)))
        # Again at the end: the machine may have become faster or slower meanwhile.
        more_batches, more_first_tokens = await _calibration(client, console)
    return Measured(
        tuple(batches + more_batches),
        tuple(first_tokens + more_first_tokens),
        *capacity,
        tuple(levels),
    )


async def _calibration(client: _Client, console: Console) -> tuple[list[Batch], list[FirstToken]]:
    batches: list[Batch] = []
    first_tokens: list[FirstToken] = []
    for _ in range(REPEATS):
        for requests, prompt_tokens in BATCHES:
            answers = await client.at_once(requests, prompt_tokens, BATCH_OUTPUT)
            tpot_s = statistics.median(answer.tpot_s for answer in answers)
            batches.append(Batch(requests, prompt_tokens, tpot_s))
    for prompt_tokens in PROMPTS:
        others = asyncio.create_task(client.at_once(BESIDE, 16, BESIDE_OUTPUT))
        await asyncio.sleep(_SETTLE_S)
        took_s = []
        for _ in range(PROMPT_REPEATS):
            # An answer ends with an iteration. Sent at once, the next request would always find
            # the same moment of one, not any: how long it waits would be no half of it.
            await asyncio.sleep(client.chance.uniform(0.0, _PAUSE_S))
            took_s.append((await client.at_once(1, prompt_tokens, 2))[0].first_s)
        await others
        first_tokens.append(FirstToken(prompt_tokens, statistics.median(took_s)))
    for batch in batches:
        console.print(
            f"{batch.requests} at once, {batch.prompt_tokens} prompt tokens: "
            f"{1000 * batch.tpot_s:.1f} ms a token"
        )
    for first in first_tokens:
        console.print(
            f"{first.prompt_tokens} prompt tokens: first after {1000 * first.took_s:.1f} ms"
        )
    return batches, first_tokens


def from_json(content: dict[str, Any]) -> Measured:
    return Measured(
        tuple(Batch(**each) for each in content["batches"]),
        tuple(FirstToken(**each) for each in content["first_tokens"]),
        content["kv_tokens"],
        content["max_seqs"],
        tuple(
            Level(
                each["requests_per_s"],
                each["seed"],
                tuple(Answered(**answer) for answer in each["answers"]),
            )
            for each in content["levels"]
        ),
    )


def _measure_here(console: Console) -> Measured:
    with bench_system() as system:
        groups = system.running.until_groups(1)
        infos = [system.running.rank(rank["base_url"], "/em/info") for rank in groups[0]["ranks"]]
        capacity = (
            sum(info["kv_tokens"] for info in infos),
            sum(info["max_running"] for info in infos),
        )
        console.print(f"{capacity[0]} tokens of cache, {capacity[1]} sequences")
        return asyncio.run(measure(system.gateway, system.model, capacity, console))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--save", type=Path, help="file for what was measured")
    parser.add_argument(
        "--measured", type=Path, help="file of an earlier run, in place of a new one"
    )
    arguments = parser.parse_args()
    console = Console()
    conditions = Conditions.now()
    if arguments.measured is not None:
        measured, note = from_json(json.loads(arguments.measured.read_text())), "measured earlier"
    else:
        measured = _measure_here(console)
        note = conditions.until_now()
        if arguments.save is not None:
            arguments.save.write_text(json.dumps(asdict(measured)))
    calibrated = calibrate(measured)
    worst = max(abs(error) for error in calibrated.errors)
    console.print(f"The fit is within {100 * worst:.0f} % of the times per token.")
    console.print(figure(calibrated, measured.levels, note).to_rich())
    for line in figure(calibrated, measured.levels, note).notes:
        console.print(line)


if __name__ == "__main__":
    main()
