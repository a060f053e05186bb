import pytest

from expertmesh.core.scaling.demand import Demand, GatewaySeen, is_drained, measure

NOW_S = 100.0


def seen(name: str = "g", age_s: float = 0.0, knows_s: float | None = 99.0, **values: object):
    return GatewaySeen(name, NOW_S - age_s, knows_s, **values)  # type: ignore[arg-type]


def measured(*gateways: GatewaySeen) -> Demand:
    return measure(gateways, ["em-a", "em-b"], NOW_S, stale_s=5, forget_s=60)


def test_work_is_what_waits_and_what_runs_over_all_gateways() -> None:
    demand = measured(
        seen("g1", queued=3, oldest_wait_s=1.5, in_flight={"em-a": 2, "em-b": 1}),
        seen("g2", age_s=2, queued=1, oldest_wait_s=0.5, in_flight={"em-a": 4}),
    )
    assert (demand.queued, demand.running, demand.work) == (4, 7, 11)
    assert (demand.oldest_wait_s, demand.oldest_report_s) == (1.5, 2.0)
    assert (demand.live_gateways, demand.stale_gateways) == (2, 0)


def test_requests_that_wake_a_model_count_as_queued() -> None:
    assert measured(seen(queued=0, waking=2)).queued == 2
    assert measured(seen(queued=5, waking=2)).queued == 5


def test_groups_of_other_models_do_not_count() -> None:
    assert measured(seen(in_flight={"em-other": 9})).running == 0


def test_a_silent_gateway_keeps_its_last_value_until_it_is_forgotten() -> None:
    silent = measured(seen("g1", age_s=6, queued=3), seen("g2"))
    assert (silent.work, silent.live_gateways, silent.stale_gateways) == (3, 1, 1)
    forgotten = measured(seen("g1", age_s=61, queued=3), seen("g2"))
    assert (forgotten.work, forgotten.live_gateways, forgotten.stale_gateways) == (0, 1, 0)


def test_without_any_report_nothing_is_known() -> None:
    assert measured() == Demand()


@pytest.mark.parametrize(
    ("gateways", "drained"),
    [
        pytest.param([seen()], True, id="idle and aware of the drain"),
        pytest.param([seen(in_flight={"em-a": 1})], False, id="a request is still there"),
        pytest.param([seen(in_flight={"em-b": 1})], True, id="a request at another group"),
        pytest.param([seen(knows_s=89.9)], False, id="reported before it knew of the drain"),
        pytest.param([seen(knows_s=None)], False, id="has no fleet yet"),
        pytest.param([seen(age_s=6)], False, id="silent"),
        pytest.param([seen("g1", age_s=61), seen("g2")], True, id="one has ended"),
        pytest.param([seen("g1"), seen("g2", in_flight={"em-a": 1})], False, id="one of two"),
        pytest.param([], False, id="no gateway at all"),
        pytest.param([seen(age_s=61)], False, id="all have ended"),
    ],
)
def test_when_a_group_is_drained(gateways: list[GatewaySeen], drained: bool) -> None:
    assert is_drained("em-a", 90.0, tuple(gateways), NOW_S, stale_s=5, forget_s=60) is drained
