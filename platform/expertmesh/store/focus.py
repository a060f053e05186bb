"""Usage cost under the names of FOCUS, the FinOps Open Cost and Usage Specification, 1.2.

All columns that 1.2 asks of every data set are here, and those conditional ones that we can fill.
One row is what one key spent on one model in one pool on one day, or what the pool cost without
serving anybody. Cost is that of the capacity; what the tariff brings in is in a column of our own.

Null, and why: `ChargeClass`, as nothing is a correction; `RegionId` and `RegionName`, as the
ledger does not know where a pool stands; the sub-account of a row without a tenant.
`BillingAccountId` must not be null, and there is one account. Left out, as they do not apply:
commitment discounts, capacity reservations, SKUs and unit prices (a request's cost depends on who
shared the group with it), invoices, pricing currencies.
"""

import json
from collections.abc import Iterator, Mapping
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal

from expertmesh.core.metering.rating import usd_of
from expertmesh.core.metering.report import IDLE, Cell, UsageRow

FOCUS_VERSION = "1.2"
MANDATORY = (
    "BilledCost",
    "BillingAccountId",
    "BillingAccountName",
    "BillingCurrency",
    "BillingPeriodEnd",
    "BillingPeriodStart",
    "ChargeCategory",
    "ChargeClass",
    "ChargeDescription",
    "ChargePeriodEnd",
    "ChargePeriodStart",
    "ContractedCost",
    "EffectiveCost",
    "InvoiceIssuerName",
    "ListCost",
    "PricingQuantity",
    "PricingUnit",
    "ProviderName",
    "PublisherName",
    "ServiceCategory",
    "ServiceName",
)
COLUMNS = (
    *MANDATORY,
    "ChargeFrequency",
    "ConsumedQuantity",
    "ConsumedUnit",
    "PricingCategory",
    "RegionId",
    "RegionName",
    "ResourceId",
    "ResourceName",
    "ResourceType",
    "ServiceSubcategory",
    "SubAccountId",
    "SubAccountName",
    "SubAccountType",
    "Tags",
    "x_CapacityState",
    "x_Model",
    "x_KeyId",
    "x_Requests",
    "x_PromptTokens",
    "x_CachedTokens",
    "x_CompletionTokens",
    "x_TariffUsd",
    "x_EnergyWh",
)

_US = "ExpertMesh"
_HOUR_US = Decimal(3_600_000_000)
_HOUR_DIGITS = Decimal("0.000001")

FocusRow = dict[str, Decimal | str | int | None]
"""A value for each of COLUMNS."""


def focus_rows(
    cells: Mapping[Cell, UsageRow], since_s: float, until_s: float
) -> Iterator[FocusRow]:
    """The sum of BilledCost is the capacity cost of all cells."""
    for cell, row in cells.items():
        start, end = _charge_period(cell.day, since_s, until_s)
        for charge in _charges(cell, row):
            yield {
                **dict.fromkeys(COLUMNS),
                **_billing(cell.day),
                "ChargePeriodStart": _moment(start),
                "ChargePeriodEnd": _moment(end),
                **_service(cell),
                **charge,
            }


def _charges(cell: Cell, row: UsageRow) -> Iterator[FocusRow]:
    if row.requests or row.attributed_nano_usd:
        external = row.external_nano_usd > 0
        tokens = row.prompt_tokens + row.completion_tokens
        yield {
            **_cost(row.attributed_nano_usd),
            **_quantity(Decimal(tokens), "Tokens"),
            "ChargeDescription": f"Tokens of {cell.model} in pool {cell.pool}",
            "ProviderName": cell.pool if external else _US,
            "PublisherName": cell.pool if external else _US,
            "InvoiceIssuerName": cell.pool if external else _US,
            "x_CapacityState": "external" if external else "attributed",
            "x_Requests": row.requests,
            "x_PromptTokens": row.prompt_tokens,
            "x_CachedTokens": row.cached_tokens,
            "x_CompletionTokens": row.completion_tokens,
            "x_TariffUsd": row.tariff_usd,
            "x_EnergyWh": _energy(row),
        }
    rests = (
        ("idle", "Idle time of ready groups", row.idle_nano_usd, row.idle_us),
        ("starting", "Starts of groups", row.starting_nano_usd, row.starting_us),
        ("draining", "Groups on their way out", row.draining_nano_usd, row.draining_us),
        ("idle nodes", "Nodes without a group", row.idle_nodes_nano_usd, row.idle_nodes_us),
    )
    for state, what, nano_usd, held_us in rests:
        if nano_usd or held_us:
            hours = (Decimal(held_us) / _HOUR_US).quantize(_HOUR_DIGITS)
            yield {
                **_cost(nano_usd),
                **_quantity(hours, "Hours"),
                "ChargeDescription": f"{what} in pool {cell.pool}",
                "x_CapacityState": state,
            }


def _cost(nano_usd: int) -> FocusRow:
    """There are no list prices, contracts or discounts: one amount under all four names."""
    cost = usd_of(nano_usd)
    return dict.fromkeys(("BilledCost", "EffectiveCost", "ContractedCost", "ListCost"), cost)


def _quantity(quantity: Decimal, unit: str) -> FocusRow:
    return {
        "PricingQuantity": quantity,
        "PricingUnit": unit,
        "ConsumedQuantity": quantity,
        "ConsumedUnit": unit,
    }


def _service(cell: Cell) -> FocusRow:
    tags = {"model": _named(cell.model), "key": _named(cell.key)}
    tenant = _named(cell.tenant)
    return {
        "ChargeCategory": "Usage",
        "ChargeFrequency": "Usage-Based",
        "PricingCategory": "Other",
        "ServiceCategory": "AI and Machine Learning",
        "ServiceSubcategory": "Generative AI",
        "ServiceName": "ExpertMesh inference",
        "ProviderName": _US,
        "PublisherName": _US,
        "InvoiceIssuerName": _US,
        "ResourceId": cell.pool,
        "ResourceName": cell.pool,
        "ResourceType": "Pool",
        "SubAccountId": tenant,
        "SubAccountName": tenant,
        "SubAccountType": None if tenant is None else "Tenant",
        "Tags": json.dumps({name: value for name, value in tags.items() if value is not None}),
        "x_Model": tags["model"],
        "x_KeyId": tags["key"],
    }


def _billing(day: str) -> FocusRow:
    start = date.fromisoformat(day).replace(day=1)
    end = (start + timedelta(days=31)).replace(day=1)
    return {
        "BillingAccountId": _US,
        "BillingAccountName": _US,
        "BillingCurrency": "USD",
        "BillingPeriodStart": _moment(datetime(start.year, start.month, 1, tzinfo=UTC)),
        "BillingPeriodEnd": _moment(datetime(end.year, end.month, 1, tzinfo=UTC)),
    }


def _charge_period(day: str, since_s: float, until_s: float) -> tuple[datetime, datetime]:
    """Whole seconds that cover the part of the day that was asked for."""
    start = datetime.fromisoformat(day).replace(tzinfo=UTC)
    end = start + timedelta(days=1)
    first = datetime.fromtimestamp(since_s // 1, UTC)
    last = datetime.fromtimestamp(-(-until_s // 1), UTC)
    return max(start, first), min(end, last)


def _named(name: str) -> str | None:
    return None if name == IDLE else name


def _energy(row: UsageRow) -> Decimal | None:
    if row.energy_wh is None:
        return None
    return Decimal(repr(row.energy_wh)).quantize(_HOUR_DIGITS)


def _moment(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")
