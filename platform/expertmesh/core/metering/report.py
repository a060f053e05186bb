"""Usage and money by tenant, model, pool or day; each row's capacity cost adds up on its own."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from enum import StrEnum

from expertmesh.core.metering.attribution import attribute
from expertmesh.core.metering.capacity import CapacityHold
from expertmesh.core.metering.rating import total_usd
from expertmesh.core.metering.usage import UsageRecord

IDLE = "(idle)"
"""Row of what stood idle where the grouping has no other place for it: idle time has no tenant."""


class By(StrEnum):
    TENANT = "tenant"
    MODEL = "model"
    POOL = "pool"
    DAY = "day"
    """UTC."""


@dataclass(frozen=True, slots=True)
class UsageRow:
    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Part of prompt_tokens."""
    completion_tokens: int = 0
    tariff_usd: Decimal = Decimal(0)
    attributed_nano_usd: int = 0
    idle_nano_usd: int = 0

    @property
    def capacity_nano_usd(self) -> int:
        return self.attributed_nano_usd + self.idle_nano_usd

    def __add__(self, other: "UsageRow") -> "UsageRow":
        return UsageRow(
            requests=self.requests + other.requests,
            prompt_tokens=self.prompt_tokens + other.prompt_tokens,
            cached_tokens=self.cached_tokens + other.cached_tokens,
            completion_tokens=self.completion_tokens + other.completion_tokens,
            tariff_usd=total_usd((self.tariff_usd, other.tariff_usd)),
            attributed_nano_usd=self.attributed_nano_usd + other.attributed_nano_usd,
            idle_nano_usd=self.idle_nano_usd + other.idle_nano_usd,
        )


@dataclass(frozen=True, slots=True)
class UsageReport:
    by: By
    since_s: float | None
    """None, like `until_s`, when there is nothing to report."""
    until_s: float | None
    rows: Mapping[str, UsageRow]
    """In alphabetical order, which is that of time for days."""

    @property
    def total(self) -> UsageRow:
        return sum(self.rows.values(), start=UsageRow())


def summarise(
    by: By,
    day: str,
    since_s: float,
    until_s: float,
    holds: Sequence[CapacityHold],
    requests: Sequence[UsageRecord],
) -> dict[str, UsageRow]:
    """Rows of the time from `since_s` to `until_s`, which lies within `day`.

    A request counts where it was accepted, and costs capacity wherever it was in flight, so
    `requests` holds all that were in flight in this time.
    """
    attribution = attribute(holds, requests, until_s, since_s)
    rows: dict[str, UsageRow] = {}
    for request in requests:
        row = UsageRow(attributed_nano_usd=attribution.requests.get(request.request_id, 0))
        if since_s <= request.at_s < until_s:
            row += UsageRow(
                requests=1,
                prompt_tokens=request.prompt_tokens,
                cached_tokens=request.cached_tokens,
                completion_tokens=request.completion_tokens,
                tariff_usd=request.tariff_usd,
            )
        key = _request_key(by, day, request)
        if row != _NOTHING:
            rows[key] = rows.get(key, _NOTHING) + row
    for held in attribution.holds:
        key = _idle_key(by, day, held.hold)
        if held.idle_nano_usd:
            rows[key] = rows.get(key, _NOTHING) + UsageRow(idle_nano_usd=held.idle_nano_usd)
    return rows


_NOTHING = UsageRow()


def _request_key(by: By, day: str, request: UsageRecord) -> str:
    match by:
        case By.TENANT:
            return request.tenant
        case By.MODEL:
            return request.model
        case By.POOL:
            return request.pool
        case By.DAY:
            return day


def _idle_key(by: By, day: str, hold: CapacityHold) -> str:
    match by:
        case By.TENANT:
            return IDLE
        case By.MODEL:
            return hold.model
        case By.POOL:
            return hold.pool
        case By.DAY:
            return day
