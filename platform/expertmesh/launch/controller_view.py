"""What the commands of a person read from a running controller."""

from dataclasses import dataclass
from typing import Any

import aiohttp
import msgspec

from expertmesh.controller.overview import Overview
from expertmesh.core.domain.fleet import Group
from expertmesh.errors import UpstreamUnavailable

_TIMEOUT = aiohttp.ClientTimeout(total=5)


@dataclass(frozen=True, slots=True)
class ModelSummary:
    """The newest decision of one model."""

    reason: str
    wanted: int
    need: int
    queued: int
    running: int
    pending: str | None = None
    """What is missing and where, e.g. `pending: no room in pool cpu-small`."""


@dataclass(frozen=True, slots=True)
class FleetView:
    version: int
    models: tuple[Any, ...]
    groups: tuple[Group, ...]
    decisions: dict[str, ModelSummary]


class ControllerView:
    """Raises UpstreamUnavailable when the controller does not answer."""

    def __init__(self, http: aiohttp.ClientSession, url: str, mesh_token: str) -> None:
        self._http = http
        self._url = url
        self._headers = {"Authorization": f"Bearer {mesh_token}"}

    async def fleet(self) -> FleetView:
        return msgspec.json.decode(await self._get("/v1/fleet"), type=FleetView)

    async def overview(self) -> Overview:
        return msgspec.json.decode(await self._get("/console/api/overview"), type=Overview)

    async def decisions(self, limit: int) -> list[dict[str, Any]]:
        found = msgspec.json.decode(await self._get(f"/v1/decisions?limit={limit}"))
        return list(found["decisions"])

    async def _get(self, path: str) -> bytes:
        url = self._url + path
        try:
            async with self._http.get(url, headers=self._headers, timeout=_TIMEOUT) as answer:
                body = await answer.read()
                if answer.status != 200:
                    raise UpstreamUnavailable(
                        f"{url}: {answer.status}: {body[:300].decode(errors='replace')}"
                    )
                return body
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise UpstreamUnavailable(
                f"{url}: no answer ({type(error).__name__}); does the system run? "
                "Start it with `expertmesh up`"
            ) from error
