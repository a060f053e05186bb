"""The admin API mounted in the gateway, over a real store."""

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from tests.gateway.stand import MODEL, QUICK, Stand, group_of, served_model, standing, until
from tests.mock_rank import MockRank

from expertmesh.core.admission.limit_book import LimitBook
from expertmesh.core.metering.report import By, UsageReport
from expertmesh.gateway.admin import build_admin
from expertmesh.store.database import Database, open_database
from expertmesh.store.keys import KeyBook, hash_secret
from expertmesh.store.ledger import Ledger
from expertmesh.store.report import usage_report
from expertmesh.store.tenants import TenantBook

CHAT_PATH = "/v1/chat/completions"
CHAT: dict[str, Any] = {
    "model": MODEL,
    "messages": [{"role": "user", "content": "one two"}],
    "max_tokens": 8,
}
WITHIN_S = 2.0
"""A change of a key holds on every worker."""


@dataclass
class _Usage:
    database: Database

    async def report(self, by: By, since_s: float | None, until_s: float | None) -> UsageReport:
        return await usage_report(Ledger(self.database), by, since_s, until_s)


@dataclass
class Desk:
    stand: Stand
    rank: MockRank
    admin_secret: str
    secrets: list[str]

    async def __call__(
        self, method: str, path: str, body: Any = None, secret: str | None = None
    ) -> tuple[int, Any]:
        headers = {"Authorization": f"Bearer {secret or self.admin_secret}"}
        async with self.stand.http.request(
            method, f"{self.stand.url}/admin/v1{path}", json=body, headers=headers
        ) as response:
            answer = await response.json()
            text = json.dumps(answer)
            # Only the answer that creates a key holds a secret.
            if (method, path, response.status) == ("POST", "/keys", 201):
                self.secrets.append(answer["secret"])
            else:
                assert not [secret for secret in self.secrets if secret in text]
            assert response.headers.get("cache-control") == "no-store" or response.status in (
                401,
                403,
            )
            return response.status, answer

    async def new_key(self, tenant: str, **fields: Any) -> tuple[str, str]:
        status, answer = await self("POST", "/keys", {"tenant": tenant, **fields})
        assert status == 201
        return answer["id"], answer["secret"]

    async def chat(self, secret: str) -> int:
        async with self.stand.post(CHAT_PATH, CHAT, secret=secret) as response:
            text = await response.text()
            assert not [each for each in self.secrets if each in text]
            return int(response.status)

    async def becomes(self, secret: str, status: int) -> None:
        """Within the time that is promised."""
        deadline_s = time.monotonic() + WITHIN_S
        while await self.chat(secret) != status:
            assert time.monotonic() < deadline_s
            await asyncio.sleep(0.01)


@pytest.fixture
async def desk(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> AsyncIterator[Desk]:
    caplog.set_level(logging.DEBUG, "expertmesh")
    database = await open_database(f"sqlite:///{tmp_path}/store.db")
    keys = KeyBook(database)
    first = await keys.create("ops", "first", time.time(), admin=True)
    app = build_admin(keys, TenantBook(database), _Usage(database), time.time)
    async with standing(
        QUICK, keys=keys, admin=app, ledger=Ledger(database), book=LimitBook()
    ) as stand:
        rank = await stand.rank()
        await stand.show(group_of(rank), models=(served_model(), served_model("other")))
        made = Desk(stand, rank, first.secret, [first.secret])
        yield made
        await asyncio.sleep(0.25)
        log = stand.access_log.read_text()
    await database.close()
    written = log + caplog.text + "".join(str(vars(record)) for record in caplog.records)
    assert not [secret for secret in made.secrets if secret in written]
    assert not [secret for secret in made.secrets if hash_secret(secret) in log]


async def test_from_a_new_tenant_to_its_first_answer(desk: Desk) -> None:
    tenant = {"priority": "interactive", "weight": 2, "limits": {"requests_per_min": 3}}
    assert (await desk("PUT", "/tenants/acme", tenant))[0] == 201
    key_id, secret = await desk.new_key("acme", name="ci", models=[MODEL])
    await desk.becomes(secret, 200)
    # Its limits and models hold at once.
    statuses = [await desk.chat(secret) for _ in range(3)]
    assert statuses == [200, 200, 429]
    async with desk.stand.post(CHAT_PATH, {**CHAT, "model": "other"}, secret=secret) as response:
        assert response.status == 404
    async with desk.stand.http.get(
        f"{desk.stand.url}/v1/models", headers={"x-api-key": secret}
    ) as response:
        assert [model["id"] for model in (await response.json())["data"]] == [MODEL]
    # Raised limits too.
    status, _ = await desk("PATCH", "/tenants/acme", {"limits": {"requests_per_min": 1000}})
    assert status == 200
    await desk.becomes(secret, 200)

    async def answered() -> int:
        status, usage = await desk("GET", "/usage?by=tenant")
        assert status == 200
        return sum(row["requests"] for row in usage["rows"] if row["key"] == "acme")

    deadline_s = time.monotonic() + 10
    while await answered() != 4:
        assert time.monotonic() < deadline_s
        await asyncio.sleep(0.05)
    status, keys = await desk("GET", "/keys?tenant=acme")
    assert [key["id"] for key in keys["data"]] == [key_id]


async def test_a_revoked_key_is_refused(desk: Desk) -> None:
    key_id, secret = await desk.new_key("acme")
    _, other = await desk.new_key("acme")
    await desk.becomes(secret, 200)
    assert (await desk("DELETE", f"/keys/{key_id}"))[0] == 200
    await desk.becomes(secret, 401)
    assert await desk.chat(other) == 200
    seen = len(desk.rank.seen)
    for _ in range(3):
        assert await desk.chat(secret) == 401
    assert len(desk.rank.seen) == seen


async def test_a_disabled_tenant_rests(desk: Desk) -> None:
    _, secret = await desk.new_key("acme")
    await desk.becomes(secret, 200)
    assert (await desk("POST", "/tenants/acme/disable"))[0] == 200
    await desk.becomes(secret, 401)
    assert (await desk("POST", "/tenants/acme/enable"))[0] == 200
    await desk.becomes(secret, 200)


async def test_only_admin_keys_open_it_and_they_open_nothing_else(desk: Desk) -> None:
    _, secret = await desk.new_key("acme")
    await desk.becomes(secret, 200)
    calls = [
        ("GET", "/keys", None),
        ("POST", "/keys", {"tenant": "acme", "admin": True}),
        ("PUT", "/tenants/acme", {"weight": 100}),
        ("GET", "/usage", None),
        ("GET", "/openapi.json", None),
        ("GET", "/nothing", None),
    ]
    for method, path, body in calls:
        status, answer = await desk(method, path, body, secret=secret)
        assert status == 403
        assert answer["error"]["code"] == "permission_denied"
        status, answer = await desk(method, path, body, secret="sk-em-unknown")
        assert status == 401
        assert answer["error"]["code"] == "invalid_api_key"
    async with desk.stand.http.get(f"{desk.stand.url}/admin/v1/keys") as response:
        assert response.status == 401
        assert response.headers["www-authenticate"] == "Bearer"
    # A long body is refused unread.
    async with desk.stand.http.post(
        f"{desk.stand.url}/admin/v1/keys", data=b"x" * 1_000_000, headers={"x-api-key": "no"}
    ) as response:
        assert response.status == 401
    before = len(desk.rank.seen)
    for path in (CHAT_PATH, "/v1/messages", "/v1/embeddings", "/tokenize"):
        async with desk.stand.post(path, CHAT, secret=desk.admin_secret) as response:
            assert response.status == 403
            body = await response.json()
            kind = "permission_error" if path == "/v1/messages" else "invalid_request_error"
            assert body["error"]["type"] == kind
    assert len(desk.rank.seen) == before


async def test_errors_of_the_admin_api_have_its_shape(desk: Desk) -> None:
    cases = [
        ("GET", "/nothing", None, 404),
        ("DELETE", "/tenants/acme", None, 405),
        ("PUT", "/tenants/acme", {"colour": "red"}, 400),
        ("POST", "/keys", {"tenant": desk.admin_secret, "weight": desk.admin_secret}, 400),
        ("GET", "/keys/key_none", None, 404),
    ]
    for method, path, body, expected in cases:
        status, answer = await desk(method, path, body)
        assert status == expected
        assert set(answer["error"]) == {"message", "type", "param", "code"}
    headers = {"Authorization": f"Bearer {desk.admin_secret}", "content-type": "application/json"}
    async with desk.stand.http.post(
        f"{desk.stand.url}/admin/v1/keys", data=b"{", headers=headers
    ) as response:
        assert response.status == 400
    async with desk.stand.http.post(
        f"{desk.stand.url}/admin/v1/keys", data=b" " * 300_000, headers=headers
    ) as response:
        assert response.status == 413


async def test_its_document_says_what_there_is(desk: Desk) -> None:
    status, document = await desk("GET", "/openapi.json")
    assert status == 200
    assert "/admin/v1/tenants/{name}/limits" in document["paths"]
    async with desk.stand.http.head(
        f"{desk.stand.url}/admin/v1/openapi.json",
        headers={"x-api-key": desk.admin_secret},
    ) as response:
        assert response.status in (200, 405)
        assert await response.read() == b""


async def test_model_calls_go_on_beside_it(desk: Desk) -> None:
    """Many admin calls at once, and their connections are used again."""
    _, secret = await desk.new_key("acme")
    await desk.becomes(secret, 200)
    asked: list[Any] = []
    for number in range(20):
        asked.append(desk("PUT", f"/tenants/t{number}", {"weight": number + 1}))
        asked.append(desk.chat(secret))
    answers = await asyncio.gather(*asked)
    assert [status for status, _ in answers[::2]] == [201] * 20
    assert answers[1::2] == [200] * 20
    _, tenants = await desk("GET", "/tenants?limit=100")
    assert {tenant["name"] for tenant in tenants["data"]} >= {f"t{number}" for number in range(20)}


async def test_who_leaves_an_admin_call_harms_nobody(desk: Desk) -> None:
    headers = {"Authorization": f"Bearer {desk.admin_secret}"}
    timeout = aiohttp.ClientTimeout(total=0.002)
    for _ in range(5):
        try:
            async with desk.stand.http.get(
                f"{desk.stand.url}/admin/v1/usage", headers=headers, timeout=timeout
            ) as response:
                await response.read()
        except TimeoutError:
            pass
    assert (await desk("GET", "/tenants"))[0] == 200


async def test_every_admin_answer_has_its_id_and_a_line_in_the_access_log(
    desk: Desk, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "expertmesh.gateway.audit")
    secret = "sk-em-" + "z" * 43
    calls = [
        ("PUT", "/tenants/acme", {"weight": 2}, 201, "mine-1"),
        ("GET", "/keys?limit=1", None, 200, "mine-2"),
        ("GET", "/nothing", None, 404, "mine-3"),
        ("PUT", "/tenants/acme", {"weight": 0}, 400, "mine-4"),
        ("GET", f"/keys/{secret}", None, 404, "mine-5"),
        ("GET", "/tenants", None, 200, ""),
    ]
    ids = []
    for method, path, body, status, request_id in calls:
        headers = {"x-api-key": desk.admin_secret}
        if request_id:
            headers["x-request-id"] = request_id
        async with desk.stand.http.request(
            method, f"{desk.stand.url}/admin/v1{path}", json=body, headers=headers
        ) as response:
            assert response.status == status
            ids.append(response.headers["x-request-id"])
    assert ids[:-1] == [call[4] for call in calls[:-1]]
    assert ids[-1].startswith("req_")
    await until(lambda: len(lines_of(desk)) == len(calls))
    lines = lines_of(desk)
    assert [(line["request_id"], line["method"], line["status"]) for line in lines] == [
        (shown, method, status) for shown, (method, _, _, status, _) in zip(ids, calls, strict=True)
    ]
    assert {(line["tenant"], line["endpoint"]) for line in lines} == {("ops", "admin")}
    assert all(line["key_id"].startswith("key_") and line["duration_s"] >= 0 for line in lines)
    assert lines[1]["path"] == "/admin/v1/keys"
    assert lines[4]["path"] == "/admin/v1/keys/…"
    assert "sk-em-" not in desk.stand.access_log.read_text()
    audited = [json.loads(record.message) for record in caplog.records]
    assert [line["request_id"] for line in audited] == ["mine-1"]


async def test_an_admin_call_that_fails_or_is_left_has_a_line_too(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def fails_or_hangs(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"].endswith("fails"):
            raise RuntimeError("a fault")
        await asyncio.Event().wait()

    async with standing(admin=fails_or_hangs) as stand:
        admin = await stand.key("ops", admin=True)
        headers = {"x-api-key": admin}
        async with stand.http.get(f"{stand.url}/admin/v1/fails", headers=headers) as response:
            assert response.status == 500
            assert response.headers["x-request-id"].startswith("req_")
        with pytest.raises(TimeoutError):
            await stand.http.get(
                f"{stand.url}/admin/v1/hangs",
                headers=headers,
                timeout=aiohttp.ClientTimeout(total=0.2),
            )
        await until(lambda: len(stand.log_lines()) == 2)
        assert [(line["path"], line["status"]) for line in stand.log_lines()] == [
            ("/admin/v1/fails", 500),
            ("/admin/v1/hangs", 499),
        ]


def lines_of(desk: Desk) -> list[dict[str, Any]]:
    return [line for line in desk.stand.log_lines() if line["endpoint"] == "admin"]
