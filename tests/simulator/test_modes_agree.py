"""The fluid mode is a short cut of the event mode: both see the same run of the same requests."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from tests.simulator.small import ENGINE, Script, option, scenario

from expertmesh.core.domain.hardware import Market
from expertmesh.simulator.events import simulate_events
from expertmesh.simulator.fluid import simulate_fluid
from expertmesh.simulator.outcome import Outcome
from expertmesh.simulator.policy import Drain, Move, Start
from expertmesh.simulator.scenario import Availability, Scenario, SimulatedOption
from expertmesh.simulator.slo_rates import slo_rates
from expertmesh.simulator.workload import Requests

# A quarter of the usual engine, for a quarter of the requests.
SMALL = replace(ENGINE, beta_s=4e-5, gamma_s=4e-8, max_seqs=256, max_batched_tokens=2048)
FULL = 1 / float(slo_rates(SMALL, 0.05, 500, 400).seconds(500, 400))


def small(pool: str = "od", **changes: object) -> SimulatedOption:
    told = option(pool).option
    return option(
        pool,
        service=SMALL,
        option=replace(told, rates=replace(told.rates, in_flight=256)),
        **changes,
    )


def requests(rate: Callable[[float], float], span_s: float, *, sigma: float = 0.0) -> Requests:
    """Poisson arrivals, with exponential or, given a `sigma`, lognormal output lengths."""
    draw = np.random.default_rng(1)
    most = max(rate(at_s) for at_s in np.arange(0.0, span_s, 1.0))
    at_s = np.sort(draw.uniform(0, span_s, draw.poisson(most * span_s)))
    at_s = at_s[draw.uniform(0, most, len(at_s)) < [rate(each) for each in at_s.tolist()]]
    count = len(at_s)
    output = (
        draw.lognormal(np.log(400) - sigma**2 / 2, sigma, count)
        if sigma
        else draw.exponential(400, count)
    )
    prompt = draw.exponential(500, count)
    return Requests.of(at_s, prompt.astype(int), output.astype(int), span_s=span_s)


def both(
    question: Scenario, asked: Requests, moves: dict[float, tuple[Move, ...]] | None = None
) -> tuple[Outcome, Outcome]:
    def make(scenario: Scenario) -> Script:
        return Script(scenario, moves or {})

    fluid = simulate_fluid(question, asked.load(1.0), make)
    return fluid, simulate_events(question, asked, make)


def in_flight(outcome: Outcome) -> float:
    """Mean, without the beginning."""
    return float(outcome.series.in_flight[len(outcome.series.in_flight) // 4 :].mean())


@pytest.mark.parametrize("use", [0.5, 0.8, 0.95])
def test_a_steady_load_fills_a_group_as_far(use: float) -> None:
    fluid, event = both(scenario(small()), requests(lambda _: use * FULL, 900.0))
    assert in_flight(fluid) == pytest.approx(in_flight(event), rel=0.06)
    assert fluid.attainment.both == pytest.approx(event.attainment.both, abs=0.02)
    assert event.attainment.both > 0.95
    assert fluid.usd == event.usd


def test_a_full_group_makes_as_many_wait() -> None:
    question = scenario(small(), max_wait_s=60)
    fluid, event = both(question, requests(lambda _: 1.3 * FULL, 900.0))
    assert fluid.refused == pytest.approx(event.refused, rel=0.1)
    assert fluid.series.queued.max() == pytest.approx(event.series.queued.max(), rel=0.15)
    assert fluid.attainment.ttft == pytest.approx(event.attainment.ttft, abs=0.05)


def test_long_answers_slow_a_group_down_as_much() -> None:
    question = scenario(small(), output_cv2=float(np.exp(1.0) - 1))
    fluid, event = both(question, requests(lambda _: 0.75 * FULL, 1800.0, sigma=1.0))
    assert in_flight(fluid) == pytest.approx(in_flight(event), rel=0.08)


def test_a_peak_a_start_and_a_drain_come_out_alike() -> None:
    def peak(at_s: float) -> float:
        return (1.5 if 300 < at_s < 900 else 0.6) * FULL

    moves: dict[float, tuple[Move, ...]] = {
        320.0: (Start(0),),
        1000.0: (Drain("em-s-od-2"),),
    }
    fluid, event = both(scenario(small(), max_wait_s=60), requests(peak, 1500.0), moves)
    assert fluid.usd == pytest.approx(event.usd, rel=0.01)
    assert fluid.attainment.both == pytest.approx(event.attainment.both, abs=0.04)
    assert fluid.series.queued.max() == pytest.approx(event.series.queued.max(), rel=0.15)
    assert fluid.cut == event.cut == 0
    assert fluid.counts == event.counts


def test_a_lost_zone_cuts_as_much() -> None:
    zone = Availability((0.0, 500.0), (1, 0), notice_s=60)
    spot = small("spot", market=Market.SPOT, availability=zone)
    question = scenario(small(), spot, initial_groups=(1, 1))
    fluid, event = both(question, requests(lambda _: 1.4 * FULL, 800.0))
    assert fluid.cut == pytest.approx(event.cut, rel=0.25)
    assert fluid.counts == event.counts
    assert fluid.usd_by_option == event.usd_by_option


def test_prompts_that_take_longer_slow_a_group_down_as_much() -> None:
    dear = replace(SMALL, prompt_s=1.2e-4, prompt_chunk_tokens=512)
    slow = small()
    slow = replace(slow, service=dear)
    full = 1 / float(slo_rates(dear, 0.05, 500, 400).seconds(500, 400))
    assert full < 0.9 * FULL
    fluid, event = both(scenario(slow), requests(lambda _: 0.8 * full, 900.0))
    assert in_flight(fluid) == pytest.approx(in_flight(event), rel=0.06)
    assert fluid.attainment.both == pytest.approx(event.attainment.both, abs=0.02)
