from expertmesh.controller.gateways import GatewayBook
from expertmesh.core.domain.traffic import GatewayReport, GroupTraffic, ModelTraffic
from expertmesh.core.scaling.demand import GatewaySeen


def report(sent_at_s: float, queued: int = 0, gateway: str = "g") -> GatewayReport:
    return GatewayReport(
        gateway,
        sent_at_s,
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
    book.told("g", fleet_as_of_s=99.5)
    assert seen(book)[0].knows_s is None
    book.receive(report(2.0), now_s=101.0)
    assert seen(book)[0].knows_s == 99.5


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
