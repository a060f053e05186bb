import pytest

from expertmesh.core.domain.option import GroupRates
from expertmesh.core.scaling.demand import Demand, Flow
from expertmesh.core.scaling.work import Work


def demand(per_s: float, prompt: float = 100.0, output: float = 256.0) -> Demand:
    flow = Flow(10.0, per_s, per_s * prompt, per_s, per_s * prompt, per_s * output)
    return Demand(flow=flow)


def after(seconds: int, *asked: Demand, work: Work | None = None, dt_s: float = 1.0) -> Work:
    work = work or Work()
    for each in asked:
        for _ in range(round(seconds / dt_s)):
            work = work.seen(each, dt_s)
    return work


def test_nothing_is_known_before_requests_have_finished() -> None:
    rates = GroupRates(8, 1e4, 1e3)
    assert not Work().is_known
    assert Work().seconds(rates) is None
    assert (Work().prompt_tokens, Work().output_tokens) == (0.0, 0.0)
    assert not after(1, demand(1.0)).is_known
    assert after(60, demand(1.0)).is_known


def test_a_steady_flow_is_what_it_is_at_once() -> None:
    work = after(10, demand(4.0, 300.0, 50.0))
    assert work.arrivals_per_s == pytest.approx(4.0, rel=0.06)
    assert work.prompt_tokens == pytest.approx(300)
    assert work.output_tokens == pytest.approx(50)
    assert work.seconds(GroupRates(8, 1e4, 1e3)) == pytest.approx(0.03 + 0.05)


def test_a_change_is_followed_arrivals_before_lengths() -> None:
    steady = after(1200, demand(4.0, output=100.0))
    changed = after(60, demand(8.0, output=500.0), work=steady)
    assert 7.0 < changed.arrivals_per_s < 8.0
    assert 100.0 < changed.output_tokens < 300.0
    assert after(1800, demand(8.0, output=500.0), work=steady).output_tokens == pytest.approx(
        500, rel=0.02
    )


def test_lengths_are_those_of_requests_and_not_of_moments() -> None:
    few_long, many_short = demand(0.1, output=1000.0), demand(9.9, output=10.0)
    work = Work()
    for _ in range(600):
        work = work.seen(few_long, 1.0).seen(many_short, 1.0)
    assert work.output_tokens == pytest.approx(0.01 * 1000 + 0.99 * 10, rel=0.05)


@pytest.mark.parametrize("dt_s", [0.5, 5.0, 20.0])
def test_the_length_of_the_steps_hardly_matters(dt_s: float) -> None:
    fine = after(300, demand(2.0), demand(6.0))
    coarse = after(300, demand(2.0), demand(6.0), dt_s=dt_s)
    assert coarse.arrivals_per_s == pytest.approx(fine.arrivals_per_s, rel=0.02)
    assert coarse.output_tokens == pytest.approx(fine.output_tokens, rel=0.02)


def test_time_that_did_not_pass_changes_nothing() -> None:
    work = after(60, demand(2.0))
    assert work.seen(demand(50.0), 0.0) is work
    assert work.seen(demand(50.0), -3600.0) is work


def test_how_seldom_requests_come_is_remembered_for_long() -> None:
    busy = after(3600, demand(2.0))
    idle = after(600, demand(0.0), work=busy)
    assert idle.arrivals_per_s < 0.01
    assert idle.seldom_arrivals_per_s > 1.0


def test_lengths_survive_an_idle_while() -> None:
    work = after(900, demand(2.0, output=77.0))
    assert after(300, demand(0.0), work=work).output_tokens == pytest.approx(77.0)


def test_lengths_that_were_known_are_not_forgotten_while_nothing_finishes() -> None:
    work = after(900, demand(2.0, output=77.0))
    idle = after(12 * 3600, demand(0.0), work=work, dt_s=60.0)
    assert idle.is_known
    assert idle.output_tokens == pytest.approx(77.0)


def test_rates_that_are_not_known_give_no_seconds() -> None:
    assert after(60, demand(1.0)).seconds(GroupRates(8)) is None


def test_requests_without_tokens_are_no_known_work() -> None:
    assert after(60, demand(1.0, 0.0, 0.0)).seconds(GroupRates(8, 1e4, 1e3)) is None
