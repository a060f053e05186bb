from tests.store.records import NOON_S, usage_record

from expertmesh.core.scaling.hindsight import Served
from expertmesh.store.database import Database
from expertmesh.store.ledger import Ledger
from expertmesh.store.served_work import served_work


async def test_work_is_counted_in_the_minute_in_which_it_came(database: Database) -> None:
    await Ledger(database).add_usage(
        [
            usage_record("before", NOON_S - 0.001),
            usage_record("first", NOON_S, duration_s=3.0, queue_s=1.0),
            usage_record("late in it", NOON_S + 59.999),
            usage_record("next", NOON_S + 60.0, completion_tokens=7),
            usage_record("two hours on", NOON_S + 7200.0),
            usage_record("elsewhere", NOON_S + 60.0, pool="provider", model="other"),
            usage_record("at the end", NOON_S + 7260.0),
        ]
    )
    found = await served_work(database, NOON_S, NOON_S + 7260.0, 60.0)
    assert found == {
        ("tiny-moe", "cpu", 0): Served(2.0, 120.0, 40.0, 3.0),
        ("tiny-moe", "cpu", 1): Served(1.0, 60.0, 7.0, 1.0),
        ("tiny-moe", "cpu", 120): Served(1.0, 60.0, 20.0, 1.0),
        ("other", "provider", 1): Served(1.0, 60.0, 20.0, 1.0),
    }


async def test_an_hour_that_ends_within_a_minute_is_not_counted_twice(database: Database) -> None:
    await Ledger(database).add_usage(
        [usage_record(str(second), NOON_S + second) for second in range(3500, 3700, 10)]
    )
    found = await served_work(database, NOON_S, NOON_S + 7000.0, 70.0)
    assert sum(each.requests for each in found.values()) == 20
    assert set(found) == {("tiny-moe", "cpu", number) for number in (50, 51, 52)}


async def test_nothing_in_the_ledger_is_no_work(database: Database) -> None:
    assert await served_work(database, NOON_S, NOON_S + 60.0, 60.0) == {}
    assert await served_work(database, NOON_S, NOON_S, 60.0) == {}
