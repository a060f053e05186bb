"""What a model's tokens cost at its tariff, in integers, for budgets and headers.

The ledger's exact amounts come from `core.metering.rating.price`; these are the same, rounded up
to 1e-12 dollars a token.
"""

from typing import Final

import msgspec

from expertmesh.core.domain.fleet import ServedModel
from expertmesh.core.metering.rating import pico_usd_per_token, price_pico_usd


class Price(msgspec.Struct, frozen=True, gc=False):
    prompt_pico_usd: int
    cached_pico_usd: int
    completion_pico_usd: int

    def pico_usd(self, prompt: int, cached: int, completion: int) -> int:
        return price_pico_usd(
            self.prompt_pico_usd,
            self.cached_pico_usd,
            self.completion_pico_usd,
            prompt,
            cached,
            completion,
        )

    def most_pico_usd(self, prompt: int, completion: int) -> int:
        """However much of the prompt will be cached."""
        dearest = max(self.prompt_pico_usd, self.cached_pico_usd)
        return prompt * dearest + completion * self.completion_pico_usd


class PriceBook:
    def __init__(self) -> None:
        self._prices: Final[dict[str, tuple[ServedModel, Price]]] = {}

    def of(self, model: ServedModel) -> Price:
        known = self._prices.get(model.name)
        if known is not None and known[0] is model:
            return known[1]
        price = Price(
            pico_usd_per_token(model.usd_per_mtok_in),
            pico_usd_per_token(model.usd_per_mtok_cached),
            pico_usd_per_token(model.usd_per_mtok_out),
        )
        self._prices[model.name] = (model, price)
        return price
