"""The console of a controller on a real port, and a real browser in front of it."""

import contextlib
import shutil
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from aiohttp.test_utils import TestServer
from playwright.async_api import Browser, Page, async_playwright
from tests.console.fake_view import NOTHING_TODAY, NOW_S, FakeRole, FakeToday

from expertmesh.controller.api import build_api
from expertmesh.controller.console import Console
from expertmesh.controller.console_access import ConsoleAccess, console_ticket

TOKEN = "the mesh token"


@dataclass
class Stand:
    """A controller that can be stopped and started again on the same port."""

    view: Any
    today: FakeToday = field(default_factory=lambda: FakeToday(NOTHING_TODAY))
    role: FakeRole = field(default_factory=FakeRole)
    gateway_url: str | None = "http://127.0.0.1:1"
    _server: TestServer | None = None
    _port: int | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def now_s(self) -> float:
        return float(getattr(self.view, "now_s", NOW_S))

    def link(self) -> str:
        return f"{self.url}/console/#ticket={console_ticket(TOKEN, self.now_s())}"

    async def start(self) -> None:
        console = Console(
            self.view,
            ConsoleAccess(TOKEN, None, self.now_s),
            name="somewhere",
            gateway_url=self.gateway_url,
            today=self.today,
            role=self.role,
            now_s=self.now_s,
        )
        app = build_api(self.view, TOKEN, self.role, console)
        self._server = TestServer(app, port=self._port)
        await self._server.start_server()
        self._port = self._server.port

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.close()
            self._server = None


@contextlib.asynccontextmanager
async def chromium() -> AsyncIterator[Browser]:
    program = shutil.which("chromium")
    assert program is not None, "chromium is missing; run scripts/install-tools.sh"
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(
            executable_path=program, args=["--no-sandbox", "--disable-gpu"]
        )
        try:
            yield browser
        finally:
            await browser.close()


@dataclass
class Look:
    """A page, with all that it complained about."""

    page: Page
    complaints: list[str]

    async def text(self, selector: str) -> str:
        return " ".join((await self.page.locator(selector).inner_text()).split())


@contextlib.asynccontextmanager
async def looking(browser: Browser, **context: Any) -> AsyncIterator[Look]:
    """`context`: of the browser, as viewport or color_scheme."""
    async with await browser.new_context(
        **({"viewport": {"width": 1280, "height": 900}, "timezone_id": "UTC"} | context)
    ) as made:
        page = await made.new_page()
        page.set_default_timeout(10_000)
        complaints: list[str] = []
        page.on(
            "console",
            lambda message: complaints.append(message.text) if message.type == "error" else None,
        )
        page.on("pageerror", lambda error: complaints.append(str(error)))
        yield Look(page, complaints)


class FakeGateway:
    """Streams a chat in three pieces, to pages of one origin."""

    def __init__(self) -> None:
        self.origin = ""
        self.asked: list[tuple[str, Any]] = []
        app = web.Application()
        app.router.add_route("OPTIONS", "/v1/chat/completions", self._preflight)
        app.router.add_post("/v1/chat/completions", self._chat)
        self.server = TestServer(app)

    @property
    def _allowed(self) -> dict[str, str]:
        return {"Access-Control-Allow-Origin": self.origin} if self.origin else {}

    async def _preflight(self, request: web.Request) -> web.Response:
        headers = {"Access-Control-Allow-Headers": "authorization, content-type"}
        return web.Response(headers=headers | self._allowed)

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        key = request.headers.get("Authorization", "")
        self.asked.append((key, await request.json()))
        if key != "Bearer sk-em-good":
            error = {"error": {"message": "this key is not known"}}
            return web.json_response(error, status=401, headers=self._allowed)
        response = web.StreamResponse(
            headers={"Content-Type": "text/event-stream", **self._allowed}
        )
        await response.prepare(request)
        for piece in ("Once ", "upon ", "a <b>time</b>"):
            await response.write(
                f'data: {{"choices": [{{"delta": {{"content": "{piece}"}}}}]}}\n\n'.encode()
            )
        usage = '{"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 3}}'
        await response.write(f"data: {usage}\n\ndata: [DONE]\n\n".encode())
        return response
