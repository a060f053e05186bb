"""A tenant that floods the queue, in simulated time: what it costs another one."""

from random import Random

import pytest
from tests.core.admission.queue_simulation import (
    Arrival,
    FirstComeQueue,
    Waits,
    bursts,
    simulate,
    steady,
)

from expertmesh.core.admission.fair_queue import FairQueue, QueueBounds

BOUNDS = QueueBounds(requests=200)
SLOTS = 8
UNTIL_S = 400.0


def quiet_and_flood(seed: int, weight: float) -> tuple[list[Arrival], list[Arrival]]:
    """A tenant that sends 40 requests every 20 s, two slots' worth, and one that sends 50 times its
    share. Requests take 1 s on average, so a slot serves one a second.
    """
    quiet = bursts("quiet", Random(seed), period_s=20.0, size=40, until_s=UNTIL_S, weight=weight)
    share_per_s = SLOTS / (1.0 + weight)
    return quiet, steady("flood", Random(-seed - 1), per_s=50 * share_per_s, until_s=UNTIL_S)


def described(quiet: Waits, alone: Waits) -> str:
    return (
        f"p99 wait {quiet.p99_s:.2f} s beside the flood, {alone.p99_s:.2f} s alone, "
        f"{quiet.refused} refused"
    )


@pytest.mark.parametrize("seed", range(3))
def test_a_flood_takes_nothing_of_anothers_share(seed: int) -> None:
    """Equal weights: the other one fares as if it were alone with half of the slots."""
    quiet, flood = quiet_and_flood(seed, weight=1.0)
    alone = simulate(FairQueue(BOUNDS), SLOTS // 2, quiet)["quiet"]
    beside = simulate(FairQueue(BOUNDS), SLOTS, quiet + flood)["quiet"]
    assert alone.p99_s > 1.0
    assert beside.refused == 0 and beside.p99_s <= 1.3 * alone.p99_s, described(beside, alone)


@pytest.mark.parametrize("seed", range(3))
def test_a_flood_at_most_doubles_the_wait_of_one_that_has_the_group_to_itself(seed: int) -> None:
    """Three quarters of the share; with half of it a burst alone takes twice as long."""
    quiet, flood = quiet_and_flood(seed, weight=3.0)
    alone = simulate(FairQueue(BOUNDS), SLOTS, quiet)["quiet"]
    beside = simulate(FairQueue(BOUNDS), SLOTS, quiet + flood)["quiet"]
    assert alone.p99_s > 1.0
    assert beside.refused == 0 and beside.p99_s <= 2.0 * alone.p99_s, described(beside, alone)


def test_the_simulation_can_tell_first_come_first_served_locks_the_other_out() -> None:
    quiet, flood = quiet_and_flood(0, weight=3.0)
    alone = simulate(FirstComeQueue(BOUNDS), SLOTS, quiet)["quiet"]
    beside = simulate(FirstComeQueue(BOUNDS), SLOTS, quiet + flood)["quiet"]
    assert beside.refused > len(quiet) // 2, described(beside, alone)
