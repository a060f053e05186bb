"""The least cost is one that a run comes near to, and none falls below."""

from dataclasses import replace

import numpy as np
import pytest
from tests.simulator.follow import Follow
from tests.simulator.small import ENGINE, load, option, scenario

from expertmesh.core.domain.slo import Slo
from expertmesh.simulator.fluid import simulate_fluid
from expertmesh.simulator.oracle import Least, least_cost, problem
from expertmesh.simulator.outcome import Outcome
from expertmesh.simulator.scenario import Scenario
from expertmesh.simulator.workload import Load

LARGE = option(
    "large", 66.0, service=replace(ENGINE, beta_s=5e-6, gamma_s=5e-9, alpha_s=0.01, max_seqs=2048)
)
LARGE = replace(
    LARGE, option=replace(LARGE.option, rates=replace(LARGE.option.rates, in_flight=2048))
)


def wave(seed: int) -> Load:
    draw = np.random.default_rng(seed)
    hours = np.arange(3 * 360) / 360
    return load(*((150 + 100 * np.sin(4 * hours)) * draw.gamma(30, 1 / 30, len(hours))))


def found(question: Scenario, work: Load, *, strict: bool = False) -> Least:
    least = least_cost(problem(question, work, strict=strict))
    assert isinstance(least, Least)
    return least


def followed(question: Scenario, work: Load) -> Outcome:
    least = found(question, work)
    first = tuple(int(count) for count in least.fleet[0])
    start = replace(question, initial_groups=first)
    return simulate_fluid(start, work, lambda scenario: Follow(scenario, least))


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("options", [(option(),), (option(), LARGE)])
def test_who_follows_the_cheapest_fleet_pays_little_more_and_attains(
    seed: int, options: tuple[object, ...]
) -> None:
    question = scenario(*options, slo=Slo(5.0, 0.05))  # type: ignore[arg-type]
    work = wave(seed)
    outcome, least = followed(question, work), found(question, work)
    assert 1.0 <= outcome.usd / least.usd < 1.05
    assert outcome.attainment.both > 0.995
    assert outcome.counts.wasted_starts == 0
    assert found(question, work, strict=True).usd < least.usd


def test_with_a_group_less_it_does_not_attain() -> None:
    question, work = scenario(slo=Slo(5.0, 0.05)), wave(1)
    least = found(question, work)
    fewer = replace(least, fleet=np.maximum(least.fleet - 1, 0))
    start = replace(question, initial_groups=(int(fewer.fleet[0, 0]),))
    outcome = simulate_fluid(start, work, lambda scenario: Follow(scenario, fewer))
    assert outcome.attainment.both < 0.6
