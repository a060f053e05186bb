"""Refusals and failures of the admin API, in the same shape as those of the rest of the gateway."""

import logging
import re
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.routing import Match, Route

from expertmesh.errors import SetupError, UpstreamUnavailable
from expertmesh.gateway.api import ApiError, Protocol, error_body
from expertmesh.store.tenants import Conflict, InvalidField

_log = logging.getLogger(__name__)

_RETRY_AFTER_S = 1.0
_SHOWN_CHARACTERS = 80
_SHOWN_PROBLEMS = 5
_REFERENCE = re.compile(r"[A-Za-z0-9_-]{1,80}")
_NO_OBJECT = ("model_attributes_type", "dict_type", "missing")


class Refused(Exception):
    """Ends a request with this error."""

    def __init__(self, error: ApiError) -> None:
        super().__init__(error.message)
        self.error = error


def checked_reference(kind: str, reference: str) -> str:
    """A name or id that may exist; with anything else the store is not asked."""
    if not _REFERENCE.fullmatch(reference):
        raise no_such(kind, reference)
    return reference


def no_such(kind: str, reference: str) -> Refused:
    return Refused(
        ApiError(
            404,
            f"There is no {kind} {reference[:_SHOWN_CHARACTERS]!r}; GET /admin/v1/{kind}s lists "
            "those there are.",
            code="not_found",
        )
    )


def error_response(error: ApiError) -> Response:
    return Response(
        error_body(Protocol.OPENAI, error, ""),
        error.status,
        {name.decode(): value.decode() for name, value in error.headers()},
        "application/json",
    )


def handle_errors(api: FastAPI) -> None:
    @api.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> Response:
        return error_response(error.error)

    @api.exception_handler(RequestValidationError)
    async def invalid_request(request: Request, error: RequestValidationError) -> Response:
        return error_response(_explain(request, error.errors()))

    @api.exception_handler(SetupError)
    async def invalid_value(request: Request, error: SetupError) -> Response:
        field = error.field if isinstance(error, InvalidField) else None
        if isinstance(error, Conflict):
            return error_response(ApiError(409, str(error), code="conflict", param=field))
        return error_response(ApiError(400, str(error), code="invalid_value", param=field))

    @api.exception_handler(UpstreamUnavailable)
    async def store_away(request: Request, error: UpstreamUnavailable) -> Response:
        # The text names the place of the store, which is for the operator.
        _log.warning("admin: %s", error)
        return error_response(
            ApiError(
                503,
                "The store does not answer; try again soon.",
                code="store_unavailable",
                retry_after_s=_RETRY_AFTER_S,
            )
        )

    @api.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        path = request.scope["path"][:200]
        if error.status_code == 404:
            message = f"There is no {path} here; /admin/v1/openapi.json lists what there is."
            return error_response(ApiError(404, message, code="not_found"))
        if error.status_code == 405:
            allow = _methods(api, request)
            return error_response(ApiError(405, f"Use {allow} for {path}.", allow=allow))
        return error_response(ApiError(error.status_code, str(error.detail)))

    @api.exception_handler(Exception)
    async def fault(request: Request, error: Exception) -> Response:
        return error_response(
            ApiError(500, "The admin API failed; its log says why.", code="internal_error")
        )


def _methods(api: FastAPI, request: Request) -> str:
    methods: set[str] = set()
    for route in api.routes:
        if isinstance(route, Route) and route.matches(request.scope)[0] is not Match.NONE:
            methods |= route.methods or set()
    return ", ".join(sorted(methods))


def _explain(request: Request, problems: Sequence[Any]) -> ApiError:
    """Values are not repeated: one may be a secret in the wrong place."""
    first = problems[0]
    where, *path = first["loc"]
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", "it cannot be read")
        return ApiError(400, f"The request body is no JSON: {reason}.", code="invalid_json")
    if where == "body" and not path and first["type"] in _NO_OBJECT:
        if "json" not in request.headers.get("content-type", ""):
            return ApiError(
                415, "Send a JSON object with the header 'content-type: application/json'."
            )
        return ApiError(400, "Send a JSON object as the request body.", code="invalid_value")
    lines = [_explain_one(problem) for problem in problems[:_SHOWN_PROBLEMS]]
    return ApiError(400, "\n".join(lines), code="invalid_value", param=_field(path))


def _explain_one(problem: Any) -> str:
    field = _field(problem["loc"][1:])
    if problem["type"] == "extra_forbidden":
        return f"{field}: unknown field; leave it out, or see /admin/v1/openapi.json"
    if problem["type"] == "missing":
        return f"{field}: missing; add it"
    return f"{field}: {problem['msg']}"


def _field(path: Sequence[Any]) -> str:
    return ".".join(str(part) for part in path)[:_SHOWN_CHARACTERS]
