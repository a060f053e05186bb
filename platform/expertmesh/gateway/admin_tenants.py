"""Admin API: tenants, their settings and limits."""

from collections.abc import Callable
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from expertmesh.gateway.admin_audit import audit
from expertmesh.gateway.admin_bodies import (
    PageQuery,
    TenantChange,
    TenantIn,
    TenantLimitsOut,
    TenantOut,
    TenantPage,
)
from expertmesh.gateway.admin_errors import checked_reference, no_such
from expertmesh.store.tenants import TenantBook, TenantRecord

_KIND = "tenant"


def tenant_routes(tenants: TenantBook, now_s: Callable[[], float]) -> APIRouter:
    router = APIRouter(tags=["tenants"])

    @router.get("/tenants")
    async def list_tenants(query: Annotated[PageQuery, Query()]) -> TenantPage:
        """By name, the disabled ones included."""
        # One more than asked for tells whether there are more.
        records = await tenants.list(query.after, query.limit + 1)
        data = [TenantOut.of(record) for record in records[: query.limit]]
        return TenantPage(
            data=data,
            has_more=len(records) > query.limit,
            last_id=data[-1].name if data else None,
        )

    @router.get("/tenants/{name}")
    async def get_tenant(name: str) -> TenantOut:
        return TenantOut.of(await _known(name))

    @router.put("/tenants/{name}", responses={201: {"model": TenantOut}})
    async def put_tenant(
        name: str, body: TenantIn, request: Request, response: Response
    ) -> TenantOut:
        """Create the tenant (201), or replace its settings (200)."""
        record, is_new = await tenants.put(body.tenant(name), now_s())
        audit(
            request,
            "tenant.create" if is_new else "tenant.replace",
            name,
            settings=body.model_dump(mode="json"),
        )
        response.status_code = 201 if is_new else 200
        return TenantOut.of(record)

    @router.patch("/tenants/{name}")
    async def change_tenant(name: str, body: TenantChange, request: Request) -> TenantOut:
        """Change what the body names; null clears a limit."""
        record = await tenants.change(checked_reference(_KIND, name), body.onto)
        if record is None:
            raise no_such(_KIND, name)
        changes = body.model_dump(mode="json", exclude_unset=True)
        audit(request, "tenant.change", name, settings=changes)
        return TenantOut.of(record)

    @router.post("/tenants/{name}/disable")
    async def disable_tenant(name: str, request: Request) -> TenantOut:
        """Let its keys rest, without revoking them."""
        record = await tenants.disable(checked_reference(_KIND, name), now_s())
        if record is None:
            raise no_such(_KIND, name)
        audit(request, "tenant.disable", name)
        return TenantOut.of(record)

    @router.post("/tenants/{name}/enable")
    async def enable_tenant(name: str, request: Request) -> TenantOut:
        record = await tenants.enable(checked_reference(_KIND, name))
        if record is None:
            raise no_such(_KIND, name)
        audit(request, "tenant.enable", name)
        return TenantOut.of(record)

    @router.get("/tenants/{name}/limits")
    async def get_limits(name: str) -> TenantLimitsOut:
        """Limits, and what is used of them today and this month."""
        record = await _known(name)
        return TenantLimitsOut.of(record, await tenants.used(name, now_s()))

    async def _known(name: str) -> TenantRecord:
        record = await tenants.get(checked_reference(_KIND, name))
        if record is None:
            raise no_such(_KIND, name)
        return record

    return router
