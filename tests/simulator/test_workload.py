import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertmesh.simulator.synthetic import bursts, poisson, steps
from expertmesh.simulator.workload import Load, Requests


def a_few(count: int = 6, span_s: float | None = None) -> Requests:
    return Requests.of(
        np.linspace(0.0, 10.0 * (count - 1), count),
        np.arange(count) * 100 + 100,
        np.arange(count) + 1,
        client=np.arange(count),
        span_s=span_s,
    )


def test_requests_are_sorted_with_all_their_columns() -> None:
    requests = Requests.of(
        np.array([3.0, 1.0, 2.0]),
        np.array([30, 10, 20]),
        np.array([3, 1, 2]),
        np.array([13, 11, 12]),
        np.array([7, 8, 9]),
    )
    assert requests.at_s.tolist() == [1.0, 2.0, 3.0]
    assert requests.prompt_tokens.tolist() == [10, 20, 30]
    assert requests.output_tokens.tolist() == [1, 2, 3]
    assert requests.client.tolist() == [8, 9, 7]
    assert requests.span_s == 3.0


def test_a_prompt_is_never_wholly_cached_and_nothing_is_empty() -> None:
    requests = Requests.of(np.zeros(2), np.array([10, 0]), np.array([0, 5]), np.array([99, 3]))
    assert requests.cached_tokens.tolist() == [9, 0]
    assert requests.prompt_tokens.tolist() == [10, 1]
    assert requests.output_tokens.tolist() == [1, 5]


def test_a_part_begins_at_zero_and_is_half_open() -> None:
    part = a_few(span_s=60.0).between(10.0, 30.0)
    assert part.at_s.tolist() == [0.0, 10.0]
    assert part.client.tolist() == [1, 2]
    assert part.span_s == 20.0


def test_a_part_beyond_the_end_is_as_long_as_what_is_there() -> None:
    part = a_few(span_s=60.0).between(55.0, 100.0)
    assert len(part) == 0
    assert part.span_s == 5.0


@given(st.floats(0.0, 5.0), st.integers(0, 1000))
def test_scaling_multiplies_what_is_asked_and_keeps_the_time(factor: float, seed: int) -> None:
    requests = a_few(200, span_s=2000.0)
    scaled = requests.scaled(factor, seed)
    assert len(scaled) == pytest.approx(200 * factor, abs=50)
    if factor == int(factor):
        assert len(scaled) == 200 * factor
    assert scaled.span_s == 2000.0
    assert np.all(np.diff(scaled.at_s) >= 0.0)
    nearest_s = scaled.client * 10.0
    assert np.all(np.abs(scaled.at_s - nearest_s) <= 10.0)
    again = requests.scaled(factor, seed)
    assert again.at_s.tolist() == scaled.at_s.tolist()


def test_scaling_by_one_changes_nothing() -> None:
    requests = a_few(50)
    assert requests.scaled(1.0).at_s.tolist() == requests.at_s.tolist()


@given(st.floats(0.3, 100.0), st.integers(0, 300))
def test_a_load_adds_up_to_its_requests(bin_s: float, count: int) -> None:
    requests = poisson(count / 100.0, 100.0, prompt_tokens=50, output_tokens=7)
    load = requests.load(bin_s)
    assert load.requests.sum() == len(requests)
    assert load.prompt_tokens.sum() == 50 * len(requests)
    assert load.output_tokens.sum() == 7 * len(requests)
    assert load.span_s >= requests.span_s
    assert load.span_s < requests.span_s + bin_s * (1 + 1e-9)


def test_a_load_has_each_request_in_its_bin_and_leaves_out_cached_tokens() -> None:
    requests = Requests.of(
        np.array([0.0, 9.9, 10.0]), np.array([5, 6, 7]), np.array([1, 2, 3]), np.array([1, 1, 1])
    )
    load = requests.load(10.0)
    assert load.requests.tolist() == [3.0]
    load = Requests.of(
        requests.at_s,
        requests.prompt_tokens,
        requests.output_tokens,
        requests.cached_tokens,
        span_s=30.0,
    ).load(10.0)
    assert load.requests.tolist() == [2.0, 1.0, 0.0]
    assert load.prompt_tokens.tolist() == [9.0, 6.0, 0.0]
    assert load.output_tokens.tolist() == [3.0, 3.0, 0.0]
    assert load.start_s.tolist() == [0.0, 10.0, 20.0]


def test_coarser_bins_keep_the_sums() -> None:
    load = Load(10.0, *(np.array([0.0, 1.0, 2.0, 3.0, 4.0]) for _ in range(3)))
    coarse = load.coarser(2)
    assert coarse.bin_s == 20.0
    assert coarse.requests.tolist() == [1.0, 5.0, 4.0]
    assert coarse.output_tokens.sum() == load.output_tokens.sum()


def test_steps_have_their_rates() -> None:
    requests = steps([(100.0, 20.0), (100.0, 0.0), (100.0, 60.0)], sigma=0.5)
    counts = requests.load(100.0).requests
    assert counts[0] == pytest.approx(2000, rel=0.1)
    assert counts[1] == 0
    assert counts[2] == pytest.approx(6000, rel=0.1)
    assert requests.prompt_tokens.mean() == pytest.approx(1000, rel=0.05)
    assert requests.span_s == 300.0


def test_bursts_come_when_they_should() -> None:
    requests = bursts(1.0, 50.0, every_s=100.0, burst_s=10.0, duration_s=250.0)
    counts = requests.load(10.0).requests
    assert [index for index, count in enumerate(counts) if count > 100] == [9, 19]
    assert requests.span_s == 250.0


def test_the_same_seed_gives_the_same_requests() -> None:
    assert poisson(5.0, 50.0, seed=3).at_s.tolist() == poisson(5.0, 50.0, seed=3).at_s.tolist()
    assert poisson(5.0, 50.0, seed=3).at_s.tolist() != poisson(5.0, 50.0, seed=4).at_s.tolist()
