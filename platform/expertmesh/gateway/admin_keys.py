"""Admin API: keys, their scopes and limits."""

from collections.abc import Callable
from typing import Annotated

from fastapi import APIRouter, Query, Request

from expertmesh.gateway.admin_audit import audit
from expertmesh.gateway.admin_bodies import (
    KeyChange,
    KeyIn,
    KeyOut,
    KeyPage,
    KeyQuery,
    NewKeyOut,
)
from expertmesh.gateway.admin_errors import checked_reference, no_such
from expertmesh.store.keys import KeyBook

_KIND = "key"


def key_routes(keys: KeyBook, now_s: Callable[[], float]) -> APIRouter:
    router = APIRouter(tags=["keys"])

    @router.get("/keys")
    async def list_keys(query: Annotated[KeyQuery, Query()]) -> KeyPage:
        """Oldest first, the expired and revoked ones included."""
        # One more than asked for tells whether there are more.
        records = await keys.list(query.tenant, query.after, query.limit + 1)
        at_s = now_s()
        data = [KeyOut.of(record, at_s) for record in records[: query.limit]]
        return KeyPage(
            data=data,
            has_more=len(records) > query.limit,
            last_id=data[-1].id if data else None,
        )

    @router.get("/keys/{key_id}")
    async def get_key(key_id: str) -> KeyOut:
        return await _read(key_id)

    @router.post("/keys", status_code=201)
    async def create_key(body: KeyIn, request: Request) -> NewKeyOut:
        """The only answer that holds the secret. A tenant that does not exist is created."""
        key = await keys.create(
            body.tenant,
            body.name,
            now_s(),
            body.expires_at_s,
            models=body.models,
            admin=body.admin,
            limits=body.limits.whole(),
        )
        audit(request, "key.create", key.id, settings=body.model_dump(mode="json"))
        return NewKeyOut.of(key)

    @router.patch("/keys/{key_id}")
    async def change_key(key_id: str, body: KeyChange, request: Request) -> KeyOut:
        """Change what the body names; null clears a limit, or allows all models."""
        record = await keys.change(checked_reference(_KIND, key_id), body.onto)
        if record is None:
            raise no_such(_KIND, key_id)
        changes = body.model_dump(mode="json", exclude_unset=True)
        audit(request, "key.change", key_id, settings=changes)
        return KeyOut.of(record, now_s())

    @router.delete("/keys/{key_id}")
    async def revoke_key(key_id: str, request: Request) -> KeyOut:
        """For good; gateways refuse it within two seconds. Revoking again changes nothing.

        The last admin key too: `expertmesh keys create --admin` makes the next one.
        """
        if await keys.revoke(checked_reference(_KIND, key_id), now_s()):
            audit(request, "key.revoke", key_id)
        return await _read(key_id)

    async def _read(key_id: str) -> KeyOut:
        record = await keys.get(checked_reference(_KIND, key_id))
        if record is None:
            raise no_such(_KIND, key_id)
        return KeyOut.of(record, now_s())

    return router
