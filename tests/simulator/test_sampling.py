import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertmesh.simulator.lengths import Lengths, cut_variance, median_for_mean
from expertmesh.simulator.sampling import Gaps, ServeGenClients
from expertmesh.simulator.synthetic import poisson


def clients(
    rate: float = 5.0,
    gaps: Gaps = Gaps.GAMMA,
    shape: float = 1.0,
    windows: int = 6,
    means: tuple[float, float] = (1000.0, 300.0),
    sigma: float = 1.0,
) -> ServeGenClients:
    start_s = np.linspace(0.0, 600.0 * (windows - 1), windows)
    one = np.ones(windows)
    return ServeGenClients(
        np.zeros(windows, dtype=np.int64),
        start_s,
        rate * one,
        one,
        np.full(windows, int(gaps)),
        shape * one,
        start_s,
        means[0] * one,
        means[1] * one,
        lengths=Lengths(sigma, sigma),
    )


@pytest.mark.parametrize("gaps", list(Gaps))
def test_a_window_has_as_many_requests_as_its_rate_says(gaps: Gaps) -> None:
    requests = clients(2.0, gaps, shape=0.4).sample()
    assert requests.load(600.0).requests.tolist() == [1200.0] * 6
    assert requests.span_s == 3600.0


def test_a_fraction_of_a_request_is_left_to_chance() -> None:
    windows = 4000
    requests = clients(0.25 / 600.0, windows=windows).sample()
    assert len(requests) == pytest.approx(windows / 4, rel=0.1)


@pytest.mark.parametrize(
    ("gaps", "shape", "cv"),
    [
        (Gaps.EXPONENTIAL, 7.0, 1.0),
        (Gaps.GAMMA, 0.25, 2.0),
        (Gaps.GAMMA, 4.0, 0.5),
        (Gaps.WEIBULL, 0.5, 5.0**0.5),
    ],
)
def test_gaps_have_the_spread_of_their_law(gaps: Gaps, shape: float, cv: float) -> None:
    at_s = clients(20.0, gaps, shape).sample().at_s
    between_s = np.diff(at_s)
    assert between_s.std() / between_s.mean() == pytest.approx(cv, rel=0.1)


def test_mean_lengths_follow_the_windows() -> None:
    source = clients(40.0, windows=2)
    source.mean_output_tokens[:] = (100.0, 2000.0)
    requests = source.sample()
    first = requests.at_s < 600.0
    assert requests.output_tokens[first].mean() == pytest.approx(100.0, rel=0.05)
    assert requests.output_tokens[~first].mean() == pytest.approx(2000.0, rel=0.05)
    assert requests.output_tokens[~first].std() > 1500.0


def test_no_length_is_above_the_longest() -> None:
    source = clients(40.0, means=(40_000.0, 20_000.0), sigma=1.5)
    requests = source.sample()
    assert requests.prompt_tokens.max() == 65_536
    assert requests.output_tokens.max() == 32_768
    assert requests.prompt_tokens.mean() == pytest.approx(40_000.0, rel=0.02)


@pytest.mark.parametrize("gaps", list(Gaps))
@pytest.mark.parametrize("rate", [0.05, 3.0, 80.0])
def test_sums_that_are_drawn_directly_are_like_sums_of_requests(gaps: Gaps, rate: float) -> None:
    source = clients(rate, gaps, shape=0.5, windows=60)
    direct, through = source.load(10.0, seed=5), source.sample(seed=6).load(10.0)
    assert direct.requests.sum() == pytest.approx(through.requests.sum(), rel=0.03)
    for name, rel in (("prompt_tokens", 0.1), ("output_tokens", 0.1)):
        one, other = getattr(direct, name).sum(), getattr(through, name).sum()
        assert one == pytest.approx(other, rel=rel)
    assert direct.requests.std() == pytest.approx(through.requests.std(), rel=0.15)
    assert np.all(direct.requests >= 0.0)


def test_a_burst_is_one_in_the_sums_too() -> None:
    calm = clients(50.0, shape=1.0).load(10.0).requests
    wild = clients(50.0, shape=0.005).load(10.0).requests
    assert wild.sum() == pytest.approx(calm.sum())
    assert wild.std() > 5.0 * calm.std()


def test_gaps_beyond_all_spread_still_give_their_requests() -> None:
    source = clients(0.1, shape=1e-9)
    assert len(source.sample()) == 360
    assert source.load(10.0).requests.sum() == pytest.approx(360.0)


def test_a_scaled_client_asks_more_often_with_gaps_of_the_same_law() -> None:
    at_s = clients(5.0, shape=0.25).scaled(4.0).sample().at_s
    between_s = np.diff(at_s)
    assert len(at_s) == 4 * 5 * 3600
    assert between_s.std() / between_s.mean() == pytest.approx(2.0, rel=0.1)


def test_a_part_has_the_windows_that_begin_in_it() -> None:
    part = clients(1.0).between(600.0, 1900.0)
    assert part.window_start_s.tolist() == [0.0, 600.0, 1200.0]
    assert part.start_s.tolist() == [0.0, 600.0, 1200.0]
    assert part.span_s == 1800.0
    assert clients(1.0).between(1.0, 1900.0).span_s == 1800.0


@given(st.floats(2.0, 30_000.0), st.floats(0.0, 2.5))
def test_a_cut_lognormal_has_its_mean_and_variance(mean: float, sigma: float) -> None:
    longest = 32_768.0
    median = median_for_mean(np.array([mean]), sigma, longest)
    # By adding up the law itself: draws would hit its long end too seldom.
    z, step = np.linspace(-12.0, 12.0, 100_001, retstep=True)
    share = np.exp(-z * z / 2.0) / np.sqrt(2.0 * np.pi) * step
    values = np.minimum(median[0] * np.exp(sigma * z), longest)
    found = float(np.sum(share * values))
    assert found == pytest.approx(mean, rel=1e-3)
    variance = float(np.sum(share * (values - found) ** 2))
    expected = float(cut_variance(median, sigma, longest)[0])
    assert expected == pytest.approx(variance, rel=0.01, abs=1e-5 * mean * mean)


def test_a_spread_is_found_again_in_a_sample() -> None:
    sample = poisson(50.0, 1000.0, prompt_tokens=1000, output_tokens=1000, sigma=1.2)
    lengths = Lengths.fit(sample)
    assert lengths.prompt_sigma == pytest.approx(1.2, rel=0.05)
    assert lengths.longest_output == sample.output_tokens.max()


def test_nothing_cannot_be_fitted() -> None:
    with pytest.raises(ValueError, match="no requests"):
        Lengths.fit(poisson(0.0, 10.0))
