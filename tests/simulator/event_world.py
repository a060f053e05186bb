"""Small scenarios and policies for the tests of runs request by request."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from expertmesh.core.domain.fleet import Parallelism
from expertmesh.core.domain.hardware import Market
from expertmesh.core.domain.option import GroupOption, GroupRates
from expertmesh.core.domain.slo import Slo
from expertmesh.simulator.policy import Move, ScalingPolicy, View
from expertmesh.simulator.scenario import Availability, Scenario, SimulatedOption, StartTime
from expertmesh.simulator.service_time import ServiceTime
from expertmesh.simulator.workload import Requests

SERVICE = ServiceTime(
    alpha_s=0.02,
    beta_s=1e-5,
    gamma_s=1e-8,
    kv_tokens=200_000,
    max_seqs=64,
    max_batched_tokens=8192,
)


def option(
    service: ServiceTime = SERVICE,
    in_flight: float = 1000.0,
    pool: str = "pool",
    availability: Availability | None = None,
    failure_probability: float = 0.0,
    max_groups: int = 8,
) -> SimulatedOption:
    return SimulatedOption(
        GroupOption(pool, Parallelism(1, 8, 8), 36.0, GroupRates(in_flight, 1e5, 2e3), 60.0),
        service,
        StartTime(60.0, failure_probability=failure_probability),
        1,
        Market.ON_DEMAND if availability is None else Market.SPOT,
        max_groups,
        availability,
    )


def scenario(*options: SimulatedOption, initial: tuple[int, ...] = (1,), **more: float) -> Scenario:
    return Scenario(
        name="s",
        options=options or (option(),),
        slo=Slo(ttft_s=1.0, tpot_s=0.05),
        max_wait_s=more.get("max_wait_s", 10.0),
        metric_delay_s=more.get("metric_delay_s", 5.0),
        drain_deadline_s=more.get("drain_deadline_s", 600.0),
        initial_groups=initial,
        seed=int(more.get("seed", 1)),
    )


def at(times: list[float], prompt: int = 100, output: int = 10, span_s: float = 0.0) -> Requests:
    count = len(times)
    return Requests.of(
        np.array(times), np.full(count, prompt), np.full(count, output), span_s=span_s
    )


@dataclass(slots=True)
class Scripted:
    """Does what it was told to do at these times, and remembers what it saw."""

    moves: dict[float, Callable[[View], tuple[Move, ...]]] = field(default_factory=dict)
    views: list[View] = field(default_factory=list)
    name: str = "scripted"

    def decide(self, view: View) -> tuple[Move, ...]:
        self.views.append(view)
        move = self.moves.get(view.now_s)
        return () if move is None else move(view)

    def __call__(self, scenario: Scenario) -> ScalingPolicy:
        return self
