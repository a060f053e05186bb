"""Tenants' API keys. The secret exists in this process only; the store keeps its SHA-256."""

import hashlib
import re
import secrets
from dataclasses import dataclass

from sqlalchemy import Row, insert, or_, select, update

from expertmesh.errors import SetupError
from expertmesh.store.database import Database
from expertmesh.store.schema import api_keys

_SECRET_PREFIX = "sk-em-"
_SECRET_BYTES = 32
"""256 bits: 43 characters, so a plain hash needs no salt and no stretching."""
_SHOWN_CHARACTERS = len(_SECRET_PREFIX) + 4
_TENANT = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?")
_TENANT_LENGTH = 40
_NAME_LENGTH = 80


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

    def is_active(self, now_s: float) -> bool:
        return self.revoked_at_s is None and (
            self.expires_at_s is None or now_s < self.expires_at_s
        )


def hash_secret(secret: str) -> str:
    """SHA-256 as hex: the form in which a key is looked up."""
    return hashlib.sha256(secret.encode()).hexdigest()


class KeyBook:
    def __init__(self, database: Database) -> None:
        self._database = database

    async def create(
        self, tenant: str, name: str, now_s: float, expires_at_s: float | None = None
    ) -> NewKey:
        _check(tenant, name, now_s, expires_at_s)
        key_id = f"key_{secrets.token_hex(8)}"
        secret = _SECRET_PREFIX + secrets.token_urlsafe(_SECRET_BYTES)
        async with self._database.writing() as connection:
            await connection.execute(
                insert(api_keys).values(
                    id=key_id,
                    sha256=hash_secret(secret),
                    prefix=secret[:_SHOWN_CHARACTERS],
                    tenant=tenant,
                    name=name,
                    created_at_s=now_s,
                    expires_at_s=expires_at_s,
                )
            )
        return NewKey(key_id, secret, tenant, name)

    async def list(self) -> tuple[KeyRecord, ...]:
        """Oldest first, the expired and revoked ones included."""
        async with self._database.reading() as connection:
            rows = await connection.execute(
                select(api_keys).order_by(api_keys.c.created_at_s, api_keys.c.id)
            )
            return tuple(_record(row) for row in rows)

    async def revoke(self, key_id: str, now_s: float) -> bool:
        """False when there is no such key or it is revoked already."""
        async with self._database.writing() as connection:
            revoked = await connection.scalar(
                update(api_keys)
                .where(api_keys.c.id == key_id, api_keys.c.revoked_at_s.is_(None))
                .values(revoked_at_s=now_s)
                .returning(api_keys.c.id)
            )
        return revoked is not None

    async def active(self, now_s: float) -> dict[str, KeyRecord]:
        """By SHA-256 of the secret. A caller that keeps the answer checks `expires_at_s` again."""
        expires_at_s = api_keys.c.expires_at_s
        async with self._database.reading() as connection:
            rows = await connection.execute(
                select(api_keys).where(
                    api_keys.c.revoked_at_s.is_(None),
                    or_(expires_at_s.is_(None), expires_at_s > now_s),
                )
            )
            return {row.sha256: _record(row) for row in rows}


def _check(tenant: str, name: str, now_s: float, expires_at_s: float | None) -> None:
    if not _TENANT.fullmatch(tenant) or len(tenant) > _TENANT_LENGTH:
        raise SetupError(
            f"tenant: {tenant!r}: use at most {_TENANT_LENGTH} lower-case letters, digits and "
            "hyphens, with a letter or digit at both ends"
        )
    if not name.isprintable() or len(name) > _NAME_LENGTH:
        raise SetupError(
            f"name: {name[:_NAME_LENGTH]!r}: use at most {_NAME_LENGTH} printable characters"
        )
    if expires_at_s is not None and expires_at_s <= now_s:
        raise SetupError(f"expires: {expires_at_s!r}: is in the past; choose a later time")


def _record(row: Row[tuple[object, ...]]) -> KeyRecord:
    return KeyRecord(
        id=row.id,
        tenant=row.tenant,
        name=row.name,
        prefix=row.prefix,
        created_at_s=row.created_at_s,
        expires_at_s=row.expires_at_s,
        revoked_at_s=row.revoked_at_s,
    )
