import math
from dataclasses import replace

import pytest
from tests.core.scaling.world import pool, size_option

from expertmesh.core.domain.option import GroupRates
from expertmesh.core.domain.slo import Slo
from expertmesh.core.scaling.contract import Load
from expertmesh.core.scaling.demand import Demand, Flow, GroupDoing
from expertmesh.core.scaling.kinds import Kind, Kinds
from expertmesh.core.scaling.load import Serving, measure_load
from expertmesh.core.scaling.work import Work

SLO = Slo(ttft_s=2.0)
POOL = pool("p", nodes=40)
WORK = Work(
    arrivals_per_s=10.0,
    done_per_s=10.0,
    finished_per_s=10.0,
    output_tokens_per_s=2560.0,
    finished=1e3,
)


def kind(scale: int = 1, seconds: float | None = 0.2, ratio: float = 1.0) -> Kind:
    option = size_option(POOL, scale)
    of_one = None if seconds is None else seconds / scale
    return Kind(option, option.rates, of_one, 0.02, ratio, 60.0, POOL, True)


def serving(
    of: Kind, batch: int | None = None, ready_for_s: float | None = 600.0, in_flight: int = 0
) -> Serving:
    doing = None
    if batch is not None:
        t = 0.02 + 0.03 / 64 * batch
        doing = GroupDoing(0.0, 10.0, batch, 0, 0.0, 0.0, batch / t, 0.1, t)
    return Serving(of, ready_for_s, in_flight, doing)


def load(
    *groups: Serving, demand: Demand | None = None, work: Work = WORK, by_tokens: bool = True
) -> Load:
    kinds = Kinds(tuple({group.kind.name: group.kind for group in groups}.values()), by_tokens)
    return measure_load(kinds, groups, demand or Demand(), work, SLO)


def test_without_any_kind_there_is_no_load() -> None:
    assert measure_load(Kinds((), False), (), Demand(queued=9), WORK, SLO) == Load()


def test_without_rates_requests_are_counted() -> None:
    rates = GroupRates(8.0)
    plain = Kind(size_option(POOL), rates, None, None, 1.0, 60.0, POOL, True)
    seen = load(serving(plain), demand=Demand(queued=12, running=4), by_tokens=False)
    assert (seen.now, seen.needed, seen.ready, seen.by_tokens) == (2.0, 2.0, 1.0, False)


def test_ready_and_coming_are_what_groups_can_do_by_their_size() -> None:
    one, two = kind(), kind(2)
    seen = load(serving(one), serving(two), serving(two, ready_for_s=None))
    assert seen.ready == pytest.approx(3.0)
    assert seen.coming == pytest.approx(2.0)


def test_what_arrives_and_what_is_served_are_two_measurements_of_one_thing() -> None:
    both = load(serving(kind(), 64), serving(kind(), 64))
    assert both.now == pytest.approx(2.0)
    less = load(serving(kind(), 32), serving(kind(), 32))
    use = (32 / (0.02 + 0.015)) / (64 / 0.05)
    assert less.now == pytest.approx((2.0 + 2 * use) / 2)


def test_while_requests_wait_the_higher_one_counts() -> None:
    seen = load(serving(kind(), 64), demand=Demand(queued=1))
    assert seen.now == pytest.approx(2.0)
    assert seen.backlog_s == pytest.approx(0.2)


def test_while_requests_go_to_a_provider_at_least_what_arrives_counts() -> None:
    flow = Flow(10.0, 10.0, external_per_s=5.0)
    seen = load(serving(kind(), 32), demand=Demand(flow=flow))
    assert seen.now == pytest.approx(2.0)


def test_a_group_that_will_be_taken_is_measured_but_not_counted_on() -> None:
    stays = serving(kind(), 64)
    seen = load(stays, replace(serving(kind(), 64), stays=False))
    assert seen.now == pytest.approx(2.0)
    assert seen.ready == pytest.approx(1.0)


def test_the_queue_of_a_cold_start_does_not_mean_overload() -> None:
    waits = Demand(queued=5, oldest_wait_s=100.0)
    group = serving(kind(), 1)
    kinds = Kinds((group.kind,), by_tokens=True)
    assert measure_load(kinds, (group,), waits, QUIET, SLO).now > 1.0
    assert measure_load(kinds, (group,), waits, QUIET, SLO, waking=True).now < 1.0


def test_with_no_group_the_arrivals_count() -> None:
    seen = load(serving(kind(), ready_for_s=None))
    assert seen.now == pytest.approx(2.0)


QUIET = Work(
    arrivals_per_s=0.5, done_per_s=0.5, finished_per_s=0.5, output_tokens_per_s=128.0, finished=1e3
)


def test_a_queue_that_waits_too_long_means_overload_whatever_else_says_that_it_is_not() -> None:
    waits = Demand(queued=5, oldest_wait_s=2.5)
    assert load(serving(kind(), 1), demand=waits, work=QUIET).now > 1.0
    soon = Demand(queued=5, oldest_wait_s=1.5)
    assert load(serving(kind(), 1), demand=soon, work=QUIET).now < 1.0
    nothing = Demand(queued=0, oldest_wait_s=2.5)
    assert load(serving(kind(), 1), demand=nothing, work=QUIET).now < 1.0


def test_a_group_that_is_just_ready_is_no_sign_of_overload() -> None:
    waits = Demand(queued=5, oldest_wait_s=2.5)
    assert load(serving(kind(), 1, ready_for_s=5.0), demand=waits, work=QUIET).now < 1.0


@pytest.mark.parametrize(
    ("done_per_s", "over"), [(8.0, 1.25), (10.0, 1.02), (20.0, 1.02), (1.0, 2.0), (0.0, 2.0)]
)
def test_overload_is_what_comes_over_what_gets_done(done_per_s: float, over: float) -> None:
    work = Work(10.0, 10.0, done_per_s, 10.0, 0.0, 2560.0, 1e3)
    many = [serving(kind(), 64) for _ in range(4)]
    seen = load(*many, demand=Demand(queued=5, oldest_wait_s=9.0), work=work)
    assert seen.now == pytest.approx(4.0 * over)


def test_a_group_of_which_nothing_is_heard_is_used_by_its_places() -> None:
    silent = Work(0.0, 0.0, 0.0, 10.0, 0.0, 2560.0, 1e3)
    seen = load(serving(kind(), in_flight=128), work=silent)
    assert seen.now == pytest.approx(128 / 256 / 2)


def test_a_nearly_idle_group_is_used_by_its_tokens_corrected_by_what_was_learned() -> None:
    silent = Work(0.0, 0.0, 0.0, 10.0, 0.0, 2560.0, 1e3)
    seen = load(serving(kind(ratio=2.0), 4), work=silent)
    tokens_per_s = 4 / (0.02 + 0.03 / 64 * 4)
    assert seen.now == pytest.approx(tokens_per_s / 1280.0 * 2.0 / 2)


@pytest.mark.parametrize(
    ("now", "ready", "backlog_s", "wait_s"),
    [
        (0.0, 0.0, 0.0, 0.0),
        (1.0, 2.0, 0.0, 0.0),
        (1.0, 3.0, 10.0, 5.0),
        (2.0, 2.0, 10.0, math.inf),
        (3.0, 2.0, 0.0, math.inf),
        (0.0, 0.0, 1.0, math.inf),
    ],
)
def test_the_wait_that_is_predicted(
    now: float, ready: float, backlog_s: float, wait_s: float
) -> None:
    assert Load(now=now, ready=ready, backlog_s=backlog_s).wait_s == wait_s
