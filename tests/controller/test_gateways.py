from expertmesh.controller.gateways import GatewayBook
from expertmesh.core.domain.traffic import GatewayReport, GroupTraffic, ModelTraffic
from expertmesh.core.scaling.demand import GatewaySeen


def report(
    sent_at_s: float, queued: int = 0, gateway: str = "g", fleet_version: int = 0
) -> GatewayReport:
    return GatewayReport(
        gateway,
        sent_at_s,
        fleet_version=fleet_version,
        models={"tiny": ModelTraffic(queued_requests=queued, wake_requests=1, oldest_wait_s=2.0)},
        groups={"em-a": GroupTraffic(in_flight=3), "em-other": GroupTraffic(in_flight=5)},
    )


def seen(book: GatewayBook, model: str = "tiny") -> tuple[GatewaySeen, ...]:
    return book.seen(model, ["em-a"], stale_from_s=50.0)


def test_what_concerns_the_model_is_seen() -> None:
    book = GatewayBook(forget_s=60)
    book.receive(report(1.0, queued=4), now_s=100.0)
    assert seen(book) == (GatewaySeen("g", 100.0, None, 4, 1, 2.0, {"em-a": 3}),)
    assert seen(book, "other") == (GatewaySeen("g", 100.0, None, 0, 0, 0.0, {"em-a": 3}),)


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
