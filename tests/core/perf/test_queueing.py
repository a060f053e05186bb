"""Waiting times of M/D/1, against a simulated queue."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertmesh.core.perf.queueing import MOST_ATTAINMENT, busiest, wait_s

shares = st.floats(0.5, 0.999)


def simulated_wait_s(busy: float, attainment: float, customers: int = 200_000) -> float:
    """Of a service time of 1, by Lindley's recursion."""
    rng = random.Random(1)
    wait, waits = 0.0, []
    for _ in range(customers):
        waits.append(wait)
        wait = max(0.0, wait + 1.0 - rng.expovariate(busy))
    waits.sort()
    return waits[int(attainment * customers)]


@pytest.mark.parametrize("busy", [0.5, 0.7, 0.9])
@pytest.mark.parametrize("attainment", [0.95, 0.99])
def test_no_shorter_and_not_much_longer_than_a_simulated_queue(
    busy: float, attainment: float
) -> None:
    measured = simulated_wait_s(busy, attainment)
    assert measured * 0.95 <= wait_s(1.0, busy, attainment) <= measured * 1.4


@given(st.floats(0.001, 10), st.floats(0, 1.2), st.floats(0, 1.2), shares)
def test_a_busier_server_keeps_waiting_longer(
    service_s: float, one: float, other: float, attainment: float
) -> None:
    calm, busy = sorted((one, other))
    assert 0 <= wait_s(service_s, calm, attainment) <= wait_s(service_s, busy, attainment)


@given(st.floats(0.001, 10), st.floats(0, 100), shares)
def test_the_busiest_that_keeps_the_promise(
    service_s: float, within_s: float, attainment: float
) -> None:
    found = busiest(service_s, within_s, attainment)
    assert 0 <= found < 1
    assert wait_s(service_s, found, attainment) <= within_s
    assert wait_s(service_s, min(1.0, found + 1e-6), attainment) >= within_s * (1 - 1e-3)


def test_a_full_server_keeps_no_promise_and_an_idle_one_all() -> None:
    assert wait_s(1.0, 1.0, 0.9) == float("inf")
    assert wait_s(1.0, 0.0, 1.0) == 0.0
    assert wait_s(1.0, 0.5, 1.0) == wait_s(1.0, 0.5, MOST_ATTAINMENT) > 0
    assert wait_s(1.0, 0.05, 0.9) == 0.0  # Nine of ten do not wait at all.
