from dataclasses import dataclass, field
from pathlib import Path

import pytest

from expertmesh.controller.console_access import (
    SESSION_S,
    TICKET_S,
    ConsoleAccess,
    console_link,
    console_ticket,
)
from expertmesh.store.database import open_database
from expertmesh.store.keys import KeyBook

TOKEN = "the mesh token"


@dataclass
class Clock:
    now_s: float = 1000.0

    def __call__(self) -> float:
        return self.now_s


@dataclass
class FakeKeys:
    admins: dict[str, str] = field(default_factory=lambda: {"sk-em-admin": "key_1"})

    async def admin_id(self, secret: str, now_s: float) -> str | None:
        return self.admins.get(secret)

    async def is_admin(self, key_id: str, now_s: float) -> bool:
        return key_id in self.admins.values()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def keys() -> FakeKeys:
    return FakeKeys()


@pytest.fixture
def access(clock: Clock, keys: FakeKeys) -> ConsoleAccess:
    return ConsoleAccess(TOKEN, keys, clock)


@pytest.mark.parametrize("secret", [TOKEN, f" {TOKEN}\n", "sk-em-admin"])
async def test_a_secret_opens_a_session_that_holds_no_secret(
    access: ConsoleAccess, secret: str
) -> None:
    session = await access.enter(secret)
    assert session is not None
    assert secret.strip() not in session.text
    assert await access.admits(session.text)


@pytest.mark.parametrize(
    "secret",
    [
        "",
        "wrong",
        "sk-em-user",
        "the mesh tokem",
        "emt1.mesh.9999999999999.00.00",
        "\udcff",
        "\x00",
    ],
)
async def test_any_other_secret_opens_none(access: ConsoleAccess, secret: str) -> None:
    assert await access.enter(secret) is None
    assert not await access.admits(secret)


async def test_the_mesh_token_itself_is_admitted(access: ConsoleAccess) -> None:
    assert await access.admits(TOKEN)


async def test_a_session_ends(access: ConsoleAccess, clock: Clock) -> None:
    session = await access.enter(TOKEN)
    assert session is not None and session.expires_at_s == clock.now_s + SESSION_S
    clock.now_s += SESSION_S - 1
    assert await access.admits(session.text)
    clock.now_s += 1
    assert not await access.admits(session.text)


async def test_a_session_of_a_key_ends_with_the_key(access: ConsoleAccess, keys: FakeKeys) -> None:
    session = await access.enter("sk-em-admin")
    assert session is not None
    keys.admins.clear()
    assert not await access.admits(session.text)


async def test_another_controller_of_the_same_mesh_admits_it(
    access: ConsoleAccess, clock: Clock, keys: FakeKeys
) -> None:
    session = await access.enter(TOKEN)
    assert session is not None
    assert await ConsoleAccess(TOKEN, keys, clock).admits(session.text)
    assert not await ConsoleAccess("another", keys, clock).admits(session.text)


async def test_a_changed_session_is_refused(access: ConsoleAccess) -> None:
    session = await access.enter("sk-em-admin")
    assert session is not None
    kind, subject, ends, nonce, mac = session.text.split(".")
    for changed in (
        f"{kind}.mesh.{ends}.{nonce}.{mac}",
        f"{kind}.{subject}.{int(ends) + 1}.{nonce}.{mac}",
        f"{kind}.{subject}.{ends}.{nonce}.{'0' * 64}",
        f"{kind}.{subject}.{ends}.{nonce}",
        session.text + "0",
    ):
        assert not await access.admits(changed)


async def test_a_ticket_opens_once(access: ConsoleAccess, clock: Clock) -> None:
    clock.now_s += 5
    ticket = console_ticket(TOKEN, clock.now_s)
    assert not await access.admits(ticket), "a ticket is no session"
    assert await access.enter(ticket) is not None
    assert await access.enter(ticket) is None
    assert await access.enter(console_ticket(TOKEN, clock.now_s)) is not None


async def test_a_ticket_is_refused_when_it_is_old_or_of_another_mesh(
    access: ConsoleAccess, clock: Clock
) -> None:
    assert await access.enter(console_ticket("another", clock.now_s)) is None
    ticket = console_ticket(TOKEN, clock.now_s)
    clock.now_s += TICKET_S
    assert await access.enter(ticket) is None
    assert await access.enter(console_ticket(TOKEN, clock.now_s + 3600)) is None


async def test_a_ticket_from_before_a_restart_is_refused(clock: Clock, keys: FakeKeys) -> None:
    """The process that started again does not know whether it was used."""
    ticket = console_ticket(TOKEN, clock.now_s)
    clock.now_s += 30
    assert await ConsoleAccess(TOKEN, keys, clock).enter(ticket) is None


async def test_a_session_is_no_ticket(access: ConsoleAccess) -> None:
    session = await access.enter(TOKEN)
    assert session is not None and await access.enter(session.text) is None


def test_a_link_carries_its_ticket_where_no_server_sees_it() -> None:
    page, _, fragment = console_link("http://127.0.0.1:8090", TOKEN, 1000.0).partition("#")
    assert page == "http://127.0.0.1:8090/console/"
    assert fragment.startswith("ticket=emt1.")


async def test_the_store_tells_admin_keys_from_others(tmp_path: Path) -> None:
    database = await open_database(f"sqlite:///{tmp_path}/store.db")
    book = KeyBook(database)
    admin = await book.create("ops", "", 0.0, admin=True)
    user = await book.create("acme", "", 0.0)
    short = await book.create("ops", "", 0.0, 50.0, admin=True)
    try:
        assert await book.admin_id(admin.secret, 100.0) == admin.id
        assert await book.admin_id(user.secret, 100.0) is None
        assert await book.admin_id("sk-em-nobody", 100.0) is None
        assert await book.admin_id(short.secret, 49.0) == short.id
        assert await book.admin_id(short.secret, 51.0) is None
        assert await book.is_admin(admin.id, 100.0)
        assert not await book.is_admin(user.id, 100.0)
        assert not await book.is_admin(short.id, 51.0)
        assert not await book.is_admin("key_none", 100.0)
        await book.revoke(admin.id, 101.0)
        assert await book.admin_id(admin.secret, 102.0) is None
        assert not await book.is_admin(admin.id, 102.0)
    finally:
        await database.close()
