"""Admin API: usage and money, from the ledger."""

import math
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Annotated, Protocol

from fastapi import APIRouter, Query

from expertmesh.core.metering.report import By, UsageReport
from expertmesh.gateway.admin_bodies import UsageOut, UsageQuery
from expertmesh.gateway.admin_errors import Refused
from expertmesh.gateway.api import ApiError

_DEFAULT_SPAN_S = 86_400.0


class UsageSource(Protocol):
    async def report(self, by: By, since_s: float | None, until_s: float | None) -> UsageReport:
        """Must leave the event loop to the requests, however long the ledger is."""
        ...


def usage_routes(usage: UsageSource, now_s: Callable[[], float]) -> APIRouter:
    router = APIRouter(tags=["usage"])

    @router.get("/usage")
    async def get_usage(query: Annotated[UsageQuery, Query()]) -> UsageOut:
        """Usage, tariff price and capacity cost; without `since`, of the last 24 hours."""
        until_s = None if query.until is None else _moment_s("until", query.until)
        if query.since is None:
            since_s = (now_s() if until_s is None else until_s) - _DEFAULT_SPAN_S
        else:
            since_s = _moment_s("since", query.since)
        if until_s is not None and until_s <= since_s:
            raise Refused(
                ApiError(
                    400,
                    "until: is not after since; choose a later time",
                    code="invalid_value",
                    param="until",
                )
            )
        return UsageOut.of(await usage.report(query.by, since_s, until_s))

    return router


def _moment_s(field: str, text: str) -> float:
    try:
        moment_s = float(text)
    except ValueError:
        moment_s = math.nan
        try:
            moment = datetime.fromisoformat(text)
            moment_s = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
        except (ValueError, OverflowError):
            pass
    if math.isfinite(moment_s):
        return moment_s
    raise Refused(
        ApiError(
            400,
            f"{field}: write a date such as 2026-01-31, a time such as 2026-01-31T12:00:00Z, or "
            "Unix seconds",
            code="invalid_value",
            param=field,
        )
    )
