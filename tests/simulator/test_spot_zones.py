"""Generated spot zones have the statistics of public spot traces."""

from bisect import bisect_right

import pytest

from expertmesh.simulator.scenario import Availability
from expertmesh.simulator.spot_zones import spot_zone

DAY_S = 86_400.0
STEP_S = 300
ZONES = [spot_zone(8, 10 * DAY_S, f"{seed}") for seed in range(120)]


def nodes(zone: Availability) -> list[int]:
    times = range(0, int(10 * DAY_S), STEP_S)
    return [zone.nodes[bisect_right(zone.at_s, at_s) - 1] for at_s in times]


SAMPLED = [nodes(zone) for zone in ZONES]


def kept_an_hour(least_age_s: float, most_age_s: float) -> float:
    kept = seen = 0
    hour = 3600 // STEP_S
    for values in SAMPLED:
        age_s = 0
        for index, value in enumerate(values[:-hour]):
            age_s = age_s + STEP_S if value == 8 else 0
            if least_age_s <= age_s <= most_age_s and value == 8:
                seen += 1
                kept += min(values[index : index + hour + 1]) == 8
    return kept / seen


def test_a_zone_has_all_its_nodes_about_half_of_the_time() -> None:
    share = sum(value == 8 for values in SAMPLED for value in values) / (
        len(SAMPLED) * len(SAMPLED[0])
    )
    assert share == pytest.approx(0.5, abs=0.06)


def test_young_nodes_are_lost_soon_and_old_ones_stay() -> None:
    assert kept_an_hour(0, 1800) == pytest.approx(0.32, abs=0.05)
    assert kept_an_hour(7200, 1e9) == pytest.approx(0.91, abs=0.03)


def test_most_losses_take_at_least_half_of_the_nodes() -> None:
    losses = [
        (before, after)
        for zone in ZONES
        for before, after in zip(zone.nodes, zone.nodes[1:], strict=False)
        if after < before
    ]
    large = sum(before - after >= before / 2 for before, after in losses)
    assert 0.56 <= large / len(losses) <= 0.86


@pytest.mark.parametrize("count", [1, 2, 5])
def test_steps_are_in_order_and_within_the_zone(count: int) -> None:
    zone = spot_zone(count, 5 * DAY_S, "x", 60.0)
    assert zone.at_s[0] == 0.0
    assert all(a < b < 5 * DAY_S for a, b in zip(zone.at_s, zone.at_s[1:], strict=False))
    assert all(0 <= value <= count for value in zone.nodes)
    assert zone.notice_s == 60.0
