import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertmesh.simulator.fitting import MeasuredIteration, fit_iterations

SHAPES = [(1, 100, 0), (8, 900, 0), (32, 9000, 0), (64, 90_000, 0), (0, 0, 512), (16, 3000, 256)]


def measured(alpha_s: float, beta_s: float, gamma_s: float) -> list[MeasuredIteration]:
    return [
        MeasuredIteration(b, context, p, alpha_s + beta_s * (b + p) + gamma_s * context)
        for b, context, p in SHAPES
    ]


@given(
    st.floats(1e-3, 1e-1),
    st.one_of(st.just(0.0), st.floats(1e-6, 1e-3)),
    st.one_of(st.just(0.0), st.floats(1e-9, 1e-6)),
)
def test_coefficients_are_found_again(alpha_s: float, beta_s: float, gamma_s: float) -> None:
    fit = fit_iterations(measured(alpha_s, beta_s, gamma_s))
    assert fit.alpha_s == pytest.approx(alpha_s, rel=1e-6)
    assert fit.beta_s == pytest.approx(beta_s, rel=1e-4, abs=1e-12)
    assert fit.gamma_s == pytest.approx(gamma_s, rel=1e-4, abs=1e-14)
    assert max(map(abs, fit.errors)) < 1e-9


def test_a_coefficient_is_never_negative() -> None:
    falling = [MeasuredIteration(b, 1000.0 * b, 0, 0.05 - 0.0001 * b) for b in (1, 10, 100)]
    fit = fit_iterations(falling)
    assert fit.alpha_s > 0.0
    assert fit.beta_s == fit.gamma_s == 0.0
    assert fit.errors[0] < 0.0 < fit.errors[2]


def test_what_is_known_is_left_out_of_the_fit() -> None:
    with_known = [
        MeasuredIteration(b, 0, 0, 0.01 + 0.001 * b + 0.02, known_s=0.02) for b in (1, 5, 9)
    ]
    fit = fit_iterations(with_known)
    assert fit.alpha_s == pytest.approx(0.01)
    assert fit.beta_s == pytest.approx(0.001)


def test_errors_are_relative_and_weighted() -> None:
    two = [MeasuredIteration(0, 0, 0, 1.0, weight=100.0), MeasuredIteration(0, 0, 0, 2.0)]
    assert fit_iterations(two).alpha_s == pytest.approx(1.0, rel=0.02)


def test_nothing_and_no_time_are_refused() -> None:
    with pytest.raises(ValueError, match="nothing was measured"):
        fit_iterations([])
    with pytest.raises(ValueError, match="takes time"):
        fit_iterations([MeasuredIteration(1, 1, 1, 0.0)])
