import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertmesh.controller.gateways import GatewayBook, Latency
from expertmesh.core.domain.traffic import GatewayReport, GroupTraffic, ModelTraffic
from expertmesh.core.scaling.demand import Flow, GatewaySeen


def report(
    sent_at_s: float, queued: int = 0, gateway: str = "g", fleet_version: int = 0
) -> GatewayReport:
    return GatewayReport(
        gateway,
        sent_at_s,
        fleet_version=fleet_version,
        models={
            "tiny": ModelTraffic(
                queued_requests=queued,
                queued_prompt_tokens=10 * queued,
                wake_requests=1,
                oldest_wait_s=2.0,
            )
        },
        groups={"em-a": GroupTraffic(in_flight=3), "em-other": GroupTraffic(in_flight=5)},
    )


def seen(book: GatewayBook, model: str = "tiny") -> tuple[GatewaySeen, ...]:
    return book.seen(model, ["em-a"], stale_from_s=50.0)


def test_what_concerns_the_model_is_seen() -> None:
    book = GatewayBook(forget_s=60)
    book.receive(report(1.0, queued=4), now_s=100.0)
    assert seen(book) == (
        GatewaySeen(
            "g",
            100.0,
            None,
            queued=4,
            queued_prompt_tokens=40,
            waking=1,
            oldest_wait_s=2.0,
            in_flight={"em-a": 3},
        ),
    )
    assert seen(book, "other") == (GatewaySeen("g", 100.0, None, in_flight={"em-a": 3}),)


def test_a_gateway_knows_the_fleet_of_its_last_answer_when_it_reports_again() -> None:
    book = GatewayBook(forget_s=60)
    book.receive(report(1.0), now_s=100.0)
    book.told("g", 7, as_of_s=99.5)
    assert seen(book)[0].knows_s is None
    book.receive(report(2.0, fleet_version=7), now_s=101.0)
    assert seen(book)[0].knows_s == 99.5


def test_an_answer_that_was_lost_on_the_way_is_not_known() -> None:
    book = GatewayBook(forget_s=60)
    book.receive(report(1.0), now_s=100.0)
    book.told("g", 7, as_of_s=99.5)
    book.receive(report(2.0, fleet_version=7), now_s=101.0)
    for at_s, version in ((100.5, 8), (101.5, 9)):
        book.told("g", version, as_of_s=at_s)
        book.receive(report(at_s + 1, fleet_version=7), now_s=at_s + 0.5)
        assert seen(book)[0].knows_s == 99.5
    book.told("g", 9, as_of_s=102.5)
    book.receive(report(103.0, fleet_version=9), now_s=103.0)
    assert seen(book)[0].knows_s == 102.5


def test_a_lost_answer_that_changed_nothing_leaves_the_gateway_up_to_date() -> None:
    book = GatewayBook(forget_s=60)
    book.receive(report(1.0), now_s=100.0)
    book.told("g", 7, as_of_s=99.5)
    book.receive(report(2.0, fleet_version=7), now_s=101.0)
    book.told("g", 7, as_of_s=100.5)
    book.receive(report(3.0, fleet_version=7), now_s=102.0)
    assert seen(book)[0].knows_s == 100.5


def test_a_version_that_this_controller_never_told_is_not_known() -> None:
    book = GatewayBook(forget_s=60)
    book.receive(report(1.0, fleet_version=3), now_s=100.0)
    assert seen(book)[0].knows_s is None
    book.told("g", 7, as_of_s=99.5)
    book.receive(report(2.0, fleet_version=3), now_s=101.0)
    assert seen(book)[0].knows_s is None


def test_a_gateway_without_a_fleet_routes_nowhere_and_gets_the_next_one() -> None:
    book = GatewayBook(forget_s=60)
    book.receive(report(1.0), now_s=100.0)
    book.told("g", 7, as_of_s=99.5)
    book.receive(report(2.0), now_s=101.0)
    assert seen(book)[0].knows_s == 99.5


def test_in_flight_is_the_sum_over_gateways_that_still_report() -> None:
    book = GatewayBook(forget_s=60)
    book.receive(report(1.0, gateway="g"), now_s=100.0)
    book.receive(report(1.0, gateway="h"), now_s=103.0)
    assert book.in_flight(heard_from_s=100.0) == {"em-a": 6, "em-other": 10}
    assert book.in_flight(heard_from_s=100.1) == {"em-a": 3, "em-other": 5}
    assert book.in_flight(heard_from_s=103.1) == {}


def test_a_report_that_was_overtaken_changes_nothing() -> None:
    book = GatewayBook(forget_s=60)
    book.receive(report(2.0, queued=1), now_s=100.0)
    book.receive(report(1.0, queued=9), now_s=101.0)
    assert (seen(book)[0].queued, seen(book)[0].heard_at_s) == (1, 100.0)


def test_silent_gateways_are_forgotten() -> None:
    book = GatewayBook(forget_s=60)
    book.receive(report(1.0), now_s=100.0)
    book.forget_silent(160.0)
    assert book.ages_s(160.0) == {"g": 60.0}
    book.forget_silent(160.1)
    assert seen(book) == ()


def test_recalled_gateways_are_silent_with_their_last_value_until_they_report() -> None:
    book = GatewayBook(forget_s=60)
    recorded = (GatewaySeen("g", 1.0, 1.0, queued=7), GatewaySeen("h", 1.0, 1.0))
    book.recall("tiny", recorded, now_s=100.0)
    assert book.awaited == {"g", "h"}
    assert [(s.gateway, s.queued, s.heard_at_s, s.knows_s) for s in seen(book)] == [
        ("g", 7, 50.0, None),
        ("h", 0, 50.0, None),
    ]
    book.receive(report(1.0), now_s=101.0)
    assert book.awaited == {"h"}
    assert [s.heard_at_s for s in seen(book)] == [101.0, 50.0]
    book.forget_silent(160.5)
    assert book.awaited == frozenset()
    assert [s.gateway for s in seen(book)] == ["g"]


def test_a_gateway_that_has_reported_already_is_not_recalled() -> None:
    book = GatewayBook(forget_s=60)
    book.receive(report(1.0), now_s=100.0)
    book.recall("tiny", (GatewaySeen("g", 1.0, 1.0, queued=7),), now_s=100.0)
    assert book.awaited == frozenset()
    assert len(seen(book)) == 1


# Flows: rates of one gateway's totals.


def told(
    requests: int, sent_at_s: float = 0.0, number: int = 0, gateway: str = "g"
) -> GatewayReport:
    """After so many requests: each asks for 100 prompt tokens, has 40 of them cached and gets 7."""
    traffic = ModelTraffic(
        arrivals_total=requests,
        arrived_prompt_tokens_total=100 * requests,
        finished_total=requests,
        uncached_prompt_tokens_total=60 * requests,
        output_tokens_total=7 * requests,
    )
    return GatewayReport(gateway, sent_at_s, number, models={"tiny": traffic})


def flow(book: GatewayBook, model: str = "tiny") -> Flow | None:
    return seen(book, model)[0].flow


def test_a_flow_is_known_after_two_reports() -> None:
    book = GatewayBook(forget_s=60)
    book.receive(told(10), now_s=100.0)
    assert flow(book) is None
    book.receive(told(14), now_s=102.0)
    assert flow(book) == Flow(2.0, 2.0, 200.0, 2.0, 120.0, 14.0)
    assert flow(book, "other") == Flow(2.0)


def test_a_flow_is_over_the_last_ten_seconds() -> None:
    book = GatewayBook(forget_s=60)
    for second in range(31):
        book.receive(told(0 if second < 15 else 100), now_s=100.0 + second)
        if second == 20:
            assert flow(book) == Flow(10.0, 10.0, 1000.0, 10.0, 600.0, 70.0)
    assert flow(book) == Flow(10.0)


def test_what_was_missed_is_spread_over_the_time_that_it_took() -> None:
    book = GatewayBook(forget_s=60)
    book.receive(told(0), now_s=100.0)
    book.receive(told(0), now_s=101.0)
    book.receive(told(50), now_s=126.0)
    known = flow(book)
    assert known is not None
    assert (known.span_s, known.arrivals_per_s) == (25.0, 2.0)


def test_reports_that_come_at_once_do_not_make_a_flood_of_one_request() -> None:
    book = GatewayBook(forget_s=60)
    book.receive(told(0), now_s=100.0)
    book.receive(told(1), now_s=100.002)
    assert flow(book) is None
    book.receive(told(1), now_s=101.0)
    assert flow(book) == Flow(1.0, 1.0, 100.0, 1.0, 60.0, 7.0)


def test_a_worker_that_restarts_is_another_gateway() -> None:
    book = GatewayBook(forget_s=60)
    for second in range(3):
        book.receive(told(1000 + second, gateway="h-1"), now_s=100.0 + second)
    for second in range(3):
        book.receive(told(second, gateway="h-2"), now_s=103.0 + second)
    first, second_seen = seen(book)
    assert first.flow is not None and second_seen.flow is not None
    assert (first.flow.arrivals_per_s, second_seen.flow.arrivals_per_s) == (1.0, 1.0)


def test_totals_that_begin_again_under_the_same_name_are_not_negative() -> None:
    book = GatewayBook(forget_s=60)
    book.receive(told(1000, 1.0, number=50), now_s=100.0)
    book.receive(told(1010, 2.0, number=51), now_s=101.0)
    book.receive(told(5, 3.0, number=1), now_s=102.0)
    assert flow(book) is None
    book.receive(told(7, 4.0, number=2), now_s=103.0)
    assert flow(book) == Flow(1.0, 2.0, 200.0, 2.0, 120.0, 14.0)


@pytest.mark.parametrize("jump_s", [-3600.0, 3600.0])
def test_a_gateways_clock_may_jump(jump_s: float) -> None:
    book = GatewayBook(forget_s=60)
    for second in range(5):
        sent_at_s = second + (jump_s if second >= 2 else 0.0)
        book.receive(told(3 * second, sent_at_s, number=second + 1), now_s=100.0 + second)
    assert seen(book)[0].heard_at_s == 104.0
    assert flow(book) == Flow(4.0, 3.0, 300.0, 3.0, 180.0, 21.0)


def test_an_overtaken_report_changes_no_flow() -> None:
    book = GatewayBook(forget_s=60)
    for second in range(3):
        book.receive(told(second, float(second), number=second + 2), now_s=100.0 + second)
    known = flow(book)
    book.receive(told(0, -1.0, number=1), now_s=102.5)
    assert flow(book) == known


@given(st.lists(st.tuples(st.floats(0.0, 30.0), st.integers(0, 10_000)), min_size=2, max_size=60))
def test_a_flow_is_never_more_than_what_was_reported(steps: list[tuple[float, int]]) -> None:
    book = GatewayBook(forget_s=60)
    now_s, requests = 100.0, 0
    for number, (gap_s, new) in enumerate(steps, 1):
        now_s, requests = now_s + gap_s, requests + new
        book.receive(told(requests, number=number), now_s)
        known = flow(book)
        if known is not None:
            assert 0.0 <= known.arrivals_per_s * known.span_s <= requests + 0.5 + requests * 1e-3
            assert known.output_tokens_per_s == pytest.approx(7 * known.arrivals_per_s, abs=0.01)


# Latencies of groups.


def timed(ttft_s: float, count: int, gateway: str = "g", group: str = "em-a") -> GatewayReport:
    counts = GroupTraffic(
        ttft_s_sum=ttft_s, ttft_count=count, tpot_s_sum=ttft_s / 10, tpot_count=count // 2
    )
    return GatewayReport(gateway, 0.0, groups={group: counts})


def test_a_groups_latency_is_the_mean_over_all_gateways() -> None:
    book = GatewayBook(forget_s=60)
    for second, (one, other) in enumerate([((9.0, 10), (0.0, 0)), ((11.0, 14), (6.0, 4))]):
        book.receive(timed(*one, gateway="g"), now_s=100.0 + second)
        book.receive(timed(*other, gateway="h"), now_s=100.0 + second)
    assert book.latencies(heard_from_s=100.0) == {"em-a": Latency(1.0, 0.2)}
    assert book.latencies(heard_from_s=101.1) == {}


def test_a_group_without_answers_has_no_latency() -> None:
    book = GatewayBook(forget_s=60)
    book.receive(timed(9.0, 10), now_s=100.0)
    assert book.latencies(heard_from_s=0.0) == {}
    book.receive(timed(9.0, 10), now_s=101.0)
    assert book.latencies(heard_from_s=0.0) == {"em-a": Latency(None, None)}


def test_a_group_that_was_counted_anew_has_no_latency() -> None:
    book = GatewayBook(forget_s=60)
    book.receive(timed(9.0, 10), now_s=100.0)
    book.receive(timed(1.0, 12), now_s=101.0)
    assert book.latencies(heard_from_s=0.0)["em-a"].ttft_s is None
