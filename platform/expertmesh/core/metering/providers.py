"""What external providers charge: capacity that is paid by the token."""

from collections.abc import Iterable
from dataclasses import dataclass

from expertmesh.core.metering.attribution import RequestCost
from expertmesh.core.metering.rating import nano_usd_of, price
from expertmesh.core.metering.usage import UsageRecord


@dataclass(frozen=True, slots=True)
class ProviderTariff:
    """The prices of one model at one external pool, until the next tariff of the two."""

    model: str
    pool: str
    since_s: float
    """Unix time. The first tariff also holds for the time before it."""
    usd_per_mtok_in: float
    usd_per_mtok_cached: float
    usd_per_mtok_out: float

    @property
    def prices(self) -> tuple[float, float, float]:
        return self.usd_per_mtok_in, self.usd_per_mtok_cached, self.usd_per_mtok_out


class ProviderTariffs:
    def __init__(self, tariffs: Iterable[ProviderTariff]) -> None:
        self._of: dict[tuple[str, str], list[ProviderTariff]] = {}
        for tariff in sorted(tariffs, key=lambda each: each.since_s):
            self._of.setdefault((tariff.model, tariff.pool), []).append(tariff)

    def cost(self, request: UsageRecord) -> RequestCost | None:
        """To the nearest nano-dollar, by the tariff when it was accepted; None when no provider
        served it. Its energy is the provider's and counts as none of ours."""
        tariffs = self._of.get((request.model, request.pool))
        if tariffs is None:
            return None
        tariff = tariffs[0]
        for later in tariffs[1:]:
            if later.since_s > request.at_s:
                break
            tariff = later
        prompt, cached = request.prompt_tokens, request.cached_tokens
        whole = nano_usd_of(price(tariff, prompt, cached, request.completion_tokens))
        prefill = min(whole, nano_usd_of(price(tariff, prompt, cached, 0)))
        return RequestCost(whole, prefill, whole - prefill)
