"""What the admin API takes and answers, as JSON."""

from dataclasses import replace
from decimal import Decimal
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from expertmesh.core.domain.tenant import Limits, Priority, Tenant
from expertmesh.core.metering.report import By, UsageReport, UsageRow
from expertmesh.store.keys import KeyRecord, NewKey
from expertmesh.store.tenants import TenantRecord, TenantUse, Used

Count = Annotated[int, Field(strict=True, description="A whole number above 0; null: no limit.")]
Usd = Annotated[
    float, Field(strict=True, allow_inf_nan=False, description="Dollars above 0; null: no limit.")
]
Text = Annotated[str, Field(strict=True)]
Reference = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,80}$")]
"""What may be the name of a tenant or the id of a key; nothing else reaches the store."""
ExactUsd = Annotated[str, Field(description="Dollars as an exact decimal.")]
UnixTime = Annotated[
    float, Field(strict=True, allow_inf_nan=False, description="Unix time in seconds.")
]


class _In(BaseModel):
    model_config = ConfigDict(extra="forbid")


class LimitsIn(_In):
    requests_per_min: Count | None = None
    tokens_per_min: Count | None = None
    concurrent_requests: Count | None = None
    usd_per_day: Usd | None = None
    usd_per_month: Usd | None = None

    def whole(self) -> Limits:
        return Limits(**self.model_dump())

    def onto(self, limits: Limits) -> Limits:
        """With those that the client named; null clears one."""
        return replace(limits, **self.model_dump(exclude_unset=True))


class TenantIn(_In):
    """All settings; what is left out gets its default."""

    priority: Priority = Priority.STANDARD
    weight: Annotated[float, Field(strict=True, allow_inf_nan=False)] = 1.0
    limits: LimitsIn = LimitsIn()

    def tenant(self, name: str) -> Tenant:
        return Tenant(name, self.priority, self.weight, self.limits.whole())


class TenantChange(TenantIn):
    """What is left out stays as it is."""

    def onto(self, tenant: Tenant) -> Tenant:
        named = self.model_fields_set
        return replace(
            tenant,
            priority=self.priority if "priority" in named else tenant.priority,
            weight=self.weight if "weight" in named else tenant.weight,
            limits=self.limits.onto(tenant.limits),
        )


class KeyIn(_In):
    tenant: Text
    name: Text = ""
    expires_at_s: UnixTime | None = None
    models: list[Text] | None = None
    """Those that the key may use; null for all."""
    admin: Annotated[bool, Field(strict=True)] = False
    """The key opens the admin API, and only that."""
    limits: LimitsIn = LimitsIn()


class KeyChange(_In):
    """What is left out stays as it is."""

    name: Text = ""
    models: list[Text] | None = None
    limits: LimitsIn = LimitsIn()

    def onto(self, key: KeyRecord) -> KeyRecord:
        named = self.model_fields_set
        models = key.models
        if "models" in named:
            models = None if self.models is None else tuple(self.models)
        return replace(
            key,
            name=self.name if "name" in named else key.name,
            models=models,
            limits=self.limits.onto(key.limits),
        )


class PageQuery(_In):
    limit: Annotated[int, Field(ge=1, le=1000)] = 100
    after: Reference | None = None
    """`last_id` of the page before."""


class KeyQuery(PageQuery):
    tenant: Reference | None = None


class UsageQuery(_In):
    by: By = By.MODEL
    since: str | None = None
    """A date such as 2026-01-31, a time (UTC unless it says otherwise), or Unix seconds. Without
    it: the last 24 hours."""
    until: str | None = None


class LimitsOut(BaseModel):
    requests_per_min: int | None
    tokens_per_min: int | None
    concurrent_requests: int | None
    usd_per_day: float | None
    usd_per_month: float | None

    @classmethod
    def of(cls, limits: Limits) -> "LimitsOut":
        return cls(
            requests_per_min=limits.requests_per_min,
            tokens_per_min=limits.tokens_per_min,
            concurrent_requests=limits.concurrent_requests,
            usd_per_day=limits.usd_per_day,
            usd_per_month=limits.usd_per_month,
        )


class TenantOut(BaseModel):
    name: str
    priority: Priority
    weight: float
    limits: LimitsOut
    created_at_s: float
    disabled_at_s: float | None

    @classmethod
    def of(cls, record: TenantRecord) -> "TenantOut":
        tenant = record.tenant
        return cls(
            name=tenant.name,
            priority=tenant.priority,
            weight=tenant.weight,
            limits=LimitsOut.of(tenant.limits),
            created_at_s=record.created_at_s,
            disabled_at_s=record.disabled_at_s,
        )


class KeyOut(BaseModel):
    id: str
    tenant: str
    name: str
    prefix: str
    """First characters of the secret, to recognise it by."""
    models: list[str] | None
    admin: bool
    limits: LimitsOut
    created_at_s: float
    expires_at_s: float | None
    revoked_at_s: float | None
    active: bool
    """Not revoked, not expired, and its tenant is not disabled."""

    @classmethod
    def of(cls, record: KeyRecord, now_s: float) -> "KeyOut":
        return cls(
            id=record.id,
            tenant=record.tenant,
            name=record.name,
            prefix=record.prefix,
            models=None if record.models is None else list(record.models),
            admin=record.admin,
            limits=LimitsOut.of(record.limits),
            created_at_s=record.created_at_s,
            expires_at_s=record.expires_at_s,
            revoked_at_s=record.revoked_at_s,
            active=record.is_active(now_s),
        )


class NewKeyOut(BaseModel):
    id: str
    tenant: str
    name: str
    secret: str
    """Shown this once; it cannot be read back."""

    @classmethod
    def of(cls, key: NewKey) -> "NewKeyOut":
        return cls(id=key.id, tenant=key.tenant, name=key.name, secret=key.secret)


class TenantPage(BaseModel):
    object: Literal["list"] = "list"
    data: list[TenantOut]
    has_more: bool
    last_id: str | None
    """To pass as `after`; null when the page is empty."""


class KeyPage(BaseModel):
    object: Literal["list"] = "list"
    data: list[KeyOut]
    has_more: bool
    last_id: str | None
    """To pass as `after`; null when the page is empty."""


class UsedOut(BaseModel):
    since_s: float
    requests: int
    tokens: int
    usd: ExactUsd

    @classmethod
    def of(cls, since_s: float, used: Used) -> "UsedOut":
        return cls(
            since_s=since_s, requests=used.requests, tokens=used.tokens, usd=_plain(used.usd)
        )


class TenantLimitsOut(BaseModel):
    """Limits, and what the ledger holds of them; requests in flight are not in it yet."""

    tenant: str
    limits: LimitsOut
    today: UsedOut
    """The UTC day."""
    month: UsedOut
    """The UTC month."""

    @classmethod
    def of(cls, record: TenantRecord, use: TenantUse) -> "TenantLimitsOut":
        return cls(
            tenant=record.tenant.name,
            limits=LimitsOut.of(record.tenant.limits),
            today=UsedOut.of(use.day_start_s, use.day),
            month=UsedOut.of(use.month_start_s, use.month),
        )


class UsageRowOut(BaseModel):
    key: str | None
    """Of what `by` names; null in the total."""
    requests: int
    prompt_tokens: int
    cached_tokens: int
    """Part of prompt_tokens."""
    completion_tokens: int
    tariff_usd: ExactUsd
    capacity_usd: ExactUsd
    """Attributed, idle, starting, draining and idle nodes together."""
    attributed_usd: ExactUsd
    """What the requests cost, at our groups and at external providers."""
    idle_usd: ExactUsd
    """Groups that were ready and had nothing to do."""
    starting_usd: ExactUsd
    draining_usd: ExactUsd
    idle_nodes_usd: ExactUsd
    """Nodes, or parts of them, that no group occupied."""
    external_usd: ExactUsd
    """Part of attributed_usd: paid to external providers."""

    @classmethod
    def of(cls, key: str | None, row: UsageRow) -> "UsageRowOut":
        return cls(
            key=key,
            requests=row.requests,
            prompt_tokens=row.prompt_tokens,
            cached_tokens=row.cached_tokens,
            completion_tokens=row.completion_tokens,
            tariff_usd=_plain(row.tariff_usd),
            capacity_usd=_nano(row.capacity_nano_usd),
            attributed_usd=_nano(row.attributed_nano_usd),
            idle_usd=_nano(row.idle_nano_usd),
            starting_usd=_nano(row.starting_nano_usd),
            draining_usd=_nano(row.draining_nano_usd),
            idle_nodes_usd=_nano(row.idle_nodes_nano_usd),
            external_usd=_nano(row.external_nano_usd),
        )


class UsageOut(BaseModel):
    by: By
    since_s: float | None
    until_s: float | None
    rows: list[UsageRowOut]
    total: UsageRowOut

    @classmethod
    def of(cls, report: UsageReport) -> "UsageOut":
        return cls(
            by=report.by,
            since_s=report.since_s,
            until_s=report.until_s,
            rows=[UsageRowOut.of(key, row) for key, row in report.rows.items()],
            total=UsageRowOut.of(None, report.total),
        )


class ErrorFields(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorOut(BaseModel):
    error: ErrorFields


def _plain(amount: Decimal) -> str:
    return f"{amount:f}"


def _nano(nano_usd: int) -> str:
    return f"{Decimal(nano_usd).scaleb(-9):f}"
