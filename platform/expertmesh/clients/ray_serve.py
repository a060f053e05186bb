"""The only code that speaks to Ray's dashboard: Serve applications, nodes, placement groups."""

from dataclasses import dataclass
from enum import StrEnum

import aiohttp

from expertmesh.core.domain.fleet import GroupSpec


class ApplicationStatus(StrEnum):
    NOT_STARTED = "NOT_STARTED"
    DEPLOYING = "DEPLOYING"
    DEPLOY_FAILED = "DEPLOY_FAILED"
    RUNNING = "RUNNING"
    UNHEALTHY = "UNHEALTHY"
    DELETING = "DELETING"


@dataclass(frozen=True, slots=True)
class Replica:
    state: str
    """Ray's word, e.g. STARTING, RUNNING, PENDING_ALLOCATION, STOPPING."""
    node_id: str
    node_ip: str
    pid: int | None


@dataclass(frozen=True, slots=True)
class Application:
    name: str
    status: ApplicationStatus
    message: str
    spec: GroupSpec | None
    """The group as it was asked for; None for an application that is not ours."""
    replicas: tuple[Replica, ...]
    rank_urls: tuple[str, ...]
    """`http://ip:port/<prefix>` of each rank that listens, in no order."""


@dataclass(frozen=True, slots=True)
class RayNode:
    node_id: str
    ip: str
    alive: bool
    pool: str | None
    """Value of the node label expertmesh.io/pool."""
    workers_total: float
    """CPUs of a CPU pool's node, accelerators otherwise."""


class RayServeClient:
    """Raises UpstreamUnavailable when the dashboard does not answer or refuses."""

    def __init__(self, http: aiohttp.ClientSession, dashboard_url: str, ray_token: str | None) -> None:
        self._http = http
        self._url = dashboard_url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {ray_token}"} if ray_token else {}

    async def applications(self) -> tuple[Application, ...]:
        raise NotImplementedError

    async def put(self, specs: tuple[GroupSpec, ...]) -> None:
        """Make exactly these groups exist; applications missing from `specs` are deleted."""
        raise NotImplementedError

    async def nodes(self) -> tuple[RayNode, ...]:
        raise NotImplementedError

    async def placement_group_names(self) -> frozenset[str]:
        """Names of placement groups that exist and are not removed (`SERVE_GANG::<app>_…`)."""
        raise NotImplementedError
