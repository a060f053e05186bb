"""The console's HTTP, over a real socket: who gets what, with which headers, in which order."""

import asyncio
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
from aiohttp.test_utils import TestServer
from tests.controller.running_system import RunningSystem

import expertmesh.controller
from expertmesh.controller.api import build_api
from expertmesh.controller.console import Console
from expertmesh.controller.console_access import SESSION_S, ConsoleAccess
from expertmesh.controller.overview import Overview
from expertmesh.controller.today import Today
from expertmesh.core.scaling.what_if import KEYS
from expertmesh.errors import UpstreamUnavailable

TOKEN = "the mesh token"
AUTH = {"Authorization": f"Bearer {TOKEN}"}
FILES = {
    file.name: file.read_bytes()
    for file in (Path(expertmesh.controller.__file__).parent / "console").iterdir()
}


class FakeToday:
    is_down = False

    async def read(self) -> Today:
        if self.is_down:
            raise UpstreamUnavailable("store: connection refused")
        return Today(1.0, 0.0, 12.5, 0.5, 20.0, {"cheap": 12.5})


@pytest.fixture
async def system() -> RunningSystem:
    system = RunningSystem()
    await system.pass_s(20)
    return system


@pytest.fixture
def today() -> FakeToday:
    return FakeToday()


@pytest.fixture
async def http(system: RunningSystem, today: FakeToday) -> AsyncIterator[aiohttp.ClientSession]:
    console = Console(
        system.controller,
        ConsoleAccess(TOKEN, None, system.clock),
        name="test",
        gateway_url="https://gateway.example",
        today=today,
        now_s=system.clock,
    )
    async with (
        TestServer(build_api(system.controller, TOKEN, None, console)) as server,
        aiohttp.ClientSession(str(server.make_url("/"))) as http,
    ):
        yield http


# The page


@pytest.mark.parametrize("name", sorted(FILES))
async def test_files_are_open_and_may_do_little(http: aiohttp.ClientSession, name: str) -> None:
    async with http.get(f"/console/{name}") as answer:
        assert answer.status == 200
        assert await answer.read() == FILES[name]
        policy = answer.headers["Content-Security-Policy"]
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert "connect-src 'self' https://gateway.example;" in policy
    assert "frame-ancestors 'none'" in policy


async def test_the_page_has_no_script_or_style_of_its_own(http: aiohttp.ClientSession) -> None:
    async with http.get("/console") as answer:
        assert answer.url.path == "/console/"
        assert answer.content_type == "text/html"
        text = await answer.text()
    assert not re.search(r"<script(?![^>]* src=)|<style|\sstyle=|\son\w+=", text)
    assert not re.search(r"(src|href)=\"(https?:)?//", text)


@pytest.mark.parametrize("path", ["../api.py", "%2e%2e/api.py", "none.js", ".git", "a/b.js"])
async def test_nothing_else_is_given_away(http: aiohttp.ClientSession, path: str) -> None:
    async with http.get(f"/console/{path}") as answer:
        assert answer.status in (401, 404)


async def test_no_way_leads_around_the_mesh_token(http: aiohttp.ClientSession) -> None:
    """Paths as no decent client sends them."""
    base = http._base_url
    assert base is not None and base.port is not None
    for path in (
        "/console/../v1/fleet",
        "/console/%2e%2e/v1/fleet",
        "/console//../v1/fleet",
        "//v1/fleet",
        "/v1/fleet?/console/",
        "/v1/fleet#/console/",
        "/consolex/../v1/fleet",
        "/v1/fleet/console/",
        "http://127.0.0.1/console/../v1/fleet",
    ):
        reader, writer = await asyncio.open_connection("127.0.0.1", base.port)
        writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        answer = await asyncio.wait_for(reader.read(), 5)
        writer.close()
        await writer.wait_closed()
        assert answer.split(b" ")[1] in (b"400", b"401", b"404"), path
        assert b"em-tiny" not in answer


# Who may look


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/console/api/overview"),
        ("GET", "/console/api/stream"),
        ("GET", "/console/api/decisions/2"),
        ("GET", "/console/api/what-if"),
        ("POST", "/console/api/what-if"),
    ],
)
@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": TOKEN},
        {"Authorization": "Bearer ems1.mesh.99999999999999.00.00"},
        {"Cookie": f"session={TOKEN}"},
    ],
)
async def test_data_wants_a_session(
    http: aiohttp.ClientSession, method: str, path: str, headers: dict[str, str]
) -> None:
    async with http.request(method, path, headers=headers) as answer:
        assert answer.status == 401
        assert (await answer.json())["error"]["code"] == "session_required"


async def test_the_mesh_token_becomes_a_session_that_opens_only_the_console(
    http: aiohttp.ClientSession, system: RunningSystem
) -> None:
    async with http.post("/console/api/session", json={"secret": TOKEN}) as answer:
        assert answer.status == 200
        assert answer.headers["Cache-Control"] == "no-store"
        body = await answer.json()
    assert body["expires_at_s"] == system.clock() + SESSION_S
    session = {"Authorization": f"Bearer {body['session']}"}
    async with http.get("/console/api/overview", headers=session) as answer:
        assert answer.status == 200
    for path in ("/v1/fleet", "/v1/decisions", "/metrics"):
        async with http.get(path, headers=session) as answer:
            assert answer.status == 401


@pytest.mark.parametrize("secret", ["wrong", "", "sk-em-x"])
async def test_a_wrong_secret_opens_nothing(http: aiohttp.ClientSession, secret: str) -> None:
    async with http.post("/console/api/session", json={"secret": secret}) as answer:
        assert answer.status == 401


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'{"secret": 1}', b"{}", b'{"secret": "' + b"x" * 20_000 + b'"}']
)
async def test_a_body_that_makes_no_sense_is_refused(
    http: aiohttp.ClientSession, body: bytes
) -> None:
    async with http.post("/console/api/session", data=body) as answer:
        assert answer.status == 400


# What it says


async def _overview(http: aiohttp.ClientSession) -> Overview:
    async with http.get("/console/api/overview", headers=AUTH) as answer:
        assert answer.status == 200
        return msgspec.json.decode(await answer.read(), type=Overview)


async def test_the_overview_is_what_the_controller_knows(
    http: aiohttp.ClientSession, system: RunningSystem
) -> None:
    overview = await _overview(http)
    assert overview.state.picture == system.controller.picture()
    assert overview.state.picture is not None
    assert overview.state.platform == "test"
    assert overview.state.leads and overview.state.problems == {}
    known = await system.controller.decisions(50, None)
    assert overview.decisions == msgspec.json.decode(msgspec.json.encode(known))
    assert overview.today["capacity_usd"] == 12.5


async def test_a_store_out_of_reach_hides_nothing_else(
    http: aiohttp.ClientSession, system: RunningSystem, today: FakeToday
) -> None:
    system.journal.is_down = today.is_down = True
    overview = await _overview(http)
    assert overview.decisions == {"error": "store: connection refused"}
    assert overview.today == {"error": "store: connection refused"}
    assert overview.state.picture is not None


async def _events(answer: aiohttp.ClientResponse, count: int) -> list[tuple[str, Any]]:
    found = []
    while len(found) < count:
        lines = (await asyncio.wait_for(answer.content.readuntil(b"\n\n"), 5)).decode().split("\n")
        name, data = lines[0].removeprefix("event: "), lines[1].removeprefix("data: ")
        found.append((name, msgspec.json.decode(data)))
    return found


async def test_the_stream_begins_with_everything_and_then_tells_what_changes(
    http: aiohttp.ClientSession, system: RunningSystem
) -> None:
    async with http.get("/console/api/stream", headers=AUTH) as answer:
        assert answer.content_type == "text/event-stream"
        first = await _events(answer, 4)
        assert [name for name, _ in first] == ["state", "heat", "decisions", "today"]
        state = dict(first)["state"]
        assert state["picture"]["groups"][0]["name"] == "em-tiny-cheap-1"
        known = len(dict(first)["decisions"])
        ((name, _),) = await _events(answer, 1)
        assert name == "state", "it beats each second even when nothing changes"
        system.gateway.in_flight = {"em-tiny-cheap-1": 30}
        await system.pass_s(10)
        later = await _events(answer, 2)
        decisions = dict(later)["decisions"]
        assert len(decisions) > known
        assert decisions[0]["seq"] == max(one["seq"] for one in decisions)


async def test_a_stream_ends_with_its_session(
    http: aiohttp.ClientSession, system: RunningSystem
) -> None:
    async with http.post("/console/api/session", json={"secret": TOKEN}) as answer:
        session = (await answer.json())["session"]
    headers = {"Authorization": f"Bearer {session}"}
    async with http.get("/console/api/stream", headers=headers) as answer:
        await _events(answer, 4)
        system.clock.now_s += SESSION_S
        names = [name for name, _ in await _events(answer, 1)]
        while names[-1] != "ended":
            names += [name for name, _ in await _events(answer, 1)]
        assert await asyncio.wait_for(answer.content.read(), 5) == b""


async def test_a_decision_is_explained(http: aiohttp.ClientSession, system: RunningSystem) -> None:
    seq = (await system.controller.decisions(1, None))[0]["seq"]
    async with http.get(f"/console/api/decisions/{seq}", headers=AUTH) as answer:
        assert answer.status == 200
        body = await answer.json()
    assert body["seq"] == seq and body["candidates"] and body["inputs"]
    for path in ("999999", "1"):
        async with http.get(f"/console/api/decisions/{path}", headers=AUTH) as answer:
            assert answer.status == 404


async def _what_if(http: aiohttp.ClientSession, body: Any) -> tuple[int, Any]:
    async with http.post("/console/api/what-if", json=body, headers=AUTH) as answer:
        return answer.status, await answer.json()


async def test_what_if_asks_the_policy_and_does_nothing(
    http: aiohttp.ClientSession, system: RunningSystem
) -> None:
    before = (len(system.serve.puts), len(system.journal.entries))
    status, same = await _what_if(http, {"model": "tiny", "settings": []})
    assert (status, same["before"]["wanted"]) == (200, 1)
    assert same["after"] == same["before"]
    status, body = await _what_if(http, {"model": "tiny", "settings": ["min_groups=2"]})
    assert status == 200
    assert body["before"]["need"] == 1 and body["after"]["need"] == 2
    assert any(action.startswith("start ") for action in body["after"]["actions"])
    assert (len(system.serve.puts), len(system.journal.entries)) == before
    async with http.get("/console/api/what-if", headers=AUTH) as answer:
        assert (await answer.json())["keys"] == KEYS


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({}, 400, "send"),
        ({"model": "tiny"}, 400, "send"),
        ({"model": 1, "settings": []}, 400, "send"),
        ({"model": "tiny", "settings": [1]}, 400, "send"),
        ({"model": "tiny", "settings": ["x"] * 31}, 400, "send"),
        ({"model": "tiny", "settings": ["x" * 201]}, 400, "send"),
        ({"model": "tiny", "settings": ["nonsense=1"]}, 400, "cannot be changed"),
        ({"model": "tiny", "settings": ["queue=-1"]}, 400, "not negative"),
        ({"model": "other", "settings": []}, 404, "no decision"),
    ],
)
async def test_a_what_if_that_makes_no_sense_is_refused(
    http: aiohttp.ClientSession, body: Any, status: int, words: str
) -> None:
    found, answer = await _what_if(http, body)
    assert found == status
    assert words in answer["error"]["message"]


async def test_a_controller_that_stops_ends_its_streams(system: RunningSystem) -> None:
    console = Console(
        system.controller, ConsoleAccess(TOKEN, None, system.clock), name="t", now_s=system.clock
    )
    server = TestServer(build_api(system.controller, TOKEN, None, console))
    await server.start_server()
    async with (
        aiohttp.ClientSession() as http,
        http.get(server.make_url("/console/api/stream"), headers=AUTH) as answer,
    ):
        await _events(answer, 3)
        await asyncio.wait_for(server.close(), 2)


async def test_only_so_many_may_look_on(
    http: aiohttp.ClientSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("expertmesh.controller.console._STREAMS", 1)
    async with http.get("/console/api/stream", headers=AUTH) as first:
        await _events(first, 1)
        async with http.get("/console/api/stream", headers=AUTH) as second:
            assert second.status == 503
