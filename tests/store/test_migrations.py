"""A database of each earlier schema is upgraded in place, with all that it holds."""

from dataclasses import replace
from decimal import Decimal
from fractions import Fraction

from alembic.config import Config
from alembic.runtime.environment import EnvironmentContext
from alembic.runtime.migration import MigrationContext, RevisionStep
from sqlalchemy import Connection, text
from tests.store.records import usage_record

from expertmesh.core.domain.tenant import Caller, Limits, Tenant
from expertmesh.core.metering.report import By
from expertmesh.store import database as database_module
from expertmesh.store.database import open_database
from expertmesh.store.keys import KeyBook, hash_secret
from expertmesh.store.ledger import Ledger
from expertmesh.store.migrations import upgrade
from expertmesh.store.report import usage_report
from expertmesh.store.tenants import TenantBook

NOW_S = 1_767_268_800.0


def _upgrade_to_0001(connection: Connection) -> None:
    scripts = upgrade._scripts()

    def steps(revision: object, context: MigrationContext) -> list[RevisionStep]:
        return scripts._upgrade_revs("0001", revision)  # type: ignore[arg-type]

    with EnvironmentContext(Config(), scripts, fn=steps) as environment:
        environment.configure(connection=connection)
        environment.run_migrations()


async def _first_schema(url: str, *keys: tuple[str, str, str, float, float | None]) -> None:
    """Of (id, secret, tenant, created, revoked)."""
    target = database_module._parse(url)
    engine = database_module._engine(target)
    async with engine.begin() as connection:
        await connection.run_sync(_upgrade_to_0001)
        for key_id, secret, tenant, created_at_s, revoked_at_s in keys:
            await connection.execute(
                text(
                    "INSERT INTO api_keys (id, sha256, prefix, tenant, name, created_at_s,"
                    " revoked_at_s) VALUES (:id, :sha256, 'sk-em-abcd', :tenant, 'n', :at, :end)"
                ),
                {
                    "id": key_id,
                    "sha256": hash_secret(secret),
                    "tenant": tenant,
                    "at": created_at_s,
                    "end": revoked_at_s,
                },
            )
    await engine.dispose()


async def test_keys_of_the_first_schema_go_on_working(url: str) -> None:
    await _first_schema(
        url,
        ("key_1", "one", "acme", NOW_S + 5, None),
        ("key_2", "two", "acme", NOW_S + 1, None),
        ("key_3", "three", "zoo", NOW_S, NOW_S + 9),
    )
    database = await open_database(url, create=False)
    book, tenants = KeyBook(database), TenantBook(database)
    assert await book.active(NOW_S + 10) == {
        hash_secret("one"): Caller("key_1", "acme"),
        hash_secret("two"): Caller("key_2", "acme"),
    }
    for record in await book.list():
        assert (record.models, record.admin, record.limits) == (None, False, Limits())
    assert [(known.tenant, known.created_at_s) for known in await tenants.list()] == [
        (Tenant("acme"), NOW_S + 1),
        (Tenant("zoo"), NOW_S),
    ]

    version = await book.version()
    await book.revoke("key_1", NOW_S + 11)
    assert await book.changed(version, NOW_S + 12) == {hash_secret("one"): None}
    await tenants.disable("acme", NOW_S + 13)
    assert await book.active(NOW_S + 14) == {}
    await database.close()


async def test_an_empty_first_schema_is_upgraded_and_the_rest_is_kept(url: str) -> None:
    await _first_schema(url)
    database = await open_database(url)
    assert await Ledger(database).add_usage([usage_record()]) == 1
    assert await TenantBook(database).list() == ()
    key = await KeyBook(database).create("acme", "", NOW_S)
    assert list((await KeyBook(database).active(NOW_S)).values()) == [Caller(key.id, "acme")]
    await database.close()


async def test_a_key_written_without_a_tenant_row_works_with_the_defaults(url: str) -> None:
    """As a process that runs the first version while the database is upgraded writes it."""
    database = await open_database(url)
    async with database.writing() as connection:
        await connection.execute(
            text(
                "INSERT INTO api_keys (id, sha256, prefix, tenant, name, created_at_s) "
                f"VALUES ('key_1', '{hash_secret('one')}', 'sk-em-abcd', 'acme', '', 1.0)"
            )
        )
    active = await KeyBook(database).active(NOW_S)
    assert active == {hash_secret("one"): Caller("key_1", "acme")}
    await database.close()


_AMOUNTS = ("0.1", "123456789012345678901234567890.123456789", "1E-40")
_FIRST_HOLDS = (
    ("'em-m-p-1', 1000.0, 'm', 'p', {}, 4600.0, 4600.0", "0.30000000000000004"),
    ("'em-m-p-2', 2000.5, 'm', 'p', {}, 2600.25, NULL", "12345.678901234567"),
)
"""Group, start, model, pool, price, last seen and end."""


async def test_the_ledger_of_the_first_schema_keeps_every_digit(url: str) -> None:
    await _first_schema(url)
    await _first_ledger(url)
    database = await open_database(url, create=False)
    ledger = Ledger(database)
    usage = await ledger.usage()
    assert [record.tariff_usd for record in usage] == [Decimal(amount) for amount in _AMOUNTS]
    assert usage[0] == usage_record(
        "r0", 1000.0, model="m", group="em-m-p-1", pool="p", tariff_usd=Decimal("0.1")
    )
    first, second = await ledger.capacity()
    assert (first.usd_per_hour, second.usd_per_hour) == (0.30000000000000004, 12345.678901234567)
    # Nobody noted when they were ready: what they did not serve is idle time, as it was.
    assert (first.ready_at_s, second.ready_at_s) == (1000.0, 2000.5)
    assert (second.ended_at_s, second.draining_at_s, second.decode_tokens_per_s) == (None,) * 3
    total = (await usage_report(ledger, By.MODEL)).total
    assert (total.starting_nano_usd, total.draining_nano_usd, total.idle_nodes_nano_usd) == (0,) * 3
    price = Fraction("0.30000000000000004") * 3600 + Fraction("12345.678901234567") * (
        Fraction(2600.25) - Fraction(2000.5)
    )
    assert abs(total.capacity_nano_usd - price * 10**9 / 3600) <= 2
    # The open hold goes on under the new schema.
    await ledger.hold_capacity([replace(second, seen_at_s=3000.0)])
    assert (await ledger.capacity())[1].seen_at_s == 3000.0
    await database.close()


async def _first_ledger(url: str) -> None:
    engine = database_module._engine(database_module._parse(url))
    exact = "{!r}" if engine.dialect.name == "sqlite" else "{}"
    async with engine.begin() as connection:
        for number, amount in enumerate(_AMOUNTS):
            await connection.execute(
                text(
                    f"INSERT INTO usage_records VALUES ('r{number}', {1000.0 + number}, "
                    f"{1001.0 + number}, 'acme', 'key_1', 'm', 'em-m-p-1', 'p', "
                    "'/v1/chat/completions', 'ok', 100, 40, 20, 0.0, 0.25, 1.0, "
                    f"{exact.format(amount)})"
                )
            )
        for row, price in _FIRST_HOLDS:
            await connection.execute(
                text(f"INSERT INTO capacity_holds VALUES ({row.format(exact.format(price))})")
            )
    await engine.dispose()
