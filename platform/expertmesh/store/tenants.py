"""Tenants: their share of the capacity and their limits."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

from sqlalchemy import Row, func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from expertmesh.core.domain.tenant import Limits, Priority, Tenant
from expertmesh.core.metering.rating import exact_usd, total_usd
from expertmesh.errors import SetupError
from expertmesh.store.database import Database
from expertmesh.store.schema import identity_version, tenants, usage_records

_NAME = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?")
_NAME_LENGTH = 40
_MAX_WEIGHT = 1000
_MAX_COUNT = 10**12
_MAX_USD = 10**9
_COUNTS = ("requests_per_min", "tokens_per_min", "concurrent_requests")
_AMOUNTS = ("usd_per_day", "usd_per_month")
_ROWS_AT_ONCE = 1000


class InvalidField(SetupError):
    """A value that the store does not take; its text names field, value and remedy."""

    def __init__(self, field: str, value: object, remedy: str) -> None:
        super().__init__(f"{field}: {value!r}: {remedy}")
        self.field = field


class Conflict(InvalidField):
    """The value would do, but not in the state that the store is in."""


@dataclass(frozen=True, slots=True)
class TenantRecord:
    tenant: Tenant
    created_at_s: float
    disabled_at_s: float | None
    """None while its keys work."""


@dataclass(frozen=True, slots=True)
class Used:
    requests: int = 0
    tokens: int = 0
    """Prompt and completion tokens together."""
    usd: Decimal = Decimal(0)
    """At the tariff."""

    def __add__(self, other: "Used") -> "Used":
        return Used(
            self.requests + other.requests,
            self.tokens + other.tokens,
            total_usd((self.usd, other.usd)),
        )


@dataclass(frozen=True, slots=True)
class TenantUse:
    """What the ledger holds of requests accepted in the UTC day and month of a moment."""

    day_start_s: float
    month_start_s: float
    day: Used
    month: Used


class TenantBook:
    def __init__(self, database: Database) -> None:
        self._database = database

    async def list(
        self, after: str | None = None, limit: int | None = None
    ) -> tuple[TenantRecord, ...]:
        """By name, the disabled ones included; at most `limit` of those that follow `after`."""
        query = select(tenants).order_by(tenants.c.name).limit(limit)
        if after is not None:
            query = query.where(tenants.c.name > after)
        async with self._database.reading() as connection:
            return tuple(_record(row) for row in await connection.execute(query))

    async def get(self, name: str) -> TenantRecord | None:
        async with self._database.reading() as connection:
            return await read_tenant(connection, name)

    async def put(self, tenant: Tenant, now_s: float) -> tuple[TenantRecord, bool]:
        """Create the tenant, or replace its settings; and whether it is new.

        A disabled tenant stays disabled. Raises InvalidField.
        """
        return await self.change_or_create(tenant.name, lambda _: tenant, now_s)

    async def change_or_create(
        self, name: str, edit: Callable[[Tenant], Tenant], now_s: float
    ) -> tuple[TenantRecord, bool]:
        """What `edit` makes of the tenant's settings, or of the defaults; and whether it is new.

        Raises InvalidField.
        """
        check_tenant_name("name", name)
        async with self._database.writing() as connection:
            version = await next_version(connection)
            known = await read_tenant(connection, name)
            tenant = replace(edit(Tenant(name) if known is None else known.tenant), name=name)
            check_tenant(tenant)
            if known is None:
                return await add_tenant(connection, tenant, now_s, version), True
            return await _store(connection, replace(known, tenant=tenant), version), False

    async def change(self, name: str, edit: Callable[[Tenant], Tenant]) -> TenantRecord | None:
        """What `edit` makes of the tenant's settings; no other change comes between.

        None when there is no such tenant. Raises InvalidField.
        """
        async with self._database.writing() as connection:
            version = await next_version(connection)
            known = await read_tenant(connection, name)
            if known is None:
                return None
            edited = replace(edit(known.tenant), name=name)
            check_tenant(edited)
            return await _store(connection, replace(known, tenant=edited), version)

    async def disable(self, name: str, now_s: float) -> TenantRecord | None:
        """Its keys stop working, without being revoked; None when there is no such tenant."""
        return await self._set_disabled(name, now_s)

    async def enable(self, name: str) -> TenantRecord | None:
        return await self._set_disabled(name, None)

    async def used(self, name: str, now_s: float) -> TenantUse:
        """In the UTC day and month of `now_s`."""
        day = datetime.fromtimestamp(now_s, UTC).replace(hour=0, minute=0, second=0, microsecond=0)
        day_start_s, month_start_s = day.timestamp(), day.replace(day=1).timestamp()
        async with self._database.reading() as connection:
            of_day = await _used(connection, name, day_start_s, None)
            before = await _used(connection, name, month_start_s, day_start_s)
        return TenantUse(day_start_s, month_start_s, day=of_day, month=before + of_day)

    async def _set_disabled(self, name: str, at_s: float | None) -> TenantRecord | None:
        async with self._database.writing() as connection:
            version = await next_version(connection)
            known = await read_tenant(connection, name)
            if known is None or (known.disabled_at_s is None) == (at_s is None):
                return known
            return await _store(connection, replace(known, disabled_at_s=at_s), version)


async def next_version(connection: AsyncConnection) -> int:
    """The number of this change. Until the transaction ends, no other one gets a number.

    So numbers become visible in order, and what is read after this call cannot change.
    """
    counted = update(identity_version).values(version=identity_version.c.version + 1)
    version: int = (
        await connection.execute(counted.returning(identity_version.c.version))
    ).scalar_one()
    return version


async def read_tenant(connection: AsyncConnection, name: str) -> TenantRecord | None:
    row = (await connection.execute(select(tenants).where(tenants.c.name == name))).first()
    return None if row is None else _record(row)


async def add_tenant(
    connection: AsyncConnection, tenant: Tenant, now_s: float, version: int
) -> TenantRecord:
    record = TenantRecord(tenant, created_at_s=now_s, disabled_at_s=None)
    await connection.execute(
        insert(tenants).values(
            name=tenant.name, created_at_s=now_s, version=version, **_settings(tenant)
        )
    )
    return record


def check_tenant(tenant: Tenant) -> None:
    check_tenant_name("name", tenant.name)
    if not 0 < tenant.weight <= _MAX_WEIGHT:
        raise InvalidField("weight", tenant.weight, f"use a number above 0, at most {_MAX_WEIGHT}")
    check_limits(tenant.limits)


def check_tenant_name(field: str, name: str) -> None:
    if not _NAME.fullmatch(name) or len(name) > _NAME_LENGTH:
        raise InvalidField(
            field,
            name[: 2 * _NAME_LENGTH],
            f"use at most {_NAME_LENGTH} lower-case letters, digits and hyphens, with a letter "
            "or digit at both ends",
        )


def check_limits(limits: Limits) -> None:
    for field in _COUNTS:
        count = getattr(limits, field)
        if count is not None and not 0 < count <= _MAX_COUNT:
            raise InvalidField(
                f"limits.{field}", count, f"use a whole number from 1 to {_MAX_COUNT}, or none"
            )
    for field in _AMOUNTS:
        usd = getattr(limits, field)
        if usd is not None and not (math.isfinite(usd) and 0 < usd <= _MAX_USD):
            raise InvalidField(
                f"limits.{field}", usd, f"use dollars above 0, at most {_MAX_USD}, or none"
            )


def limits_row(limits: Limits) -> dict[str, Any]:
    row: dict[str, Any] = {field: getattr(limits, field) for field in _COUNTS}
    for field in _AMOUNTS:
        usd = getattr(limits, field)
        row[field] = None if usd is None else exact_usd(usd)
    return row


def read_limits(
    requests_per_min: int | None,
    tokens_per_min: int | None,
    concurrent_requests: int | None,
    usd_per_day: Decimal | None,
    usd_per_month: Decimal | None,
) -> Limits:
    return Limits(
        requests_per_min,
        tokens_per_min,
        concurrent_requests,
        None if usd_per_day is None else float(usd_per_day),
        None if usd_per_month is None else float(usd_per_month),
    )


async def _store(connection: AsyncConnection, record: TenantRecord, version: int) -> TenantRecord:
    await connection.execute(
        update(tenants)
        .where(tenants.c.name == record.tenant.name)
        .values(disabled_at_s=record.disabled_at_s, version=version, **_settings(record.tenant))
    )
    return record


async def _used(
    connection: AsyncConnection, name: str, since_s: float, until_s: float | None
) -> Used:
    columns = usage_records.c
    conditions = [columns.tenant == name, columns.at_s >= since_s]
    if until_s is not None:
        conditions.append(columns.at_s < until_s)
    requests, tokens = (
        await connection.execute(
            select(func.count(), func.sum(columns.prompt_tokens + columns.completion_tokens)).where(
                *conditions
            )
        )
    ).one()
    # Summed here: SQLite keeps exact amounts as text and would add binary numbers.
    usd = Decimal(0)
    amounts = await connection.stream(select(columns.tariff_usd).where(*conditions))
    async for rows in amounts.partitions(_ROWS_AT_ONCE):
        usd = total_usd((usd, *(row.tariff_usd for row in rows)))
    return Used(requests, int(tokens or 0), usd)


def _settings(tenant: Tenant) -> dict[str, Any]:
    return {
        "priority": tenant.priority.value,
        "weight": tenant.weight,
        **limits_row(tenant.limits),
    }


def _record(row: Row[Any]) -> TenantRecord:
    tenant = Tenant(
        name=row.name,
        priority=Priority(row.priority),
        weight=row.weight,
        limits=read_limits(
            row.requests_per_min,
            row.tokens_per_min,
            row.concurrent_requests,
            row.usd_per_day,
            row.usd_per_month,
        ),
    )
    return TenantRecord(tenant, row.created_at_s, row.disabled_at_s)
