"""The admin API over a real store, called as the gateway calls it."""

import hashlib
import json
import logging
import re
import sqlite3
from collections.abc import AsyncIterator
from contextlib import closing
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from sqlalchemy import text
from starlette.types import Receive, Scope, Send
from tests.store.records import NOON_S, capacity_hold, usage_record

from expertmesh.core.domain.tenant import Caller, Limits, Priority, Tenant
from expertmesh.core.metering.report import By, UsageReport
from expertmesh.errors import UpstreamUnavailable
from expertmesh.gateway.admin import build_admin
from expertmesh.store.database import Database, open_database
from expertmesh.store.keys import KeyBook, hash_secret
from expertmesh.store.ledger import Ledger
from expertmesh.store.report import usage_report
from expertmesh.store.tenants import TenantBook

ADMIN = Caller("key_admin", "ops", admin=True)
NO_LIMITS = {
    "requests_per_min": None,
    "tokens_per_min": None,
    "concurrent_requests": None,
    "usd_per_day": None,
    "usd_per_month": None,
}


@dataclass
class _Usage:
    database: Database
    error: Exception | None = None

    async def report(self, by: By, since_s: float | None, until_s: float | None) -> UsageReport:
        if self.error is not None:
            raise self.error
        return await usage_report(Ledger(self.database), by, since_s, until_s)


@dataclass
class Admin:
    http: httpx.AsyncClient
    database: Database
    keys: KeyBook
    tenants: TenantBook
    usage: _Usage
    now_s: float = NOON_S
    caller: Caller | None = ADMIN
    answers: list[httpx.Response] = field(default_factory=list)

    async def __call__(
        self, method: str, path: str, body: Any = None, **options: Any
    ) -> httpx.Response:
        if body is not None:
            options["json"] = body
        answer = await self.http.request(method, f"/admin/v1{path}", **options)
        self.answers.append(answer)
        return answer


@pytest.fixture
async def admin(tmp_path: Path) -> AsyncIterator[Admin]:
    database = await open_database(f"sqlite:///{tmp_path}/store.db")
    keys, tenants, usage = KeyBook(database), TenantBook(database), _Usage(database)
    app = build_admin(keys, tenants, usage, lambda: stand.now_s)

    async def authenticated(scope: Scope, receive: Receive, send: Send) -> None:
        state = {} if stand.caller is None else {"caller": stand.caller}
        await app({**scope, "state": state}, receive, send)

    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(authenticated), base_url="http://gateway"
    ) as http:
        stand = Admin(http, database, keys, tenants, usage)
        yield stand
    await database.close()
    with closing(sqlite3.connect(tmp_path / "store.db")) as connection:
        hashes = {sha256 for (sha256,) in connection.execute("SELECT sha256 FROM api_keys")}
    for answer in stand.answers:
        assert not any(sha256 in answer.text for sha256 in hashes)
        assert answer.status_code == 201 or not re.search(r"sk-em-[\w-]{5}", answer.text)


def _error(answer: httpx.Response, status: int, param: str | None = None) -> str:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    (error,) = answer.json().values()
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == ("invalid_request_error" if status < 500 else "server_error")
    assert error["param"] == param
    message: str = error["message"]
    return message


async def test_tenants_are_put_read_changed_and_listed(admin: Admin) -> None:
    limits = {"requests_per_min": 600, "usd_per_day": 0.3}
    body = {"priority": "interactive", "weight": 2, "limits": limits}
    created = await admin("PUT", "/tenants/acme", body)
    assert created.status_code == 201
    expected = {
        "name": "acme",
        "priority": "interactive",
        "weight": 2.0,
        "limits": {**NO_LIMITS, **limits},
        "created_at_s": NOON_S,
        "disabled_at_s": None,
    }
    assert created.json() == expected
    assert created.headers["cache-control"] == "no-store"
    assert (await admin("GET", "/tenants/acme")).json() == expected

    change = {"weight": 0.5, "limits": {"usd_per_day": None, "tokens_per_min": 9}}
    changed = await admin("PATCH", "/tenants/acme", change)
    expected |= {
        "weight": 0.5,
        "limits": {**NO_LIMITS, "requests_per_min": 600, "tokens_per_min": 9},
    }
    assert (changed.status_code, changed.json()) == (200, expected)

    replaced = await admin("PUT", "/tenants/acme", {})
    expected |= {"priority": "standard", "weight": 1.0, "limits": NO_LIMITS}
    assert (replaced.status_code, replaced.json()) == (200, expected)
    listed = await admin("GET", "/tenants")
    assert listed.json() == {
        "object": "list",
        "data": [expected],
        "has_more": False,
        "last_id": "acme",
    }


async def test_a_change_of_nothing_changes_nothing(admin: Admin) -> None:
    tenant = Tenant("acme", Priority.BATCH, 3.0, Limits(1, 2, 3, 4.5, 6.0))
    before, _ = await admin.tenants.put(tenant, NOON_S)
    for body in ({}, {"limits": {}}):
        assert (await admin("PATCH", "/tenants/acme", body)).status_code == 200
        assert await admin.tenants.get("acme") == before


async def test_disabling_and_enabling_a_tenant(admin: Admin) -> None:
    await admin.keys.create("acme", "", NOON_S)
    admin.now_s = NOON_S + 5
    disabled = await admin("POST", "/tenants/acme/disable")
    assert (disabled.status_code, disabled.json()["disabled_at_s"]) == (200, NOON_S + 5)
    assert await admin.keys.active(NOON_S + 5) == {}
    (key,) = (await admin("GET", "/keys?tenant=acme")).json()["data"]
    assert key["active"] is False
    message = _error(await admin("POST", "/keys", {"tenant": "acme"}), 409, "tenant")
    assert message == "tenant: 'acme': is disabled; enable it first"

    enabled = await admin("POST", "/tenants/acme/enable")
    assert (enabled.status_code, enabled.json()["disabled_at_s"]) == (200, None)
    assert len(await admin.keys.active(NOON_S + 6)) == 1


async def test_a_key_is_created_with_its_secret_and_never_shown_again(admin: Admin) -> None:
    body = {
        "tenant": "acme",
        "name": "ci",
        "expires_at_s": NOON_S + 60,
        "models": ["tiny-moe", "big"],
        "limits": {"concurrent_requests": 4},
    }
    created = await admin("POST", "/keys", body)
    assert created.status_code == 201
    answer = created.json()
    assert set(answer) == {"id", "tenant", "name", "secret"}
    active = await admin.keys.active(NOON_S)
    assert active[hash_secret(answer["secret"])].key_id == answer["id"]

    expected = {
        "id": answer["id"],
        "tenant": "acme",
        "name": "ci",
        "prefix": answer["secret"][:10],
        "models": ["big", "tiny-moe"],
        "admin": False,
        "limits": {**NO_LIMITS, "concurrent_requests": 4},
        "created_at_s": NOON_S,
        "expires_at_s": NOON_S + 60,
        "revoked_at_s": None,
        "active": True,
    }
    path = f"/keys/{answer['id']}"
    assert (await admin("GET", path)).json() == expected
    assert (await admin("GET", "/keys")).json()["data"] == [expected]

    change = {"name": "cd", "models": None, "limits": {"usd_per_month": 10}}
    changed = await admin("PATCH", path, change)
    expected |= {
        "name": "cd",
        "models": None,
        "limits": {**NO_LIMITS, "concurrent_requests": 4, "usd_per_month": 10.0},
    }
    assert (changed.status_code, changed.json()) == (200, expected)

    revoked = await admin("DELETE", path)
    expected |= {"revoked_at_s": NOON_S, "active": False}
    assert (revoked.status_code, revoked.json()) == (200, expected)
    admin.now_s = NOON_S + 9
    assert (await admin("DELETE", path)).json() == expected
    message = _error(await admin("PATCH", path, {"name": "x"}), 409, "id")
    assert "revoked for good; create another" in message
    for later in admin.answers[1:]:
        assert answer["secret"][:12] not in later.text


async def test_an_admin_key_can_be_made_and_the_last_one_revoked(admin: Admin) -> None:
    created = (await admin("POST", "/keys", {"tenant": "ops", "admin": True})).json()
    (caller,) = (await admin.keys.active(NOON_S)).values()
    assert caller.admin
    assert (await admin("DELETE", f"/keys/{created['id']}")).status_code == 200
    assert await admin.keys.active(NOON_S) == {}


async def test_lists_come_in_pages(admin: Admin) -> None:
    for n in range(5):
        await admin.keys.create("acme" if n else "zoo", f"{n}", NOON_S + n)
    seen: list[str] = []
    after, more = "", True
    while more:
        page = (await admin("GET", f"/keys?limit=2{after}")).json()
        seen += [key["name"] for key in page["data"]]
        after, more = f"&after={page['last_id']}", page["has_more"]
    assert seen == ["0", "1", "2", "3", "4"]
    assert len(admin.answers) == 3

    first = (await admin("GET", "/tenants?limit=1")).json()
    assert ([tenant["name"] for tenant in first["data"]], first["has_more"]) == (["acme"], True)
    rest = (await admin("GET", f"/tenants?limit=1&after={first['last_id']}")).json()
    assert ([tenant["name"] for tenant in rest["data"]], rest["has_more"]) == (["zoo"], False)
    empty = (await admin("GET", "/keys?tenant=nobody")).json()
    assert empty == {"object": "list", "data": [], "has_more": False, "last_id": None}


async def test_limits_are_shown_with_what_is_used_of_them(admin: Admin) -> None:
    await admin.tenants.put(Tenant("acme", limits=Limits(usd_per_day=5.0)), NOON_S)
    admin.now_s = NOON_S + 86_400
    await Ledger(admin.database).add_usage(
        [
            usage_record("yesterday", NOON_S, tariff_usd=Decimal("1.5")),
            usage_record("today", NOON_S + 86_400, tariff_usd=Decimal("0.0000000001")),
            usage_record("other", NOON_S, tenant="zoo"),
        ]
    )
    limits = (await admin("GET", "/tenants/acme/limits")).json()
    assert limits == {
        "tenant": "acme",
        "limits": {**NO_LIMITS, "usd_per_day": 5.0},
        "today": {
            "since_s": NOON_S + 43_200,
            "requests": 1,
            "tokens": 120,
            "usd": "0.0000000001",
        },
        "month": {
            "since_s": NOON_S - 43_200,
            "requests": 2,
            "tokens": 240,
            "usd": "1.5000000001",
        },
    }


async def test_usage_adds_up_and_is_cut_to_the_time_asked_for(admin: Admin) -> None:
    ledger = Ledger(admin.database)
    await ledger.add_usage([usage_record("a"), usage_record("b", NOON_S + 30, tenant="zoo")])
    await ledger.hold_capacity([capacity_hold()])
    admin.now_s = NOON_S + 3600
    report = (await admin("GET", "/usage?by=tenant")).json()
    assert report["by"] == "tenant"
    assert [row["key"] for row in report["rows"]] == ["(idle)", "acme", "zoo"]
    total = report["total"]
    assert (total["key"], total["requests"], total["prompt_tokens"]) == (None, 2, 200)
    assert Decimal(total["tariff_usd"]) == Decimal("0.0000296")
    # A minute of 0.3 $/h.
    assert Decimal(total["capacity_usd"]) == Decimal("0.005")
    parts = ("attributed_usd", "idle_usd", "starting_usd", "draining_usd", "idle_nodes_usd")
    assert sum(Decimal(total[part]) for part in parts) == Decimal("0.005")
    assert total["external_usd"] == "0.000000000"

    for since in (str(NOON_S + 10), "2026-01-01T12:00:10", "2026-01-01T13:00:10%2B01:00"):
        later = (await admin("GET", f"/usage?by=day&since={since}")).json()
        assert [(row["key"], row["requests"]) for row in later["rows"]] == [("2026-01-01", 1)]
    before = (await admin("GET", "/usage?since=2025-12-31&until=2026-01-01T12:00:30Z")).json()
    assert before["total"]["requests"] == 1
    # Without `since`, the last day.
    admin.now_s = NOON_S + 86_400 + 100
    assert (await admin("GET", "/usage")).json()["total"]["requests"] == 0


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("by=colour", "by"),
        ("since=yesterday", "since"),
        ("since=nan", "since"),
        ("until=9999-99-99", "until"),
        ("since=2026-01-02&until=2026-01-01", "until"),
        ("form=2026-01-01", "form"),
    ],
)
async def test_a_bad_usage_query_is_refused(admin: Admin, query: str, param: str) -> None:
    assert param in _error(await admin("GET", f"/usage?{query}"), 400, param)


@pytest.mark.parametrize(
    ("method", "path", "body", "param"),
    [
        ("PUT", "/tenants/Acme", {}, "name"),
        ("PUT", "/tenants/acme", {"weight": 0}, "weight"),
        ("PUT", "/tenants/acme", {"weight": 1001}, "weight"),
        ("PUT", "/tenants/acme", {"weight": "1"}, "weight"),
        ("PUT", "/tenants/acme", {"weight": True}, "weight"),
        ("PUT", "/tenants/acme", {"priority": "urgent"}, "priority"),
        ("PUT", "/tenants/acme", {"colour": 1}, "colour"),
        ("PUT", "/tenants/acme", {"limits": None}, "limits"),
        ("PUT", "/tenants/acme", {"limits": {"rpm": 1}}, "limits.rpm"),
        ("PUT", "/tenants/acme", {"limits": {"tokens_per_min": 0}}, "limits.tokens_per_min"),
        ("PUT", "/tenants/acme", {"limits": {"tokens_per_min": 1.5}}, "limits.tokens_per_min"),
        ("PUT", "/tenants/acme", {"limits": {"usd_per_day": -1}}, "limits.usd_per_day"),
        ("PATCH", "/tenants/known", {"limits": {"usd_per_day": 0}}, "limits.usd_per_day"),
        ("PATCH", "/tenants/known", {"name": "other"}, "name"),
        ("POST", "/keys", {}, "tenant"),
        ("POST", "/keys", {"tenant": "Acme"}, "tenant"),
        ("POST", "/keys", {"tenant": 5}, "tenant"),
        ("POST", "/keys", {"tenant": "acme", "name": "a\nb"}, "name"),
        ("POST", "/keys", {"tenant": "acme", "name": "\x00"}, "name"),
        ("POST", "/keys", {"tenant": "acme", "expires_at_s": NOON_S}, "expires_at_s"),
        ("POST", "/keys", {"tenant": "acme", "expires_at_s": 1e300}, "expires_at_s"),
        ("POST", "/keys", {"tenant": "acme", "expires_in": 5}, "expires_in"),
        ("POST", "/keys", {"tenant": "acme", "models": []}, "models"),
        ("POST", "/keys", {"tenant": "acme", "models": ["a b"]}, "models"),
        ("POST", "/keys", {"tenant": "acme", "models": [5]}, "models.0"),
        ("POST", "/keys", {"tenant": "acme", "models": "all"}, "models"),
        ("POST", "/keys", {"tenant": "acme", "admin": "yes"}, "admin"),
        ("POST", "/keys", {"tenant": "acme", "admin": True, "models": ["a"]}, "admin"),
        ("POST", "/keys", {"tenant": "acme", "secret": "sk-em-mine"}, "secret"),
        ("GET", "/keys?limit=0", None, "limit"),
        ("GET", "/keys?limit=1001", None, "limit"),
        ("GET", "/keys?tenent=acme", None, "tenent"),
        ("GET", "/keys?after=key_unknown", None, "after"),
        ("GET", "/keys?after=%00", None, "after"),
        ("GET", "/tenants?after=%ff", None, "after"),
    ],
)
async def test_a_bad_value_is_refused_by_the_name_of_its_field(
    admin: Admin, method: str, path: str, body: Any, param: str
) -> None:
    await admin.tenants.put(Tenant("known"), NOON_S)
    before = await admin.keys.version()
    message = _error(await admin(method, path, body), 400, param)
    assert message.startswith(f"{param}: ")
    assert "sk-em-mine" not in message
    assert await admin.keys.list() == ()
    assert [record.tenant for record in await admin.tenants.list()] == [Tenant("known")]
    assert await admin.keys.version() == before


@pytest.mark.parametrize(
    ("content", "content_type", "status", "words"),
    [
        (b"{", "application/json", 400, "is no JSON"),
        (b"\xff", "application/json", 400, ""),
        (b'{"tenant": "\\ud800"}', "application/json", 400, "tenant"),
        (b'{"tenant": "acme", "name": "\\ud800"}', "application/json", 400, "name"),
        (b'{"tenant": "acme", "limits": {"usd_per_day": NaN}}', "application/json", 400, "usd"),
        (b'{"tenant": "acme", "limits": {"usd_per_day": 1e999}}', "application/json", 400, "usd"),
        (b"[" * 100_000, "application/json", 400, ""),
        (b"[]", "application/json", 400, "a JSON object"),
        (b"null", "application/json", 400, "a JSON object"),
        (b"", "application/json", 400, "a JSON object"),
        (b'{"tenant": "acme"}', "application/x-www-form-urlencoded", 415, "content-type"),
        (b'{"tenant": "acme"}', None, 415, "content-type"),
        (b'{"tenant": "' + b"a" * 300_000 + b'"}', "application/json", 413, "limit of 262144"),
    ],
)
async def test_a_body_that_is_no_object_is_refused(
    admin: Admin, content: bytes, content_type: str | None, status: int, words: str
) -> None:
    headers = {} if content_type is None else {"content-type": content_type}
    answer = await admin("POST", "/keys", content=content, headers=headers)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert words in error["message"]
    assert await admin.keys.list() == ()


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/tenants/nobody"),
        ("PATCH", "/tenants/nobody"),
        ("POST", "/tenants/nobody/disable"),
        ("POST", "/tenants/nobody/enable"),
        ("GET", "/tenants/nobody/limits"),
        ("GET", "/keys/key_x"),
        ("PATCH", "/keys/key_x"),
        ("DELETE", "/keys/key_x"),
        ("DELETE", "/keys/%00"),
        ("GET", "/tenants/" + "a" * 5000),
        ("GET", "/tenants/%F0%9F%92%A9"),
        ("GET", ""),
        ("GET", "/tenants/"),
        ("GET", "/docs"),
        ("GET", "/keys/a/b"),
    ],
)
async def test_what_is_not_there_is_404(admin: Admin, method: str, path: str) -> None:
    answer = await admin(method, path, {} if method == "PATCH" else None)
    assert _error(answer, 404).startswith("There is no ")
    assert len(answer.text) < 400


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("DELETE", "/tenants/acme", "GET, PATCH, PUT"),
        ("POST", "/tenants", "GET"),
        ("PUT", "/keys", "GET, POST"),
        ("POST", "/usage", "GET"),
        ("GET", "/tenants/acme/disable", "POST"),
    ],
)
async def test_a_wrong_method_is_405_with_those_that_work(
    admin: Admin, method: str, path: str, allow: str
) -> None:
    answer = await admin(method, path)
    assert f"Use {allow} for" in _error(answer, 405)
    assert answer.headers["allow"] == allow


@pytest.mark.parametrize("caller", [None, Caller("key_1", "acme")])
async def test_without_an_admin_key_nothing_is_answered(
    admin: Admin, caller: Caller | None
) -> None:
    admin.caller = caller
    for method, path in (
        ("GET", "/tenants"),
        ("POST", "/keys"),
        ("GET", "/openapi.json"),
        ("GET", "/nothing"),
    ):
        message = _error(await admin(method, path), 403)
        assert "keys create --admin" in message
    assert await admin.tenants.list() == ()


async def test_a_store_that_is_away_is_503_and_its_place_is_not_told(
    admin: Admin, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = UpstreamUnavailable("store: postgresql+asyncpg://em@db.internal/em: refused")

    async def away(*_: object, **__: object) -> None:
        raise error

    for book, name in ((admin.keys, "list"), (admin.keys, "create"), (admin.tenants, "put")):
        monkeypatch.setattr(type(book), name, away)
    admin.usage.error = error
    for method, path, body in (
        ("GET", "/keys", None),
        ("POST", "/keys", {"tenant": "acme"}),
        ("PUT", "/tenants/acme", {}),
        ("GET", "/usage", None),
    ):
        answer = await admin(method, path, body)
        message = _error(answer, 503)
        assert "db.internal" not in message
        assert answer.headers["retry-after"] == "1"


async def test_a_fault_is_500_in_the_same_shape_and_logged(
    admin: Admin, caplog: pytest.LogCaptureFixture
) -> None:
    admin.usage.error = ZeroDivisionError("inner matters")
    answer = await admin("GET", "/usage")
    assert "inner" not in _error(answer, 500)
    assert "inner matters" in caplog.text


async def test_every_change_leaves_a_line_of_who_and_what_and_no_secret(
    admin: Admin, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "expertmesh.gateway.audit")
    await admin("PUT", "/tenants/acme", {"weight": 2})
    await admin("PUT", "/tenants/acme", {})
    await admin("PATCH", "/tenants/acme", {"limits": {"usd_per_day": None}})
    await admin("POST", "/tenants/acme/disable")
    await admin("POST", "/tenants/acme/enable")
    created = (await admin("POST", "/keys", {"tenant": "acme", "name": "ci"})).json()
    await admin("PATCH", f"/keys/{created['id']}", {"models": ["a"]})
    await admin("DELETE", f"/keys/{created['id']}")
    # Nothing changes by these.
    await admin("DELETE", f"/keys/{created['id']}")
    await admin("GET", "/keys")
    await admin("PUT", "/tenants/acme", {"weight": 0})

    lines = [
        json.loads(record.message)
        for record in caplog.records
        if record.name == "expertmesh.gateway.audit"
    ]
    assert [(line["action"], line["target"]) for line in lines] == [
        ("tenant.create", "acme"),
        ("tenant.replace", "acme"),
        ("tenant.change", "acme"),
        ("tenant.disable", "acme"),
        ("tenant.enable", "acme"),
        ("key.create", created["id"]),
        ("key.change", created["id"]),
        ("key.revoke", created["id"]),
    ]
    assert {(line["by_key"], line["by_tenant"]) for line in lines} == {("key_admin", "ops")}
    assert lines[2]["settings"] == {"limits": {"usd_per_day": None}}
    assert lines[5]["settings"]["name"] == "ci"
    secret = created["secret"]
    digest = hashlib.sha256(secret.encode()).hexdigest()
    assert secret[:12] not in caplog.text and digest not in caplog.text


async def test_the_openapi_document_describes_every_route(admin: Admin) -> None:
    answer = await admin("GET", "/openapi.json")
    assert answer.status_code == 200
    document = answer.json()
    operations = {
        f"{method.upper()} {path.removeprefix('/admin/v1')}"
        for path, methods in document["paths"].items()
        for method in methods
    }
    assert operations == {
        "GET /tenants",
        "GET /tenants/{name}",
        "PUT /tenants/{name}",
        "PATCH /tenants/{name}",
        "POST /tenants/{name}/disable",
        "POST /tenants/{name}/enable",
        "GET /tenants/{name}/limits",
        "GET /keys",
        "POST /keys",
        "GET /keys/{key_id}",
        "PATCH /keys/{key_id}",
        "DELETE /keys/{key_id}",
        "GET /usage",
    }
    for methods in document["paths"].values():
        for operation in methods.values():
            assert "422" not in operation["responses"]
            assert operation["responses"]["4XX"]["content"]["application/json"]["schema"] == {
                "$ref": "#/components/schemas/ErrorOut"
            }
            assert operation["security"]


async def test_answers_are_as_the_document_says(admin: Admin) -> None:
    document = (await admin("GET", "/openapi.json")).json()
    key = (await admin("POST", "/keys", {"tenant": "acme"})).json()
    for method, path, template in (
        ("GET", "/tenants", "/tenants"),
        ("GET", "/tenants/acme/limits", "/tenants/{name}/limits"),
        ("GET", "/keys", "/keys"),
        ("GET", f"/keys/{key['id']}", "/keys/{key_id}"),
        ("GET", "/usage", "/usage"),
    ):
        operation = document["paths"][f"/admin/v1{template}"][method.lower()]
        schema = operation["responses"]["200"]["content"]["application/json"]["schema"]
        validator = Draft202012Validator({**schema, "components": document["components"]})
        validator.validate((await admin(method, path)).json())


async def test_nothing_is_stored_when_the_transaction_fails(admin: Admin) -> None:
    async with admin.database.writing() as connection:
        await connection.execute(text("DROP TABLE api_keys"))
    assert _error(await admin("POST", "/keys", {"tenant": "acme"}), 503)
    assert await admin.tenants.list() == ()
    async with admin.database.writing() as connection:
        await connection.execute(text("CREATE TABLE api_keys (sha256 text)"))


_ODD_NUMBERS = st.sampled_from([0, -1, 1, 10**18, 10**400, -(10**400), 1e308, 5e-324, 0.1, True])
_ODD_TEXT = st.text(max_size=12) | st.sampled_from(["acme", "a" * 5000, "\x00", "💩", "tiny-moe"])
_ODD = st.recursive(
    st.none() | _ODD_NUMBERS | _ODD_TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_ODD_TEXT, inner, max_size=3),
    max_leaves=5,
)


def _mostly(*names: str) -> st.SearchStrategy[dict[str, Any]]:
    return st.dictionaries(st.sampled_from(names), _ODD, max_size=4)


_LIMITS = st.dictionaries(st.sampled_from(sorted(NO_LIMITS)), st.none() | _ODD_NUMBERS, max_size=2)
_BODY = st.one_of(
    _ODD,
    _mostly("priority", "weight", "limits", "tenant", "name", "expires_at_s", "models", "admin"),
    st.builds(lambda limits: {"limits": limits}, _LIMITS),
    st.builds(lambda limits: {"tenant": "acme", "limits": limits}, _LIMITS),
)
_ROUTE = st.sampled_from(
    [
        ("PUT", "/tenants/acme"),
        ("PATCH", "/tenants/acme"),
        ("POST", "/keys"),
        ("PATCH", "/keys/{key}"),
        ("POST", "/tenants/acme/enable"),
    ]
)


@given(steps=st.lists(st.tuples(_ROUTE, _BODY), min_size=5, max_size=10))
@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
async def test_whatever_is_sent_the_answer_is_of_the_known_shapes(
    admin: Admin, steps: list[tuple[tuple[str, str], Any]]
) -> None:
    key = await admin.keys.create("acme", "", NOON_S)
    for (method, path), body in steps:
        content = json.dumps(body).encode()
        headers = {"content-type": "application/json"}
        path = path.format(key=key.id)
        answer = await admin(method, path, content=content, headers=headers)
        if answer.status_code not in (200, 201):
            error = answer.json()["error"]
            assert answer.status_code in (400, 404, 409), answer.text
            assert error["type"] == "invalid_request_error" and error["message"]
    # What was stored can be read, by people and by the gateway.
    assert (await admin("GET", "/keys?limit=1000")).status_code == 200
    assert key.id in {caller.key_id for caller in (await admin.keys.active(NOON_S)).values()}


@given(
    query=st.dictionaries(st.sampled_from(("limit", "after", "tenant", "by", "since")), _ODD_TEXT)
)
@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
async def test_whatever_is_asked_the_answer_is_of_the_known_shapes(
    admin: Admin, query: dict[str, str]
) -> None:
    for path in ("/keys", "/tenants", "/usage"):
        answer = await admin("GET", path, params=query)
        assert answer.status_code in (200, 400), answer.text
        assert ("error" in answer.json()) == (answer.status_code == 400)
