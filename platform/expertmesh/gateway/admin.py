"""The admin API: tenants, keys, limits and usage, below /admin/v1 of the gateway's port.

FastAPI: its OpenAPI document and the checks of the bodies come from one set of types, and nothing
here is on the path of a model request.
"""

import logging
from collections.abc import Callable

from fastapi import FastAPI, Security
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from expertmesh.core.domain.tenant import Caller
from expertmesh.gateway.admin_bodies import ErrorOut
from expertmesh.gateway.admin_errors import error_response, handle_errors
from expertmesh.gateway.admin_keys import key_routes
from expertmesh.gateway.admin_tenants import tenant_routes
from expertmesh.gateway.admin_usage import UsageSource, usage_routes
from expertmesh.gateway.api import ApiError
from expertmesh.store.keys import KeyBook
from expertmesh.store.tenants import TenantBook

_log = logging.getLogger(__name__)

PREFIX = "/admin/v1"
_BODY_BYTES = 256 * 1024
"""A key with a hundred models of the longest names is a tenth of it."""


def build_admin(
    keys: KeyBook, tenants: TenantBook, usage: UsageSource, now_s: Callable[[], float]
) -> ASGIApp:
    """Paths are whole, so the application is called with the scope as it came.

    `scope["state"]["caller"]` is the authenticated Caller; one without `admin` gets 403. `now_s`
    is Unix time. The application never raises.
    """
    api = FastAPI(
        title="ExpertMesh admin API",
        version="1",
        openapi_url=f"{PREFIX}/openapi.json",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        dependencies=[Security(HTTPBearer(auto_error=False, description="A key with --admin."))],
        responses={"4XX": {"model": ErrorOut}, "5XX": {"model": ErrorOut}},
        generate_unique_id_function=_operation_id,
    )
    for router in (
        tenant_routes(tenants, now_s),
        key_routes(keys, now_s),
        usage_routes(usage, now_s),
    ):
        api.include_router(router, prefix=PREFIX)
    handle_errors(api)
    return _Guard(api)


class _Guard:
    def __init__(self, api: ASGIApp) -> None:
        self._api = api

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        caller = scope.get("state", {}).get("caller")
        if not isinstance(caller, Caller) or not caller.admin:
            error = ApiError(
                403,
                "The key does not open the admin API; `expertmesh keys create --admin` makes one "
                "that does.",
                code="admin_key_required",
            )
            await error_response(error)(scope, receive, send)
            return
        try:
            await self._api(scope, _bounded(receive), _uncached(send))
        except Exception:
            # The answer, a 500, is sent already.
            _log.exception("admin: %s %s failed", scope["method"], scope["path"][:200])


def _bounded(receive: Receive) -> Receive:
    taken = 0

    async def receive_bounded() -> Message:
        nonlocal taken
        message = await receive()
        taken += len(message.get("body", b""))
        if taken > _BODY_BYTES:
            raise HTTPException(413, f"The request body is over the limit of {_BODY_BYTES} bytes.")
        return message

    return receive_bounded


def _uncached(send: Send) -> Send:
    async def send_uncached(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message["headers"], (b"cache-control", b"no-store")]
        await send(message)

    return send_uncached


def _operation_id(route: APIRoute) -> str:
    return route.name
