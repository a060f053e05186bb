from decimal import Decimal, localcontext
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertmesh.core.domain.deployment import Tariff
from expertmesh.core.domain.fleet import ServedModel
from expertmesh.core.metering.rating import exact_usd, price, total_usd

usd_per_mtok = st.floats(min_value=0, max_value=1e6)
tokens = st.integers(min_value=0, max_value=10**12)


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ((0, 0, 0), "0"),
        ((1_000_000, 0, 0), "0.20"),
        ((1_000_000, 1_000_000, 0), "0.05"),
        ((0, 0, 1_000_000), "0.60"),
        ((1, 0, 0), "0.0000002"),
        ((1234, 234, 56), "0.0002453"),
    ],
    ids=["nothing", "prompt", "cached prompt", "completion", "one token", "a mix"],
)
def test_prices_as_the_tariff_reads(counts: tuple[int, int, int], expected: str) -> None:
    assert price(Tariff(0.20, 0.05, 0.60), *counts) == Decimal(expected)


def test_a_served_model_is_a_tariff_too() -> None:
    model = ServedModel("tiny-moe", 1024, 0.1, 0.02, 0.4, max_wait_s=30)
    assert price(model, 10, 4, 3) == Decimal("0.00000188")


def test_floats_mean_what_was_written() -> None:
    # In binary, 0.1 + 0.2 is not 0.3 and three times 0.1 is not 0.3 either.
    assert price(Tariff(0.1, 0, 0), 3_000_000, 0, 0) == Decimal("0.3")
    assert exact_usd(0.1) == Decimal("0.1")


@given(usd_per_mtok, usd_per_mtok, usd_per_mtok, tokens, tokens, tokens)
def test_no_digit_is_ever_lost(
    usd_in: float, usd_cached: float, usd_out: float, plain: int, cached: int, completion: int
) -> None:
    amount = price(Tariff(usd_in, usd_cached, usd_out), plain + cached, cached, completion)
    expected = (
        Fraction(repr(usd_in)) * plain
        + Fraction(repr(usd_cached)) * cached
        + Fraction(repr(usd_out)) * completion
    ) / 1_000_000
    assert Fraction(amount) == expected


def test_the_callers_decimal_settings_do_not_matter() -> None:
    with localcontext(prec=2):
        assert price(Tariff(0.123456, 0, 0), 1, 0, 0) == Decimal("0.000000123456")


def test_totals_keep_every_digit() -> None:
    amounts = [Decimal(10) ** 30, Decimal("1e-30"), Decimal("0.1")]
    assert total_usd(amounts) == Decimal("1" + "0" * 30 + ".1" + "0" * 28 + "1")
    assert total_usd([]) == 0


@pytest.mark.parametrize("counts", [(-1, 0, 0), (5, 6, 0), (5, -1, 0), (5, 0, -1)])
def test_impossible_counts_are_refused(counts: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="0 <= cached <= prompt"):
        price(Tariff(1, 1, 1), *counts)


@pytest.mark.parametrize("usd", [float("nan"), float("inf")])
def test_a_price_that_is_no_number_is_refused(usd: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        price(Tariff(usd, 0, 0), 1, 0, 0)
