"""The soak itself, in short: nothing goes wrong, nothing is left, and little memory is taken."""

from dataclasses import replace
from pathlib import Path

import pytest
import uvloop
from benchmarks.gateway_soak import Sample, Soaked, soak
from rich.console import Console

SECONDS = 20.0
RATE = 150.0
MOST_GROWTH_BYTES = 12 * 2**20
"""So early, caches and the allocator still fill."""


def soaked(*rss_mib: float) -> Soaked:
    samples = tuple(
        Sample(60.0 * minute, int(rss * 2**20), 30, 10, 5, 0) for minute, rss in enumerate(rss_mib)
    )
    return Soaked(samples, {}, (), samples[-1])


def test_memory_is_not_judged_when_requests_piled_up() -> None:
    steady = soaked(*[100.0] * 11)
    last = replace(steady.samples[-1], in_flight=400)
    piled_up = replace(steady, samples=(*steady.samples[:-1], last))
    assert steady.is_flat and not piled_up.is_flat
    assert "cannot be judged" in piled_up.verdict


def test_growth_is_that_after_the_warm_up() -> None:
    assert soaked(50, 90, 100, 100, 100, 100, 100, 100, 100, 100, 100).is_flat
    growing = soaked(50, 90, 100, 101, 102, 103, 104, 105, 106, 107, 108)
    assert not growing.is_flat
    assert growing.growth_bytes == pytest.approx(8 * 2**20)
    assert soaked(50, 90, 100, 104, 99, 103, 98, 102, 97, 103, 98).is_flat


@pytest.mark.integration
def test_a_short_soak(tmp_path: Path) -> None:
    console = Console(width=140)
    result = uvloop.run(soak(SECONDS, RATE, tmp_path, console))
    assert result.faults == {}
    assert result.complaints == ()
    assert result.growth_bytes < MOST_GROWTH_BYTES
    assert max(sample.in_flight for sample in result.samples) > 5
    assert (result.left.in_flight, result.left.clients) == (0, 0)
