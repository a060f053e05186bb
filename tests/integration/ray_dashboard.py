"""A mock of Ray's dashboard and of the ranks' ports over HTTP, around the Serve of the controller's
tests; no Ray runs. Several ports lead to it, so that a test can tell who called."""

import asyncio
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import msgspec
from aiohttp import web
from tests.controller import fake_serve
from tests.controller.fake_serve import FakeServe, Member

from expertmesh.clients.ray_serve import GROUP_BUILDER, POOL_LABEL
from expertmesh.core.domain.fleet import GroupSpec


@dataclass
class Put:
    at_s: float
    """By a monotonic clock."""
    port: int
    groups: tuple[str, ...]


@dataclass
class RayDashboard:
    serve: FakeServe
    puts: list[Put] = field(default_factory=list)
    reads: Counter[int] = field(default_factory=Counter)
    """By port."""
    answers_puts: asyncio.Event = field(default_factory=asyncio.Event)
    """While it is not set a PUT is done, and its answer does not come."""
    _runner: web.AppRunner | None = None

    async def start(self, *ports: int) -> None:
        self.answers_puts.set()
        app = web.Application()
        app.router.add_get("/api/serve/applications/", self._applications)
        app.router.add_put("/api/serve/applications/", self._put)
        app.router.add_get("/api/v0/nodes", self._nodes)
        app.router.add_get("/api/v0/placement_groups", self._placement_groups)
        app.router.add_get("/{group}/em/info", self._info)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        for port in ports:
            await web.TCPSite(self._runner, "0.0.0.0", port).start()
        self._rank_port = ports[0]

    async def stop(self) -> None:
        assert self._runner is not None
        await self._runner.cleanup()

    @property
    def restarts(self) -> dict[str, int]:
        return {name: app.restarts for name, app in self.serve.apps.items()}

    async def _applications(self, request: web.Request) -> web.Response:
        self.reads[_port(request)] += 1
        found = await self.serve.applications()
        applications, targets = {}, []
        for application in found:
            app = self.serve.apps[application.name]
            members = {member.pid: member for member in app.members}
            applications[application.name] = {
                "status": application.status.value,
                "message": application.message,
                "deployed_app_config": {
                    "import_path": GROUP_BUILDER,
                    "args": msgspec.to_builtins(app.spec),
                },
                "deployments": {
                    "DPServer": {
                        "replicas": [
                            {
                                "state": replica.state,
                                "node_id": replica.node_id,
                                "node_ip": "127.0.0.1",
                                "pid": replica.pid,
                                "actor_name": f"rank-{replica.pid}",
                            }
                            for replica in application.replicas
                        ]
                    }
                },
            }
            if application.rank_urls:
                targets.append(
                    {
                        "app_name": application.name,
                        "protocol": "HTTP",
                        "targets": [
                            {
                                "ip": _address(member),
                                "port": self._rank_port,
                                "name": f"rank-{pid}",
                            }
                            for pid, member in members.items()
                        ],
                    }
                )
        return web.json_response({"applications": applications, "target_groups": targets})

    async def _put(self, request: web.Request) -> web.Response:
        body: dict[str, Any] = await request.json()
        specs = tuple(msgspec.convert(app["args"], GroupSpec) for app in body["applications"])
        self.puts.append(
            Put(time.monotonic(), _port(request), tuple(sorted(spec.name for spec in specs)))
        )
        await self.serve.put(specs)
        await self.answers_puts.wait()
        return web.json_response({})

    async def _nodes(self, request: web.Request) -> web.Response:
        rows = [
            {
                "node_id": node.node_id,
                "node_ip": node.ip,
                "state": "ALIVE" if node.alive else "DEAD",
                "labels": {POOL_LABEL: node.pool},
                "resources_total": {"CPU": node.workers_total},
            }
            for node in await self.serve.nodes()
        ]
        return web.json_response({"data": {"result": {"result": rows}}})

    async def _placement_groups(self, request: web.Request) -> web.Response:
        names = await self.serve.placement_group_names()
        rows = [{"name": name, "state": "CREATED"} for name in sorted(names)]
        return web.json_response({"data": {"result": {"result": rows}}})

    async def _info(self, request: web.Request) -> web.Response:
        name = request.match_info["group"]
        for member in self.serve.apps[name].members if name in self.serve.apps else ():
            if _address(member) == request.url.host:
                url = f"http://{member.node.node_id}:{member.pid}/{name}"
                info = await self.serve.info(url)
                if info is not None:
                    return web.Response(
                        body=msgspec.json.encode(info), content_type="application/json"
                    )
        return web.Response(status=503)


@contextmanager
def quick_starts(start_s: float = 1.0, build_s: float = 0.2) -> Iterator[None]:
    kept = fake_serve.START_S, fake_serve.BUILD_S
    fake_serve.START_S, fake_serve.BUILD_S = start_s, build_s
    try:
        yield
    finally:
        fake_serve.START_S, fake_serve.BUILD_S = kept


def _port(request: web.Request) -> int:
    assert request.transport is not None
    return int(request.transport.get_extra_info("sockname")[1])


def _address(member: Member) -> str:
    """All of 127.0.0.0/8 is this machine: an address for each rank."""
    return f"127.0.{1 + member.pid // 250}.{1 + member.pid % 250}"
