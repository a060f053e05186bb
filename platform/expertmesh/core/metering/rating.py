"""Usage times tariff: exact money, without a rounding step anywhere."""

from collections.abc import Iterable
from decimal import Context, Decimal, Inexact, InvalidOperation
from typing import Protocol

# Wide enough for any sum of products of token counts and finite floats; what would not fit raises.
_EXACT = Context(prec=4000, traps=[Inexact, InvalidOperation])
_MILLION_EXPONENT = -6


class Priced(Protocol):
    """A tariff: that of a model deployment, or of a served model as the gateway knows it."""

    @property
    def usd_per_mtok_in(self) -> float: ...
    @property
    def usd_per_mtok_cached(self) -> float: ...
    @property
    def usd_per_mtok_out(self) -> float: ...


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
    per_million = total_usd(
        (
            _EXACT.multiply(exact_usd(tariff.usd_per_mtok_in), prompt_tokens - cached_tokens),
            _EXACT.multiply(exact_usd(tariff.usd_per_mtok_cached), cached_tokens),
            _EXACT.multiply(exact_usd(tariff.usd_per_mtok_out), completion_tokens),
        )
    )
    return _EXACT.scaleb(per_million, _MILLION_EXPONENT)


def total_usd(amounts: Iterable[Decimal]) -> Decimal:
    """`sum` rounds to 28 digits; this does not."""
    total = Decimal(0)
    for amount in amounts:
        total = _EXACT.add(total, amount)
    return total
