import asyncio
import subprocess
import sys
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import text
from tests.store.records import NOON_S, usage_record

from expertmesh.core.domain.tenant import Limits, Priority, Tenant
from expertmesh.errors import SetupError
from expertmesh.store.database import Database, open_database
from expertmesh.store.keys import KeyBook
from expertmesh.store.ledger import Ledger
from expertmesh.store.tenants import InvalidField, TenantBook, Used

NOW_S = 1_767_268_800.0
EVERYTHING = Limits(1, 2, 3, 0.1, 1234.56)
_DAY_S = 86_400


async def test_a_tenant_comes_back_as_it_was_put(database: Database) -> None:
    book = TenantBook(database)
    tenant = Tenant("acme", Priority.BATCH, 0.25, EVERYTHING)
    record, is_new = await book.put(tenant, NOW_S)
    assert is_new
    assert (record.tenant, record.created_at_s, record.disabled_at_s) == (tenant, NOW_S, None)
    assert await book.get("acme") == record
    assert await book.get("nobody") is None


async def test_putting_again_replaces_settings_and_keeps_the_rest(database: Database) -> None:
    book = TenantBook(database)
    await book.put(Tenant("acme", limits=EVERYTHING), NOW_S)
    await book.disable("acme", NOW_S + 1)
    record, is_new = await book.put(Tenant("acme", weight=3.0), NOW_S + 2)
    assert not is_new
    assert record == await book.get("acme")
    assert (record.tenant, record.created_at_s) == (Tenant("acme", weight=3.0), NOW_S)
    assert record.disabled_at_s == NOW_S + 1


async def test_a_change_sees_what_is_there(database: Database) -> None:
    book = TenantBook(database)
    await book.put(Tenant("acme", limits=EVERYTHING), NOW_S)

    def edit(tenant: Tenant) -> Tenant:
        return replace(tenant, name="other", limits=replace(tenant.limits, usd_per_day=None))

    record = await book.change("acme", edit)
    assert record == await book.get("acme")
    assert record is not None
    assert record.tenant == Tenant("acme", limits=replace(EVERYTHING, usd_per_day=None))
    assert await book.change("nobody", edit) is None
    assert [known.tenant.name for known in await book.list()] == ["acme"]


async def test_changes_at_once_are_all_kept(database: Database) -> None:
    book = TenantBook(database)
    await book.put(Tenant("acme", limits=Limits(requests_per_min=1)), NOW_S)

    def one_more(tenant: Tenant) -> Tenant:
        limits = Limits(requests_per_min=(tenant.limits.requests_per_min or 0) + 1)
        return replace(tenant, limits=limits)

    await asyncio.gather(*(book.change("acme", one_more) for _ in range(10)))
    record = await book.get("acme")
    assert record is not None and record.tenant.limits.requests_per_min == 11


async def test_keys_for_a_new_tenant_created_at_once_make_one_tenant(database: Database) -> None:
    keys = KeyBook(database)
    await asyncio.gather(*(keys.create("acme", "", NOW_S) for _ in range(5)))
    assert len(await keys.list()) == 5
    assert len(await TenantBook(database).list()) == 1


async def test_disabling_again_keeps_the_first_moment(database: Database) -> None:
    book = TenantBook(database)
    await book.put(Tenant("acme"), NOW_S)
    first = await book.disable("acme", NOW_S + 1)
    assert first is not None and first.disabled_at_s == NOW_S + 1
    assert await book.disable("acme", NOW_S + 9) == first
    enabled = await book.enable("acme")
    assert enabled is not None and enabled.disabled_at_s is None
    assert await book.enable("acme") == enabled == await book.get("acme")
    assert await book.disable("nobody", NOW_S) is None
    assert await book.enable("nobody") is None


async def test_the_list_is_in_order_of_names_page_by_page(database: Database) -> None:
    book = TenantBook(database)
    for name in ("zoo", "acme", "b-2", "b"):
        await book.put(Tenant(name), NOW_S)
    names = [record.tenant.name for record in await book.list()]
    assert sorted(names) == sorted(("acme", "b", "b-2", "zoo")) and names[0] == "acme"
    first = [record.tenant.name for record in await book.list(limit=2)]
    rest = [record.tenant.name for record in await book.list(after=first[-1])]
    assert first + rest == names


@pytest.mark.parametrize(
    ("tenant", "field"),
    [
        (Tenant("Acme"), "name"),
        (Tenant(""), "name"),
        (Tenant("a" * 41), "name"),
        (Tenant("acme", weight=0.0), "weight"),
        (Tenant("acme", weight=-1.0), "weight"),
        (Tenant("acme", weight=1000.5), "weight"),
        (Tenant("acme", weight=float("nan")), "weight"),
        (Tenant("acme", limits=Limits(requests_per_min=0)), "limits.requests_per_min"),
        (Tenant("acme", limits=Limits(usd_per_month=-0.01)), "limits.usd_per_month"),
    ],
)
async def test_bad_settings_are_refused_and_nothing_stored(
    database: Database, tenant: Tenant, field: str
) -> None:
    book = TenantBook(database)
    with pytest.raises(SetupError) as refusal:
        await book.put(tenant, NOW_S)
    assert isinstance(refusal.value, InvalidField)
    assert refusal.value.field == field
    assert await book.list() == ()


async def test_a_bad_change_is_refused_and_changes_nothing(database: Database) -> None:
    book = TenantBook(database)
    await book.put(Tenant("acme"), NOW_S)
    with pytest.raises(InvalidField, match=r"^weight: 0: use a number above 0, at most 1000"):
        await book.change("acme", lambda tenant: replace(tenant, weight=0))
    record = await book.get("acme")
    assert record is not None and record.tenant == Tenant("acme")


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(usd=st.floats(min_value=0, max_value=10**9, exclude_min=True))
async def test_money_limits_keep_every_digit(database: Database, usd: float) -> None:
    book = TenantBook(database)
    record, _ = await book.put(Tenant("acme", limits=Limits(usd_per_day=usd)), NOW_S)
    assert await book.get("acme") == record
    async with database.reading() as connection:
        stored = await connection.scalar(text("SELECT usd_per_day FROM tenants"))
    assert Decimal(stored) == Decimal(repr(usd))


async def test_use_is_that_of_the_utc_day_and_month(database: Database) -> None:
    # Noon of the 15th; the ledger's exact prices must not be rounded by the sum.
    now_s = NOON_S + 14 * _DAY_S
    midnight_s = now_s - _DAY_S / 2
    tiny, large = Decimal("0.0000000000000000000000000001"), Decimal("12345678.9")
    await Ledger(database).add_usage(
        [
            usage_record("today-1", midnight_s, tariff_usd=tiny),
            usage_record("today-2", now_s, tariff_usd=large),
            usage_record("yesterday", midnight_s - 0.001, tariff_usd=Decimal(2)),
            usage_record("first-of-month", NOON_S - _DAY_S / 2, tariff_usd=Decimal(3)),
            usage_record("last-month", NOON_S - _DAY_S / 2 - 0.001, tariff_usd=Decimal(5)),
            usage_record("of-another", now_s, tenant="zoo", tariff_usd=Decimal(7)),
        ]
    )
    use = await TenantBook(database).used("acme", now_s)
    assert (use.day_start_s, use.month_start_s) == (midnight_s, NOON_S - _DAY_S / 2)
    assert use.day == Used(2, 240, Decimal("12345678.9000000000000000000000000001"))
    assert use.month == Used(4, 480, Decimal("12345683.9000000000000000000000000001"))
    nobody = await TenantBook(database).used("nobody", now_s)
    assert (nobody.day, nobody.month) == (Used(), Used())


_CHANGE_TENANTS = """
import asyncio, sys
from dataclasses import replace
sys.path[:0] = [{platform!r}]
from expertmesh.core.domain.tenant import Limits, Tenant
from expertmesh.store.database import open_database
from expertmesh.store.keys import KeyBook
from expertmesh.store.tenants import TenantBook

def one_more(tenant):
    return replace(tenant, limits=Limits((tenant.limits.requests_per_min or 0) + 1))

async def main(url):
    database = await open_database(url)
    for _ in range(20):
        await TenantBook(database).change("acme", one_more)
        await KeyBook(database).create("acme", "", 1.0)
    await database.close()

asyncio.run(main(sys.argv[1]))
"""


async def test_processes_that_change_together_lose_nothing(url: str) -> None:
    database = await open_database(url)
    await TenantBook(database).put(Tenant("acme"), NOW_S)
    before = await KeyBook(database).version()
    program = _CHANGE_TENANTS.format(platform=str(Path(__file__).parents[2] / "platform"))
    processes = [
        await asyncio.create_subprocess_exec(
            sys.executable, "-c", program, url, stderr=subprocess.PIPE
        )
        for _ in range(3)
    ]
    for process in processes:
        _, errors = await asyncio.wait_for(process.communicate(), timeout=60)
        assert (process.returncode, errors) == (0, b"")
    record = await TenantBook(database).get("acme")
    assert record is not None and record.tenant.limits.requests_per_min == 60
    assert len(await KeyBook(database).list()) == 60
    assert await KeyBook(database).version() == before + 120
    await database.close()
