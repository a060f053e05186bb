from decimal import Decimal, localcontext
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertmesh.core.domain.deployment import Tariff
from expertmesh.core.domain.fleet import ServedModel
from expertmesh.core.metering.rating import (
    PICO_USD_PER_USD,
    exact_usd,
    pico_usd_per_token,
    price,
    price_pico_usd,
    total_usd,
    usd_text,
)

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


@given(usd_per_mtok, usd_per_mtok, usd_per_mtok, tokens, tokens, tokens)
def test_an_amount_has_the_digits_of_the_sum_that_a_person_would_write(
    usd_in: float, usd_cached: float, usd_out: float, plain: int, cached: int, completion: int
) -> None:
    amount = price(Tariff(usd_in, usd_cached, usd_out), plain + cached, cached, completion)
    with localcontext(prec=1000):
        products = (
            exact_usd(usd_in) * plain,
            exact_usd(usd_cached) * cached,
            exact_usd(usd_out) * completion,
        )
        # Equal amounts are counted by their text on SQLite.
        assert str(amount) == str(sum(products, Decimal(0)).scaleb(-6))


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


six_decimals = st.integers(min_value=0, max_value=10**12).map(lambda millionths: millionths / 1e6)


def pico_usd(usd_in: float, usd_cached: float, usd_out: float, *counts: int) -> int:
    tariff = (usd_in, usd_cached, usd_out)
    return price_pico_usd(*(pico_usd_per_token(usd) for usd in tariff), *counts)


@pytest.mark.parametrize(
    ("usd_per_mtok", "expected"),
    [
        (0.0, 0),
        (0.2, 200_000),
        (0.1 + 0.2, 300_001),  # 0.30000000000000004 as it reads
        (0.3, 300_000),
        (0.000001, 1),
        (0.0000001, 1),
        (1e-300, 1),
        (1.2345674, 1_234_568),
        (123_456_789.123456, 123_456_789_123_456),
        (1e22, 10**28),
    ],
)
def test_a_tokens_price_is_rounded_up_to_a_pico_dollar(usd_per_mtok: float, expected: int) -> None:
    assert pico_usd_per_token(usd_per_mtok) == expected


@given(six_decimals, six_decimals, six_decimals, tokens, tokens, tokens)
def test_prices_of_six_decimals_are_exact(
    usd_in: float, usd_cached: float, usd_out: float, plain: int, cached: int, completion: int
) -> None:
    counts = (plain + cached, cached, completion)
    exact = price(Tariff(usd_in, usd_cached, usd_out), *counts)
    pico = pico_usd(usd_in, usd_cached, usd_out, *counts)
    assert Fraction(pico, PICO_USD_PER_USD) == Fraction(exact)


@given(usd_per_mtok, usd_per_mtok, usd_per_mtok, tokens, tokens, tokens)
def test_a_limit_never_sees_less_than_the_ledger_and_hardly_more(
    usd_in: float, usd_cached: float, usd_out: float, plain: int, cached: int, completion: int
) -> None:
    counts = (plain + cached, cached, completion)
    exact = Fraction(price(Tariff(usd_in, usd_cached, usd_out), *counts)) * PICO_USD_PER_USD
    pico = pico_usd(usd_in, usd_cached, usd_out, *counts)
    assert exact <= pico <= exact + plain + cached + completion


@given(usd_per_mtok)
def test_the_callers_decimal_settings_do_not_matter_for_pico_dollars(usd: float) -> None:
    expected = pico_usd_per_token(usd)
    with localcontext(prec=2):
        assert pico_usd_per_token(usd) == expected


@pytest.mark.parametrize("usd", [float("nan"), float("inf")])
def test_a_price_that_is_no_number_has_no_pico_dollars(usd: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        pico_usd_per_token(usd)


@pytest.mark.parametrize(
    ("pico", "expected"),
    [
        (0, b"0"),
        (1, b"0.000000000001"),
        (245_300_000, b"0.0002453"),
        (10**12, b"1"),
        (12 * 10**12 + 5 * 10**11, b"12.5"),
        (100 * 10**12, b"100"),
        (10**30 + 1, b"1" + b"0" * 18 + b".000000000001"),
    ],
)
def test_an_amount_reads_as_a_person_would_write_it(pico: int, expected: bytes) -> None:
    assert usd_text(pico) == expected


@given(st.integers(min_value=0))
def test_an_amount_as_text_keeps_every_digit(pico: int) -> None:
    text = usd_text(pico).decode()
    assert Fraction(text) == Fraction(pico, PICO_USD_PER_USD)
    assert set(text) <= set("0123456789.") and not (("." in text) and text.endswith(("0", ".")))


def test_a_negative_amount_has_no_text() -> None:
    with pytest.raises(ValueError, match="negative"):
        usd_text(-1)
