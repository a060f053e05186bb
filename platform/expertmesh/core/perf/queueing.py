"""Waiting for a server with constant service times (M/D/1): prompts that wait for steps."""

from math import log

MOST_ATTAINMENT = 0.999
"""No queue keeps every promise: a share of 1 is taken as this."""
_HALVINGS = 40


def wait_s(service_s: float, busy: float, attainment: float) -> float:
    """Within which this share of the customers is served; infinite for a server that is too busy.

    A share of `busy` waits at all, and those wait about exponentially with the mean of M/D/1 (its
    heavy-traffic form, which at 0.5 is a quarter too long for 99 of 100, and less above).
    """
    if busy >= 1:
        return float("inf")
    late = 1 - min(attainment, MOST_ATTAINMENT)
    if busy <= late:
        return 0.0
    return service_s / (2 * (1 - busy)) * log(busy / late)


def busiest(service_s: float, within_s: float, attainment: float) -> float:
    """The share of time that a server may be busy so that this share waits no longer; below 1."""
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if wait_s(service_s, middle, attainment) <= within_s:
            low = middle
        else:
            high = middle
    return low
