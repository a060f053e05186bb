import pytest

from expertmesh.core.scaling.spot import ADMITTED_AFTER_S, Zone

YOUNG, OLD = 600.0, 3 * 3600.0


def test_a_zone_that_has_been_up_for_long_is_less_likely_to_be_lost() -> None:
    zone = Zone(up_since_s=0.0)
    rates = [zone.losses_per_hour(at_s) for at_s in (YOUNG, 3600.0, OLD)]
    assert rates == pytest.approx([1.14, 0.40, 0.094])


def test_watching_without_a_loss_lowers_the_rate_at_that_age_only() -> None:
    zone = Zone(up_since_s=0.0)
    watched = zone.watched(4 * 3600.0, YOUNG)
    assert watched.losses_per_hour(YOUNG) == pytest.approx(1.14 / 2)
    assert watched.losses_per_hour(OLD) == zone.losses_per_hour(OLD)


def test_a_loss_raises_the_rate_at_its_age_and_makes_the_zone_young() -> None:
    zone = Zone(up_since_s=0.0)
    lost = zone.lost(OLD)
    assert lost.losses == (0.0, 0.0, 1.0)
    assert lost.losses_per_hour(OLD + YOUNG) == pytest.approx(1.14)
    assert lost.losses_per_hour(2 * OLD) == pytest.approx((0.094 * 4 + 1) / 4)


def test_groups_lost_within_a_minute_are_one_loss() -> None:
    zone = Zone(0.0).lost(100.0).lost(130.0).lost(185.0)
    assert sum(zone.losses) == 1
    assert sum(zone.lost(245.0).losses) == 2


def test_a_zone_is_left_alone_after_a_loss_for_its_time() -> None:
    zone = Zone(up_since_s=0.0)
    assert zone.is_admitted(0.0)
    lost = zone.lost(100.0)
    assert not lost.is_admitted(100.0)
    assert not lost.is_admitted(100.0 + ADMITTED_AFTER_S - 1)
    assert lost.is_admitted(100.0 + ADMITTED_AFTER_S)


def test_a_clock_that_was_set_back_is_a_young_zone() -> None:
    assert Zone(up_since_s=9000.0).losses_per_hour(0.0) == pytest.approx(1.14)


def test_a_notice_that_is_seen_again_and_again_does_not_make_the_loss_younger() -> None:
    zone = Zone(up_since_s=0.0)
    for at_s in range(10_000, 10_200, 5):
        zone = zone.lost(float(at_s))
    assert sum(zone.losses) == 1.0
    assert zone.lost_at_s == zone.up_since_s == 10_000.0
    assert not zone.is_admitted(10_000.0 + ADMITTED_AFTER_S - 1)
    assert zone.is_admitted(10_000.0 + ADMITTED_AFTER_S)


def test_a_zone_that_is_still_being_lost_is_not_admitted() -> None:
    zone = Zone(up_since_s=0.0)
    for at_s in range(10_000, 10_000 + round(ADMITTED_AFTER_S) + 30, 30):
        zone = zone.lost(float(at_s))
    assert not zone.is_admitted(10_000.0 + ADMITTED_AFTER_S)
    assert zone.is_admitted(10_000.0 + ADMITTED_AFTER_S + 61)
