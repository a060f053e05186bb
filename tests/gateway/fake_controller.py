"""A tiny HTTP server that speaks the controller's side of the exchange."""

import msgspec
from aiohttp import web

from expertmesh.core.domain.fleet import Fleet
from expertmesh.core.domain.traffic import GatewayReport


class FakeController:
    def __init__(self, mesh_token: str) -> None:
        self._mesh_token = mesh_token
        self.fleet = Fleet(version=1)
        self.reports: list[GatewayReport] = []
        self.broken: web.Response | None = None
        """Answered in place of the fleet."""
        self.url = ""
        self._runner: web.AppRunner | None = None

    async def start(self, port: int = 0) -> None:
        app = web.Application()
        app.router.add_post("/v1/exchange", self._exchange)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", port)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    @property
    def last(self) -> GatewayReport:
        return self.reports[-1]

    async def _exchange(self, request: web.Request) -> web.Response:
        if request.headers.get("Authorization") != f"Bearer {self._mesh_token}":
            return web.Response(status=401)
        report = msgspec.json.decode(await request.read(), type=GatewayReport)
        self.reports.append(report)
        if self.broken is not None:
            return web.Response(status=self.broken.status, body=self.broken.body)
        return web.Response(body=msgspec.json.encode(self.fleet), content_type="application/json")
