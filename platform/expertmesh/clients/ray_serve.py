"""The only code that speaks to Ray's dashboard: Serve applications, nodes, placement groups."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import aiohttp
import msgspec

from expertmesh.core.domain.fleet import GroupSpec
from expertmesh.errors import UpstreamUnavailable

POOL_LABEL = "expertmesh.io/pool"
GROUP_BUILDER = "expertmesh.serving.group_app:build"

_TIMEOUT = aiohttp.ClientTimeout(total=10)
# A first PUT starts Serve's own controller and proxies.
_PUT_TIMEOUT = aiohttp.ClientTimeout(total=120)


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
    name: str = ""
    """As the node was named when it started; its address when it was not."""


class RayServeClient:
    """Raises UpstreamUnavailable when the dashboard does not answer or refuses."""

    def __init__(
        self,
        http: aiohttp.ClientSession,
        dashboard_url: str,
        ray_token: str | None,
        listen_host: str = "0.0.0.0",
    ) -> None:
        """`listen_host`: the address that Serve's proxies and the ranks bind."""
        self._http = http
        self._url = dashboard_url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {ray_token}"} if ray_token else {}
        self._listen_host = listen_host

    async def applications(self) -> tuple[Application, ...]:
        body = await self._call("GET", "/api/serve/applications/")
        groups_of_targets = body.get("target_groups") or []
        return tuple(
            _application(name, details, groups_of_targets)
            for name, details in sorted((body.get("applications") or {}).items())
        )

    async def put(self, specs: tuple[GroupSpec, ...]) -> None:
        """Make exactly these groups exist; applications missing from `specs` are deleted."""
        await self._call("PUT", "/api/serve/applications/", self.deploy_schema(specs))

    def deploy_schema(self, specs: tuple[GroupSpec, ...]) -> dict[str, Any]:
        """Body of the PUT, in Ray's ServeDeploySchema."""
        return {
            # The gateway calls the ranks' own ports; Serve only insists that a proxy exists.
            "proxy_location": "HeadOnly",
            "http_options": {"host": self._listen_host},
            "applications": [
                {
                    "name": spec.name,
                    "route_prefix": f"/{spec.name}",
                    "import_path": GROUP_BUILDER,
                    "args": msgspec.to_builtins(spec),
                    # Nothing but the controller scales: never Serve's own autoscaling.
                    "external_scaler_enabled": True,
                }
                for spec in specs
            ],
        }

    async def nodes(self) -> tuple[RayNode, ...]:
        body = await self._call("GET", "/api/v0/nodes?detail=1&limit=10000")
        return tuple(_node(row) for row in body["data"]["result"]["result"])

    async def placement_group_names(self) -> frozenset[str]:
        """Names of placement groups that exist and are not removed (`SERVE_GANG::<app>_…`)."""
        body = await self._call("GET", "/api/v0/placement_groups?detail=1&limit=10000")
        rows = body["data"]["result"]["result"]
        return frozenset(str(row["name"]) for row in rows if row["state"] != "REMOVED")

    async def _call(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        url = self._url + path
        timeout = _PUT_TIMEOUT if method == "PUT" else _TIMEOUT
        try:
            async with self._http.request(
                method, url, json=body, headers=self._headers, timeout=timeout
            ) as response:
                text = await response.text()
                if response.status in (401, 403):
                    raise UpstreamUnavailable(
                        f"{method} {url}: Ray refused the token ({response.status}); "
                        "set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the cluster's token"
                    )
                if response.status != 200:
                    raise UpstreamUnavailable(
                        f"{method} {url}: Ray answered {response.status}: {text[:500]}"
                    )
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            raise UpstreamUnavailable(
                f"{method} {url}: no answer ({type(error).__name__}: {error}); "
                "is the Ray head node running?"
            ) from error
        return msgspec.json.decode(text) if text.strip() else {}


def _application(
    name: str, details: Mapping[str, Any], groups_of_targets: list[Mapping[str, Any]]
) -> Application:
    config = details.get("deployed_app_config") or {}
    replicas = [
        replica
        for deployment in (details.get("deployments") or {}).values()
        for replica in deployment.get("replicas") or []
    ]
    rank_names = {replica["actor_name"] for replica in replicas if replica.get("actor_name")}
    messages = [details.get("message") or ""] + [
        deployment.get("message") or ""
        for deployment in (details.get("deployments") or {}).values()
    ]
    return Application(
        name=name,
        status=ApplicationStatus(details["status"]),
        message=" ".join(message.strip() for message in messages if message.strip()),
        spec=_spec(config),
        replicas=tuple(
            Replica(
                state=str(replica["state"]),
                node_id=replica.get("node_id") or "",
                node_ip=replica.get("node_ip") or "",
                pid=replica.get("pid"),
            )
            for replica in replicas
        ),
        rank_urls=tuple(
            sorted(
                f"http://{target['ip']}:{target['port']}/{name}"
                for group in groups_of_targets
                if group.get("app_name") == name and group.get("protocol") == "HTTP"
                for target in group.get("targets") or []
                # With no replica running Serve lists its proxies instead.
                if target.get("name") in rank_names
            )
        ),
    )


def _spec(config: Mapping[str, Any]) -> GroupSpec | None:
    if config.get("import_path") != GROUP_BUILDER:
        return None
    try:
        return msgspec.convert(config.get("args"), GroupSpec)
    except msgspec.ValidationError:
        return None


def _node(row: Mapping[str, Any]) -> RayNode:
    resources = row.get("resources_total") or {}
    return RayNode(
        node_id=str(row["node_id"]),
        ip=str(row["node_ip"]),
        alive=row["state"] == "ALIVE",
        pool=(row.get("labels") or {}).get(POOL_LABEL),
        workers_total=float(resources.get("GPU") or resources.get("CPU") or 0),
        name=str(row.get("node_name") or ""),
    )
