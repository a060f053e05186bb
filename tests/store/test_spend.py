from datetime import UTC, datetime
from decimal import Decimal

import msgspec
from tests.store.records import usage_record

from expertmesh.store.database import Database
from expertmesh.store.ledger import Ledger
from expertmesh.store.spend import LedgerSpend

DAY_S = datetime(2026, 1, 31, tzinfo=UTC).timestamp()
MONTH_S = datetime(2026, 1, 1, tzinfo=UTC).timestamp()


async def test_an_empty_ledger_has_spent_nothing(database: Database) -> None:
    assert await LedgerSpend(database).spend(DAY_S, MONTH_S) == {}


async def test_spend_is_by_tenant_and_key_of_the_day_and_the_month(database: Database) -> None:
    rows = [
        # Name, tenant, key, accepted, USD.
        ("before", "acme", "k1", MONTH_S - 0.001, "100"),
        ("first", "acme", "k1", MONTH_S, "1"),
        ("yesterday", "acme", "k2", DAY_S - 0.001, "0.2"),
        ("today-1", "acme", "k1", DAY_S, "0.03"),
        ("today-2", "acme", "k2", DAY_S + 1, "0.03"),
        ("other", "beta", "k3", DAY_S + 2, "0.5"),
        ("old", "gone", "k4", MONTH_S + 1, "7"),
    ]
    await Ledger(database).add_usage(
        [
            msgspec.structs.replace(
                usage_record(name, at_s, tenant=tenant, tariff_usd=Decimal(usd)), key_id=key_id
            )
            for name, tenant, key_id, at_s, usd in rows
        ]
    )
    assert await LedgerSpend(database).spend(DAY_S, MONTH_S) == {
        "tenant:acme": (60_000_000_000, 1_260_000_000_000),
        "key:k1": (30_000_000_000, 1_030_000_000_000),
        "key:k2": (30_000_000_000, 230_000_000_000),
        "tenant:beta": (500_000_000_000, 500_000_000_000),
        "key:k3": (500_000_000_000, 500_000_000_000),
        "tenant:gone": (0, 7_000_000_000_000),
        "key:k4": (0, 7_000_000_000_000),
    }


async def test_sums_are_exact_and_only_the_last_one_is_rounded_up(database: Database) -> None:
    amounts = ["0.1"] * 3 + ["1E-13"] * 11 + ["123456789012345678.9"]
    await Ledger(database).add_usage(
        [
            usage_record(f"r{number}", DAY_S, tariff_usd=Decimal(amount))
            for number, amount in enumerate(amounts)
        ]
    )
    spent = (await LedgerSpend(database).spend(DAY_S, MONTH_S))["tenant:acme"]
    assert spent == (123_456_789_012_345_679_200_000_000_002,) * 2
