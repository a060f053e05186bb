"""The adapter to Ray's dashboard: it sends Ray's schema and reads what Ray writes."""

from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import msgspec
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from ray.serve.schema import ServeDeploySchema

from expertmesh.clients.ray_serve import ApplicationStatus, RayNode, RayServeClient
from expertmesh.core.domain.fleet import GroupSpec, Parallelism
from expertmesh.errors import UpstreamUnavailable

NAME = "em-tiny-cheap-1"
SPEC = GroupSpec(NAME, "tiny", "/models/tiny", "cheap", Parallelism(1, 2, 2), 512, 0.6)

# As Ray 2.60 answered for a group of two ranks, cut to the fields that exist for us or mislead.
APPLICATIONS = {
    "applications": {
        NAME: {
            "name": NAME,
            "status": "RUNNING",
            "message": "",
            "deployed_app_config": {
                "name": NAME,
                "import_path": "expertmesh.serving.group_app:build",
                "args": msgspec.to_builtins(SPEC),
            },
            "deployments": {
                "group:tiny": {
                    "status": "HEALTHY",
                    "message": "a message",
                    "replicas": [
                        {
                            "state": "RUNNING",
                            "node_id": "n1",
                            "node_ip": "127.0.0.1",
                            "pid": 7,
                            "actor_name": "rank-a",
                        },
                        {"state": "STARTING", "node_id": None, "node_ip": None, "pid": None},
                    ],
                }
            },
        },
        "someone-elses": {"name": "x", "status": "DEPLOYING", "deployed_app_config": None},
    },
    "target_groups": [
        {
            "app_name": NAME,
            "protocol": "HTTP",
            "targets": [
                {"ip": "127.0.0.1", "port": 30001, "name": "rank-a"},
                {"ip": "127.0.0.1", "port": 8000, "name": "SERVE_PROXY"},
            ],
        },
        {"app_name": NAME, "protocol": "gRPC", "targets": [{"ip": "127.0.0.1", "port": 40001}]},
    ],
}


class Dashboard:
    def __init__(self) -> None:
        self.answer: Any = {}
        self.status = 200
        self.requests: list[tuple[str, str, Any]] = []

    async def handle(self, request: web.Request) -> web.Response:
        body = await request.json() if request.can_read_body else None
        self.requests.append((request.method, request.path, body))
        if request.headers.get("Authorization") != "Bearer token":
            return web.Response(status=401, text="Unauthorized: Missing authentication token")
        return web.json_response(self.answer, status=self.status)


@pytest.fixture
def dashboard() -> Dashboard:
    return Dashboard()


@pytest.fixture
async def server(dashboard: Dashboard) -> AsyncIterator[TestServer]:
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", dashboard.handle)
    async with TestServer(app) as started:
        yield started


@pytest.fixture
async def client(server: TestServer) -> AsyncIterator[RayServeClient]:
    async with aiohttp.ClientSession() as http:
        yield RayServeClient(http, str(server.make_url("/")), "token", "127.0.0.1")


async def test_a_running_group_is_read_back_whole(
    dashboard: Dashboard, client: RayServeClient
) -> None:
    dashboard.answer = APPLICATIONS
    ours, other = await client.applications()
    assert ours.spec == SPEC
    assert ours.status is ApplicationStatus.RUNNING and ours.message == "a message"
    assert [replica.pid for replica in ours.replicas] == [7, None]
    assert ours.rank_urls == (f"http://127.0.0.1:30001/{NAME}",)
    assert other.spec is None and other.rank_urls == ()


async def test_a_dashboard_without_serve_has_no_applications(client: RayServeClient) -> None:
    assert await client.applications() == ()


async def test_the_deployed_set_is_what_rays_schema_accepts(
    dashboard: Dashboard, client: RayServeClient
) -> None:
    await client.put((SPEC,))
    ((method, path, body),) = dashboard.requests
    assert (method, path) == ("PUT", "/api/serve/applications/")
    schema = ServeDeploySchema.model_validate(body)
    assert [app.name for app in schema.applications] == [NAME]
    assert schema.applications[0].route_prefix == f"/{NAME}"
    assert msgspec.convert(schema.applications[0].args, GroupSpec) == SPEC


async def test_nodes_carry_their_pool(dashboard: Dashboard, client: RayServeClient) -> None:
    rows = [
        {
            "node_id": "n1",
            "node_ip": "10.0.0.1",
            "node_name": "spot-a",
            "state": "ALIVE",
            "resources_total": {"CPU": 4.0},
            "labels": {"expertmesh.io/pool": "cheap"},
        },
        {
            "node_id": "n2",
            "node_ip": "10.0.0.2",
            "state": "DEAD",
            "resources_total": {"CPU": 64.0, "GPU": 8.0},
            "labels": None,
        },
    ]
    dashboard.answer = {"data": {"result": {"result": rows}}}
    assert await client.nodes() == (
        RayNode("n1", "10.0.0.1", True, "cheap", 4.0, "spot-a"),
        RayNode("n2", "10.0.0.2", False, None, 8.0),
    )


async def test_removed_placement_groups_are_not_listed(
    dashboard: Dashboard, client: RayServeClient
) -> None:
    rows = [{"name": "a", "state": "CREATED"}, {"name": "b", "state": "REMOVED"}]
    dashboard.answer = {"data": {"result": {"result": rows}}}
    assert await client.placement_group_names() == {"a"}


async def test_a_wrong_token_says_what_to_set(server: TestServer) -> None:
    async with aiohttp.ClientSession() as http:
        client = RayServeClient(http, str(server.make_url("/")), "wrong")
        with pytest.raises(UpstreamUnavailable, match=r"refused the token.*RAY_AUTH_TOKEN"):
            await client.applications()


async def test_a_refusal_carries_rays_own_words(
    dashboard: Dashboard, client: RayServeClient
) -> None:
    dashboard.status, dashboard.answer = 400, "bad schema"
    with pytest.raises(UpstreamUnavailable, match=r"answered 400.*bad schema"):
        await client.put((SPEC,))


async def test_no_dashboard_at_all(server: TestServer) -> None:
    url = str(server.make_url("/"))
    await server.close()
    async with aiohttp.ClientSession() as http:
        with pytest.raises(UpstreamUnavailable, match=r"no answer.*head node"):
            await RayServeClient(http, url, "token").applications()
