import pytest

from expertmesh.core.admission.reservation import pico_of_usd


@pytest.mark.parametrize(
    ("usd", "pico"),
    [
        (0.3, 300_000_000_000),
        (0.1 + 0.2, 300_000_000_000),
        (1e-12, 1),
        (1.9e-12, 1),
        (1e-13, 0),
        (5, 5 * 10**12),
        (123_456_789.123456, 123_456_789_123_456 * 10**6),
    ],
)
def test_money_is_read_as_it_was_written(usd: float, pico: int) -> None:
    assert pico_of_usd(usd) == pico


@pytest.mark.parametrize("usd", [float("inf"), float("nan")])
def test_what_is_no_amount_is_refused(usd: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        pico_of_usd(usd)
