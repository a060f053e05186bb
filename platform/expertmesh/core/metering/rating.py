"""Usage times tariff: exact money for the ledger, and whole pico-dollars where time is short."""

from collections.abc import Iterable
from decimal import ROUND_CEILING, ROUND_HALF_EVEN, Context, Decimal, Inexact, InvalidOperation
from functools import lru_cache
from typing import Protocol

# Wide enough for any sum of products of token counts and finite floats; what would not fit raises.
_EXACT = Context(prec=4000, traps=[Inexact, InvalidOperation])
_MILLION_EXPONENT = -6

PICO_USD_PER_USD = 1_000_000_000_000
_PICO_USD_PER_TOKEN = 1_000_000.0
"""For one dollar a million tokens."""
_MOST_QUICK_USD = 1e8
"""Below it, six decimals are at most 14 digits, which a float holds without doubt."""


class Priced(Protocol):
    """A tariff: that of a model deployment, or of a served model as the gateway knows it."""

    @property
    def usd_per_mtok_in(self) -> float: ...
    @property
    def usd_per_mtok_cached(self) -> float: ...
    @property
    def usd_per_mtok_out(self) -> float: ...


@lru_cache(maxsize=4096)
def exact_usd(amount: float) -> Decimal:
    """The amount as a person wrote it: the float 0.1 means 0.1, not its binary neighbour."""
    usd = Decimal(repr(float(amount)))
    if not usd.is_finite():
        raise ValueError(f"a price must be finite, got {amount!r}")
    return usd


def price(
    tariff: Priced, prompt_tokens: int, cached_tokens: int, completion_tokens: int
) -> Decimal:
    """Cached tokens are a part of the prompt and cost their own price instead of the prompt's."""
    if not 0 <= cached_tokens <= prompt_tokens or completion_tokens < 0:
        raise ValueError(
            "token counts must satisfy 0 <= cached <= prompt and 0 <= completion, got "
            f"prompt {prompt_tokens}, cached {cached_tokens}, completion {completion_tokens}"
        )
    usd_in, usd_cached, usd_out, exponent = _units_per_token(
        tariff.usd_per_mtok_in, tariff.usd_per_mtok_cached, tariff.usd_per_mtok_out
    )
    units = (
        (prompt_tokens - cached_tokens) * usd_in
        + cached_tokens * usd_cached
        + completion_tokens * usd_out
    )
    return _EXACT.scaleb(Decimal(units), exponent)


@lru_cache(maxsize=4096)
def _units_per_token(
    usd_per_mtok_in: float, usd_per_mtok_cached: float, usd_per_mtok_out: float
) -> tuple[int, int, int, int]:
    """The three prices in a unit that makes all of them whole, and the unit's power of ten."""
    prices = tuple(
        exact_usd(usd) for usd in (usd_per_mtok_in, usd_per_mtok_cached, usd_per_mtok_out)
    )
    digits = max(0, *(_decimals(usd) for usd in prices))
    usd_in, usd_cached, usd_out = (int(_EXACT.scaleb(usd, digits)) for usd in prices)
    return usd_in, usd_cached, usd_out, _MILLION_EXPONENT - digits


def _decimals(usd: Decimal) -> int:
    exponent = usd.as_tuple().exponent
    assert isinstance(exponent, int), "an amount is finite"
    return -exponent


def pico_usd_per_token(usd_per_mtok: float) -> int:
    """Rounded up; exact for prices of up to six decimals, so that limits and ledger agree."""
    if 0.0 <= usd_per_mtok < _MOST_QUICK_USD:
        pico_usd = round(usd_per_mtok * _PICO_USD_PER_TOKEN)
        # The nearest float to a decimal is that decimal as a person wrote it.
        if pico_usd / _PICO_USD_PER_TOKEN == usd_per_mtok:
            return pico_usd
    exact = _EXACT.scaleb(exact_usd(usd_per_mtok), 6)
    return int(exact.to_integral_value(rounding=ROUND_CEILING))


def price_pico_usd(
    pico_usd_in: int,
    pico_usd_cached: int,
    pico_usd_out: int,
    prompt_tokens: int,
    cached_tokens: int,
    completion_tokens: int,
) -> int:
    """As `price`, with prices per token from `pico_usd_per_token`; the counts are not checked."""
    return (
        (prompt_tokens - cached_tokens) * pico_usd_in
        + cached_tokens * pico_usd_cached
        + completion_tokens * pico_usd_out
    )


def usd_text(pico_usd: int) -> bytes:
    """All digits and no exponent, as a header wants it: `0.0002453`."""
    if pico_usd < 0:
        raise ValueError(f"an amount must not be negative, got {pico_usd} pico-dollars")
    usd, rest = divmod(pico_usd, PICO_USD_PER_USD)
    if not rest:
        return b"%d" % usd
    return (b"%d.%012d" % (usd, rest)).rstrip(b"0")


def total_usd(amounts: Iterable[Decimal]) -> Decimal:
    """`sum` rounds to 28 digits; this does not."""
    total = Decimal(0)
    for amount in amounts:
        total = _EXACT.add(total, amount)
    return total


def add_usd(one: Decimal, other: Decimal) -> Decimal:
    return _EXACT.add(one, other)


def nano_usd_of(usd: Decimal) -> int:
    """To the nearest."""
    return int(_EXACT.scaleb(usd, 9).to_integral_value(rounding=ROUND_HALF_EVEN))


def usd_of(nano_usd: int) -> Decimal:
    return _EXACT.scaleb(Decimal(nano_usd), -9)
