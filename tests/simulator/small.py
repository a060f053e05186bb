"""Small scenarios, loads and policies for the tests of the simulator."""

from dataclasses import dataclass, field, replace

import numpy as np

from expertmesh.core.domain.fleet import Parallelism
from expertmesh.core.domain.hardware import Market
from expertmesh.core.domain.option import GroupOption, GroupRates
from expertmesh.core.domain.slo import Slo
from expertmesh.simulator.policy import Move, View
from expertmesh.simulator.scenario import Scenario, SimulatedOption, StartTime
from expertmesh.simulator.service_time import ServiceTime
from expertmesh.simulator.workload import Load

ENGINE = ServiceTime(0.01, 1e-5, 1e-8, 2_000_000, 1024, 8192)


def option(pool: str = "od", usd: float = 36.0, **changes: object) -> SimulatedOption:
    told = GroupOption(pool, Parallelism(1, 8, 8), usd, GroupRates(1024), 100)
    base = SimulatedOption(told, ENGINE, StartTime(100, 0.0), 1, Market.ON_DEMAND, 8)
    return replace(base, **changes)  # type: ignore[arg-type]


def scenario(*options: SimulatedOption, **changes: object) -> Scenario:
    base = Scenario("s", options or (option(),), Slo(2.0, 0.05), 30, initial_groups=(1,))
    return replace(base, **changes)  # type: ignore[arg-type]


def load(
    *per_second: float, bin_s: float = 10.0, prompt: float = 500.0, output: float = 400.0
) -> Load:
    requests = np.array(per_second, dtype=float) * bin_s
    return Load(bin_s, requests, requests * prompt, requests * output)


@dataclass
class Script:
    """Moves at given times; keeps what it saw."""

    scenario: Scenario
    moves: dict[float, tuple[Move, ...]] = field(default_factory=dict)
    views: list[View] = field(default_factory=list)
    name: str = "script"

    def decide(self, view: View) -> tuple[Move, ...]:
        self.views.append(view)
        return self.moves.get(view.now_s, ())
