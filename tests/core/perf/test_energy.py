"""Energy against the published rows, and its edges."""

import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertmesh.core.domain.accelerator import Accelerator
from expertmesh.core.perf.energy import DRAWS, IDLE_SHARE, WORLD_GRID_G_PER_KWH, energy, watts
from expertmesh.spec.catalog_hardware import accelerators

H100 = accelerators()["H100"]
B200 = accelerators()["B200"]

# ml-energy/leaderboard, December 2025: GPU, GPUs, W a GPU, J an output token, at large batches.
# The rate follows from the two, and agrees with the published ones (668 and 1,888 tokens/s/GPU).
PUBLISHED = {
    "Qwen3-235B FP8, batch 512": (H100, 8, 495.0, 0.741),
    "Qwen3-235B FP8, batch 192": (H100, 4, 633.0, 0.840),
    "Qwen3-235B FP8, batch 256": (B200, 2, 945.0, 0.501),
    "R1, batch 128": (B200, 8, 891.0, 2.38),
    "V3.1, batch 3072": (B200, 8, 684.0, 0.606),
    "Qwen3-30B BF16, batch 96": (H100, 1, 494.0, 0.186),
    "Qwen3-30B BF16, batch 1024": (B200, 1, 601.0, 0.056),
    "gpt-oss-120b, batch 64": (H100, 1, 688.0, 0.268),
}
# The smallest batches, whose draw is the low end.
SMALL_BATCHES = {
    "Qwen3-235B FP8, batch 8": (H100, 8, 450.0, 11.39),
    "R1": (B200, 8, 535.0, 9.87),
    "V3.1": (B200, 8, 482.0, 8.57),
}


def error(gpu: Accelerator, gpus: int, published_watts: float, joules: float) -> float:
    rate = gpus * published_watts / joules
    found = energy(gpu, gpus, rate)
    assert found is not None
    return found.joules_per_token / joules - 1


@pytest.mark.parametrize("row", PUBLISHED)
def test_within_a_third_of_each_published_row(row: str) -> None:
    assert abs(error(*PUBLISHED[row])) <= 0.30


def test_median_error_of_the_published_rows() -> None:
    assert statistics.median(abs(error(*row)) for row in PUBLISHED.values()) <= 0.17


@pytest.mark.parametrize("row", PUBLISHED | SMALL_BATCHES)
def test_the_range_holds_each_published_row(row: str) -> None:
    gpu, gpus, published_watts, joules = (PUBLISHED | SMALL_BATCHES)[row]
    found = energy(gpu, gpus, gpus * published_watts / joules)
    assert found is not None
    assert found.joules_per_token_low * 0.99 <= joules <= found.joules_per_token_high * 1.01


def test_the_published_rates_follow_from_watts_and_joules() -> None:
    for row, per_gpu in (
        ("Qwen3-235B FP8, batch 512", 668),
        ("Qwen3-235B FP8, batch 256", 1888),
    ):
        _, _, published_watts, joules = PUBLISHED[row]
        assert published_watts / joules == pytest.approx(per_gpu, rel=0.01)


def test_units() -> None:
    found = energy(H100, 8, 8 * 700 * DRAWS[H100.era].expected)
    assert found is not None
    assert found.joules_per_token == pytest.approx(1.0)
    assert found.wh_per_mtok == pytest.approx(277.78, rel=1e-4)
    # The rest of a node draws 1,030 W a GPU beside the 700 W of its TDP.
    beside = 1030 / (700 * DRAWS[H100.era].expected)
    assert found.all_in_joules_per_token == pytest.approx(1 + beside)
    assert found.all_in_wh_per_mtok == pytest.approx(277.78 * (1 + beside), rel=1e-4)
    assert found.co2_g_per_mtok(100.0) == pytest.approx(27.778 * (1 + beside), rel=1e-4)
    assert found.co2_g_per_mtok(0.0) == 0.0
    assert found.co2_g_per_mtok() == pytest.approx(found.co2_g_per_mtok(WORLD_GRID_G_PER_KWH))


def test_without_an_all_in_figure_there_is_only_the_gpu_s() -> None:
    found = energy(accelerators()["A100"], 8, 1000.0)
    assert found is not None
    assert found.all_in_joules_per_token is None and found.all_in_wh_per_mtok is None
    assert found.co2_g_per_mtok(1000.0) == pytest.approx(found.wh_per_mtok)


@pytest.mark.parametrize("rate", [0.0, -5.0])
def test_no_rate_has_no_energy_per_token(rate: float) -> None:
    assert energy(H100, 8, rate) is None


@given(
    utilisation=st.floats(0, 1),
    more=st.floats(0, 1),
    name=st.sampled_from(sorted(accelerators())),
)
def test_more_work_draws_more_and_never_more_than_tdp(
    utilisation: float, more: float, name: str
) -> None:
    gpu = accelerators()[name]
    higher = max(utilisation, more)
    lower = min(utilisation, more)
    share = 0.83
    assert watts(gpu, lower, share) <= watts(gpu, higher, share) * (1 + 1e-9)
    assert gpu.tdp_watts * IDLE_SHARE * (1 - 1e-9) <= watts(gpu, lower, share) <= gpu.tdp_watts


@given(utilisation=st.floats(0.05, 1), rate=st.floats(1, 1e6))
def test_the_expected_lies_in_the_range(utilisation: float, rate: float) -> None:
    found = energy(B200, 4, rate, utilisation)
    assert found is not None
    assert found.joules_per_token_low < found.joules_per_token < found.joules_per_token_high
