"""Tenants' API keys. The secret exists in this process only; the store keeps its SHA-256."""

import hashlib
import json
import re
import secrets
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import ColumnElement, Row, insert, or_, select, true, tuple_, update
from sqlalchemy.ext.asyncio import AsyncConnection

from expertmesh.core.domain.tenant import Account, Caller, Limits, Priority, Tenant
from expertmesh.store.database import Database
from expertmesh.store.schema import api_keys, identity_version, tenants
from expertmesh.store.tenants import (
    Conflict,
    InvalidField,
    add_tenant,
    check_limits,
    check_tenant_name,
    limits_row,
    next_version,
    read_limits,
    read_tenant,
)

_SECRET_PREFIX = "sk-em-"
_SECRET_BYTES = 32
"""256 bits: 43 characters, so a plain hash needs no salt and no stretching."""
_SECRET = re.compile(rb"sk-em-[A-Za-z0-9_-]{43}")
_SHOWN_CHARACTERS = len(_SECRET_PREFIX) + 4
_NAME_LENGTH = 80
_LONGEST_LIFE_S = 100 * 366 * 86_400.0
_MAX_MODELS = 100
_MODEL = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._:/-]*[A-Za-z0-9])?")
"""Names of deployments, and the aliases by which clients know them."""
_MODEL_LENGTH = 200
NO_LIMITS = Limits()
_ROWS_AT_ONCE = 250
"""Callers are built on the event loop, which serves requests in between."""


@dataclass(frozen=True, slots=True)
class NewKey:
    id: str
    secret: str
    """Shown once; it cannot be read back."""
    tenant: str
    name: str


@dataclass(frozen=True, slots=True)
class KeyRecord:
    id: str
    tenant: str
    name: str
    prefix: str
    """First characters of the secret, to recognise it by."""
    created_at_s: float
    expires_at_s: float | None
    revoked_at_s: float | None
    models: tuple[str, ...] | None = None
    """Those that the key may use, in alphabetical order; None for all."""
    admin: bool = False
    """The key opens the admin API, and only that."""
    limits: Limits = NO_LIMITS
    tenant_disabled: bool = False

    def is_active(self, now_s: float) -> bool:
        return (
            self.revoked_at_s is None
            and not self.tenant_disabled
            and (self.expires_at_s is None or now_s < self.expires_at_s)
        )


def hash_secret(secret: str) -> str:
    """SHA-256 as hex: the form in which a key is looked up."""
    return hashlib.sha256(secret.encode()).hexdigest()


def is_well_formed(secret: bytes) -> bool:
    """Whether a key could look so; what does not was never made here."""
    return _SECRET.fullmatch(secret) is not None


class KeyBook:
    def __init__(self, database: Database) -> None:
        self._database = database

    async def create(
        self,
        tenant: str,
        name: str,
        now_s: float,
        expires_at_s: float | None = None,
        *,
        models: Iterable[str] | None = None,
        admin: bool = False,
        limits: Limits = NO_LIMITS,
    ) -> NewKey:
        """A tenant that does not exist yet is created with the defaults.

        Raises InvalidField, and Conflict when the tenant is disabled.
        """
        check_tenant_name("tenant", tenant)
        names = None if models is None else tuple(sorted(set(models)))
        _check(name, names, admin, limits)
        if expires_at_s is not None:
            if not expires_at_s > now_s:
                raise InvalidField(
                    "expires_at_s", expires_at_s, "is in the past; choose a later time"
                )
            if expires_at_s > now_s + _LONGEST_LIFE_S:
                raise InvalidField(
                    "expires_at_s", expires_at_s, "is over 100 years ahead; leave it out for never"
                )
        key_id = f"key_{secrets.token_hex(8)}"
        secret = _SECRET_PREFIX + secrets.token_urlsafe(_SECRET_BYTES)
        async with self._database.writing() as connection:
            version = await next_version(connection)
            owner = await read_tenant(connection, tenant)
            if owner is None:
                await add_tenant(connection, Tenant(tenant), now_s, version)
            elif owner.disabled_at_s is not None:
                raise Conflict("tenant", tenant, "is disabled; enable it first")
            await connection.execute(
                insert(api_keys).values(
                    id=key_id,
                    sha256=hash_secret(secret),
                    prefix=secret[:_SHOWN_CHARACTERS],
                    tenant=tenant,
                    created_at_s=now_s,
                    expires_at_s=expires_at_s,
                    admin=admin,
                    version=version,
                    **_settings(name, names, limits),
                )
            )
        return NewKey(key_id, secret, tenant, name)

    async def list(
        self, tenant: str | None = None, after: str | None = None, limit: int | None = None
    ) -> tuple[KeyRecord, ...]:
        """Oldest first, the expired and revoked ones included.

        At most `limit` of those that follow the key with the id `after`; raises InvalidField when
        there is none.
        """
        columns = api_keys.c
        query = _RECORDS.order_by(columns.created_at_s, columns.id).limit(limit)
        if tenant is not None:
            query = query.where(columns.tenant == tenant)
        async with self._database.reading() as connection:
            if after is not None:
                last = await _read(connection, after)
                if last is None:
                    raise InvalidField("after", after[:_NAME_LENGTH], "is the id of no key")
                query = query.where(
                    tuple_(columns.created_at_s, columns.id) > (last.created_at_s, last.id)
                )
            return tuple(_record(row) for row in await connection.execute(query))

    async def get(self, key_id: str) -> KeyRecord | None:
        async with self._database.reading() as connection:
            return await _read(connection, key_id)

    async def change(self, key_id: str, edit: Callable[[KeyRecord], KeyRecord]) -> KeyRecord | None:
        """Store the name, models and limits that `edit` returns; no other change comes between.

        None when there is no such key. Raises InvalidField, and Conflict when it is revoked.
        """
        async with self._database.writing() as connection:
            version = await next_version(connection)
            known = await _read(connection, key_id)
            if known is None:
                return None
            if known.revoked_at_s is not None:
                raise Conflict("id", key_id, "is revoked for good; create another key")
            edited = edit(known)
            names = None if edited.models is None else tuple(sorted(set(edited.models)))
            _check(edited.name, names, known.admin, edited.limits)
            await connection.execute(
                update(api_keys)
                .where(api_keys.c.id == key_id)
                .values(version=version, **_settings(edited.name, names, edited.limits))
            )
        return replace(known, name=edited.name, models=names, limits=edited.limits)

    async def revoke(self, key_id: str, now_s: float) -> bool:
        """False when there is no such key or it is revoked already."""
        async with self._database.writing() as connection:
            version = await next_version(connection)
            revoked = await connection.scalar(
                update(api_keys)
                .where(api_keys.c.id == key_id, api_keys.c.revoked_at_s.is_(None))
                .values(revoked_at_s=now_s, version=version)
                .returning(api_keys.c.id)
            )
        return revoked is not None

    async def version(self) -> int:
        """Grows with every change of a key or tenant; cheap enough to ask every second.

        Read it before `active` or `changed`, so that nothing is missed in between.
        """
        async with self._database.reading() as connection:
            version: int = (
                await connection.execute(select(identity_version.c.version))
            ).scalar_one()
        return version

    async def active(self, now_s: float) -> dict[str, Caller]:
        """By SHA-256 of the secret. A caller that keeps the answer checks `expires_at_s` again."""
        callers = await self._callers(true(), now_s)
        return {sha256: caller for sha256, caller in callers.items() if caller is not None}

    async def admin_id(self, secret: str, now_s: float) -> str | None:
        """Id of the active admin key with this secret; None for any other secret."""
        found = await self._callers(api_keys.c.sha256 == hash_secret(secret), now_s)
        return next((one.key_id for one in found.values() if one is not None and one.admin), None)

    async def is_admin(self, key_id: str, now_s: float) -> bool:
        """Whether there is an active admin key with this id."""
        known = await self.get(key_id)
        return known is not None and known.admin and known.is_active(now_s)

    async def changed(self, after: int, now_s: float) -> dict[str, Caller | None]:
        """Keys that changed, alone or with their tenant, after version `after`.

        None for those that are no longer active.
        """
        of_tenants = select(tenants.c.name).where(tenants.c.version > after)
        return await self._callers(
            or_(api_keys.c.version > after, api_keys.c.tenant.in_(of_tenants)), now_s
        )

    async def _callers(
        self, condition: ColumnElement[bool], now_s: float
    ) -> dict[str, Caller | None]:
        callers: dict[str, Caller | None] = {}
        build = _CallerBuilder(now_s)
        async with self._database.reading() as connection:
            result = await connection.stream(_CALLERS.where(condition))
            async for rows in result.partitions(_ROWS_AT_ONCE):
                for row in rows:
                    callers[row[0]] = build(row)
        return callers


_LIMITS = tuple(limits_row(NO_LIMITS))

_OWNED = api_keys.outerjoin(tenants, tenants.c.name == api_keys.c.tenant)

_RECORDS = select(api_keys, tenants.c.disabled_at_s.label("tenant_disabled_at_s")).select_from(
    _OWNED
)

_CALLERS = select(
    api_keys.c.sha256,
    api_keys.c.id,
    api_keys.c.tenant,
    api_keys.c.models_json,
    api_keys.c.admin,
    api_keys.c.expires_at_s,
    api_keys.c.revoked_at_s,
    tenants.c.disabled_at_s,
    tenants.c.priority,
    tenants.c.weight,
    *(api_keys.c[name] for name in _LIMITS),
    *(tenants.c[name] for name in _LIMITS),
).select_from(_OWNED)


class _CallerBuilder:
    """Shares what the keys of one tenant have in common: there may be very many."""

    def __init__(self, now_s: float) -> None:
        self._now_s = now_s
        self._tenants: dict[str, tuple[Account, ...]] = {}
        self._models: dict[str, frozenset[str]] = {}

    def __call__(self, row: Sequence[Any]) -> Caller | None:
        (_, key_id, tenant, models_json, admin, expires_at_s, revoked_at_s) = row[:7]
        (disabled_at_s, priority, weight) = row[7:10]
        if revoked_at_s is not None or disabled_at_s is not None:
            return None
        if expires_at_s is not None and expires_at_s <= self._now_s:
            return None
        accounts = self._tenants.get(tenant)
        if accounts is None:
            accounts = _accounts(f"tenant:{tenant}", row[15:20])
            self._tenants[tenant] = accounts
        own = _accounts(f"key:{key_id}", row[10:15])
        models = None
        if models_json is not None:
            models = self._models.get(models_json)
            if models is None:
                models = self._models[models_json] = frozenset(json.loads(models_json))
        return Caller(
            key_id=key_id,
            tenant=tenant,
            priority=Priority.STANDARD if priority is None else Priority(priority),
            weight=1.0 if weight is None else weight,
            models=models,
            admin=admin,
            expires_at_s=expires_at_s,
            accounts=accounts + own if own else accounts,
        )


def _accounts(name: str, columns: Sequence[Any]) -> tuple[Account, ...]:
    limits = read_limits(*columns)
    return () if limits.none else (Account(name, limits),)


def _check(name: str, models: tuple[str, ...] | None, admin: bool, limits: Limits) -> None:
    if not name.isprintable() or len(name) > _NAME_LENGTH:
        raise InvalidField(
            "name", name[:_NAME_LENGTH], f"use at most {_NAME_LENGTH} printable characters"
        )
    check_limits(limits)
    if models is not None:
        if not 0 < len(models) <= _MAX_MODELS:
            raise InvalidField(
                "models", len(models), f"name 1 to {_MAX_MODELS} models, or none at all for all"
            )
        for model in models:
            if not _MODEL.fullmatch(model) or len(model) > _MODEL_LENGTH:
                raise InvalidField(
                    "models",
                    model[:_MODEL_LENGTH],
                    f"use at most {_MODEL_LENGTH} letters, digits and . _ : / - with a letter or "
                    "digit at both ends",
                )
    if admin and (models is not None or not limits.none):
        raise InvalidField(
            "admin", admin, "such a key opens only the admin API; leave models and limits out"
        )


def _settings(name: str, models: tuple[str, ...] | None, limits: Limits) -> dict[str, Any]:
    return {
        "name": name,
        "models_json": None if models is None else json.dumps(models),
        **limits_row(limits),
    }


async def _read(connection: AsyncConnection, key_id: str) -> KeyRecord | None:
    row = (await connection.execute(_RECORDS.where(api_keys.c.id == key_id))).first()
    return None if row is None else _record(row)


def _record(row: Row[Any]) -> KeyRecord:
    return KeyRecord(
        id=row.id,
        tenant=row.tenant,
        name=row.name,
        prefix=row.prefix,
        created_at_s=row.created_at_s,
        expires_at_s=row.expires_at_s,
        revoked_at_s=row.revoked_at_s,
        models=None if row.models_json is None else tuple(json.loads(row.models_json)),
        admin=row.admin,
        limits=read_limits(
            row.requests_per_min,
            row.tokens_per_min,
            row.concurrent_requests,
            row.usd_per_day,
            row.usd_per_month,
        ),
        tenant_disabled=row.tenant_disabled_at_s is not None,
    )
