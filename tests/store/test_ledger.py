import struct
from dataclasses import replace
from decimal import Decimal
from random import Random
from typing import Any

import msgspec
import pytest
from tests.store.records import NOON_S, capacity_hold, node_hold, usage_record

from expertmesh.core.metering.providers import ProviderTariff
from expertmesh.core.metering.usage import Outcome
from expertmesh.errors import UpstreamUnavailable
from expertmesh.store.database import Database
from expertmesh.store.ledger import Ledger
from expertmesh.store.usage_rows import MOST_ROWS


async def test_a_record_comes_back_as_it_was(database: Database) -> None:
    record = usage_record(outcome=Outcome.ABORTED, ttft_s=None, queue_s=0.1, duration_s=0.30000001)
    ledger = Ledger(database)
    assert await ledger.add_usage([record]) == 1
    assert await ledger.usage() == (record,)


@pytest.mark.parametrize(
    "amount",
    [
        "0",
        "0.1",
        "0.0000000000000000000000001",
        "123456789012345678901234567890.123456789",
        "1E-40",
    ],
)
async def test_money_comes_back_to_the_last_digit(database: Database, amount: str) -> None:
    ledger = Ledger(database)
    await ledger.add_usage([usage_record(tariff_usd=Decimal(amount))])
    (record,) = await ledger.usage()
    assert record.tariff_usd == Decimal(amount)


@pytest.mark.parametrize("amount", [0.1, Decimal("NaN"), Decimal("Infinity")])
async def test_money_that_is_not_exact_is_refused_with_its_whole_batch(
    database: Database, amount: Decimal
) -> None:
    ledger = Ledger(database)
    with pytest.raises(Exception, match="exact amount must be a finite Decimal"):
        await ledger.add_usage([usage_record("good"), usage_record("bad", tariff_usd=amount)])
    assert await ledger.usage() == ()


async def test_only_new_ids_are_added_and_the_first_record_of_an_id_stays(
    database: Database,
) -> None:
    ledger = Ledger(database)
    first = usage_record("a", completion_tokens=1)
    assert await ledger.add_usage([first, usage_record("a", completion_tokens=2)]) == 1
    other = msgspec.structs.replace(first, tenant="other")
    assert await ledger.add_usage([other, usage_record("b")]) == 1
    assert await ledger.add_usage([first, usage_record("b")]) == 0
    assert [record.request_id for record in await ledger.usage()] == ["a", "b"]
    assert (await ledger.usage())[0] == first


async def test_an_empty_batch_is_no_work(database: Database) -> None:
    assert await Ledger(database).add_usage([]) == 0


@pytest.mark.parametrize(
    "count", [1, 2, 3, MOST_ROWS - 1, MOST_ROWS, MOST_ROWS + 1, 11 * MOST_ROWS + 77]
)
async def test_a_batch_of_any_size_arrives_whole(database: Database, count: int) -> None:
    ledger = Ledger(database)
    records = [usage_record(f"r{number:05}", NOON_S + number) for number in range(count)]
    assert await ledger.add_usage(records[: count // 2]) == count // 2
    assert await ledger.add_usage(records) == count - count // 2
    assert await ledger.usage() == tuple(records)


async def test_the_first_of_an_id_stays_wherever_in_a_batch_the_others_are(
    database: Database,
) -> None:
    ledger = Ledger(database)
    records = [usage_record(f"r{number:05}", NOON_S + number) for number in range(MOST_ROWS)]
    again = [msgspec.structs.replace(record, tenant="other") for record in reversed(records)]
    assert await ledger.add_usage([*records, *again, *records]) == MOST_ROWS
    assert await ledger.usage() == tuple(records)


@pytest.mark.parametrize("at", [0, MOST_ROWS - 1, 2 * MOST_ROWS + 5])
@pytest.mark.parametrize(
    "fault", [{"prompt_tokens": 2**63}, {"model": None}, {"tariff_usd": Decimal("NaN")}]
)
async def test_one_bad_row_takes_its_whole_batch_with_it(
    database: Database, at: int, fault: dict[str, Any]
) -> None:
    ledger = Ledger(database)
    await ledger.add_usage([usage_record("before", NOON_S - 1)])
    records = [usage_record(f"r{number:05}") for number in range(3 * MOST_ROWS)]
    records[at] = msgspec.structs.replace(records[at], **fault)
    with pytest.raises(Exception) as refusal:
        await ledger.add_usage(records)
    assert not isinstance(refusal.value, UpstreamUnavailable)
    assert await ledger.usage() == (usage_record("before", NOON_S - 1),)
    del records[at]
    assert await ledger.add_usage(records) == len(records)


async def test_every_value_comes_back_as_it_was(database: Database) -> None:
    records = (
        usage_record("a", 0.1 + 0.2, tenant="tänt'); --", model='"$1"?', queue_s=5e-324),
        usage_record("b", 1e9 + 1e-7, group="", ttft_s=None, prompt_tokens=2**63 - 1),
        usage_record("c", 1e300, duration_s=2**-1074, pool="%s {0} :name \\"),
        *(
            usage_record(f"d{n}", 1.7976931348623157e308, outcome=outcome)
            for n, outcome in enumerate(Outcome)
        ),
    )
    ledger = Ledger(database)
    assert await ledger.add_usage(records) == len(records)
    assert await ledger.usage() == records


async def test_no_bit_of_a_number_is_lost(database: Database) -> None:
    random = Random(7)
    records = []
    for number in range(2 * MOST_ROWS):
        (seconds,) = struct.unpack("=d", random.randbytes(7) + bytes([random.randrange(0x7F)]))
        digits = Decimal(random.randrange(10**40)).scaleb(-random.randrange(60))
        records.append(usage_record(f"r{number:05}", queue_s=seconds, tariff_usd=digits))
    ledger = Ledger(database)
    await ledger.add_usage(records)
    assert await ledger.usage() == tuple(records)


async def test_usage_is_read_by_the_time_of_acceptance_and_in_its_order(database: Database) -> None:
    ledger = Ledger(database)
    await ledger.add_usage([usage_record(name, NOON_S + at) for name, at in (("c", 3), ("a", 1))])
    await ledger.add_usage([usage_record("b", NOON_S + 2)])

    async def ids(since_s: float | None = None, until_s: float | None = None) -> str:
        return "".join(record.request_id for record in await ledger.usage(since_s, until_s))

    assert await ids() == "abc"
    assert await ids(since_s=NOON_S + 2) == "bc"
    assert await ids(until_s=NOON_S + 2) == "a"
    assert await ids(NOON_S + 1, NOON_S + 3) == "ab"


async def test_requests_across_a_moment_began_before_and_end_after_it(database: Database) -> None:
    ledger = Ledger(database)
    await ledger.add_usage(
        [
            usage_record("long", NOON_S, duration_s=100),
            usage_record("short", NOON_S, duration_s=50),
            usage_record("later", NOON_S + 50, duration_s=50),
        ]
    )
    found = await ledger.usage_across(NOON_S + 50)
    assert [record.request_id for record in found] == ["long"]


async def test_a_hold_is_extended_until_it_ends_and_then_stays(database: Database) -> None:
    ledger = Ledger(database)
    hold = capacity_hold(usd_per_hour=0.1)
    await ledger.hold_capacity([hold])
    await ledger.hold_capacity([replace(hold, seen_at_s=NOON_S + 90)])
    assert await ledger.capacity() == (replace(hold, seen_at_s=NOON_S + 90),)

    await ledger.hold_capacity([replace(hold, seen_at_s=NOON_S + 30)])
    assert (await ledger.capacity())[0].seen_at_s == NOON_S + 90

    ended = replace(hold, seen_at_s=NOON_S + 95, ended_at_s=NOON_S + 95)
    await ledger.hold_capacity([ended])
    await ledger.hold_capacity([replace(hold, seen_at_s=NOON_S + 200)])
    assert await ledger.capacity() == (ended,)


async def test_a_name_that_comes_back_gets_a_hold_of_its_own(database: Database) -> None:
    ledger = Ledger(database)
    first = capacity_hold(ended_at_s=NOON_S + 60)
    second = capacity_hold(started_at_s=NOON_S + 100, seen_at_s=NOON_S + 120)
    await ledger.hold_capacity([first])
    await ledger.hold_capacity([second])
    assert await ledger.capacity() == (first, second)


async def test_an_open_hold_of_a_lost_controller_ends_where_it_was_last_seen(
    database: Database,
) -> None:
    ledger = Ledger(database)
    stale = capacity_hold(seen_at_s=NOON_S + 60)
    fresh = capacity_hold(started_at_s=NOON_S + 100, seen_at_s=NOON_S + 120)
    await ledger.hold_capacity([stale])
    await ledger.hold_capacity([fresh])
    assert await ledger.capacity() == (replace(stale, ended_at_s=NOON_S + 60), fresh)


async def test_a_start_within_an_open_hold_continues_it(database: Database) -> None:
    ledger = Ledger(database)
    hold = capacity_hold(seen_at_s=NOON_S + 60)
    await ledger.hold_capacity([hold])
    await ledger.hold_capacity([capacity_hold(started_at_s=NOON_S + 50, seen_at_s=NOON_S + 70)])
    assert await ledger.capacity() == (replace(hold, seen_at_s=NOON_S + 70),)


@pytest.mark.parametrize("usd_per_hour", [0.1, 0.30000000000000004, 1e-9, 12345.678901234567])
async def test_a_price_comes_back_as_it_was(database: Database, usd_per_hour: float) -> None:
    ledger = Ledger(database)
    await ledger.hold_capacity([capacity_hold(usd_per_hour=usd_per_hour)])
    assert (await ledger.capacity())[0].usd_per_hour == usd_per_hour


async def test_a_bad_hold_takes_its_whole_batch_with_it(database: Database) -> None:
    ledger = Ledger(database)
    with pytest.raises(ValueError, match="finite"):
        await ledger.hold_capacity(
            [capacity_hold("good"), capacity_hold("bad", usd_per_hour=float("nan"))]
        )
    assert await ledger.capacity() == ()


async def test_capacity_is_read_by_overlap(database: Database) -> None:
    ledger = Ledger(database)
    early = capacity_hold("early", NOON_S, NOON_S + 10, NOON_S + 10)
    late = capacity_hold("late", NOON_S + 20, NOON_S + 30)
    await ledger.hold_capacity([late, early])
    assert await ledger.capacity() == (early, late)
    assert await ledger.capacity(since_s=NOON_S + 15) == (late,)
    assert await ledger.capacity(until_s=NOON_S + 20) == (early,)
    assert await ledger.capacity(NOON_S + 5, NOON_S + 25) == (early, late)


async def test_the_span_covers_usage_and_capacity(database: Database) -> None:
    ledger = Ledger(database)
    assert await ledger.span_s() is None
    await ledger.add_usage([usage_record(at_s=NOON_S + 10, duration_s=5)])
    assert await ledger.span_s() == (NOON_S + 10, NOON_S + 15)
    await ledger.hold_capacity([capacity_hold(seen_at_s=NOON_S + 12)])
    assert await ledger.span_s() == (NOON_S, NOON_S + 15)


async def test_states_rates_and_draw_come_back_as_they_were(database: Database) -> None:
    ledger = Ledger(database)
    hold = capacity_hold(
        start_s=12.5, draining_at_s=NOON_S + 50, tokens_per_s=(1e4, 0.1 + 0.2), watts=(105.0, 581.0)
    )
    bare = capacity_hold("other", start_s=None)
    await ledger.hold_capacity([hold, bare])
    assert await ledger.capacity() == (hold, bare)


async def test_what_is_known_of_a_hold_stays_and_draining_can_be_taken_back(
    database: Database,
) -> None:
    ledger = Ledger(database)
    await ledger.hold_capacity([capacity_hold(start_s=None, draining_at_s=NOON_S + 9)])
    await ledger.hold_capacity([capacity_hold(start_s=20, tokens_per_s=(1, 2), watts=(3, 4))])
    await ledger.hold_capacity([capacity_hold(start_s=40, tokens_per_s=(5, 6), watts=(7, 8))])
    await ledger.hold_capacity([capacity_hold(start_s=None)])
    assert await ledger.capacity() == (
        capacity_hold(start_s=20, tokens_per_s=(1, 2), watts=(3, 4)),
    )


async def test_a_node_that_is_seen_again_was_there_in_between(database: Database) -> None:
    ledger = Ledger(database)
    node = node_hold(idle_watts=105.0, usd_per_hour=0.1)
    await ledger.hold_capacity([], [node])
    again = node_hold(started_at_s=NOON_S + 900, seen_at_s=NOON_S + 950, usd_per_hour=0.1)
    await ledger.hold_capacity([], [again])
    whole = replace(node, seen_at_s=NOON_S + 950)
    assert await ledger.nodes() == await ledger.open_nodes() == (whole,)

    ended = replace(again, seen_at_s=NOON_S + 960, ended_at_s=NOON_S + 960)
    await ledger.hold_capacity([], [ended])
    assert await ledger.nodes() == (
        replace(whole, seen_at_s=NOON_S + 960, ended_at_s=NOON_S + 960),
    )
    assert await ledger.open_nodes() == ()
    # In one batch: the end of one hold and the start of the next.
    price = node_hold(started_at_s=NOON_S + 960, seen_at_s=NOON_S + 970, usd_per_hour=0.2)
    await ledger.hold_capacity([], [ended, price])
    assert [node.usd_per_hour for node in await ledger.nodes()] == [0.1, 0.2]
    assert await ledger.nodes(since_s=NOON_S + 965) == (price,)
    assert await ledger.span_s() == (NOON_S, NOON_S + 970)


async def test_nodes_of_one_id_in_two_pools_are_two(database: Database) -> None:
    ledger = Ledger(database)
    await ledger.hold_capacity([], [node_hold(pool="a"), node_hold(pool="b")])
    assert [node.pool for node in await ledger.nodes()] == ["a", "b"]


async def test_a_bad_node_takes_its_whole_batch_with_it(database: Database) -> None:
    ledger = Ledger(database)
    with pytest.raises(ValueError, match="finite"):
        await ledger.hold_capacity([capacity_hold()], [node_hold(usd_per_hour=float("inf"))])
    assert (await ledger.capacity(), await ledger.nodes()) == ((), ())


async def test_tariffs_of_providers_are_added_only_when_they_change(database: Database) -> None:
    ledger = Ledger(database)
    first = ProviderTariff("m", "api", NOON_S, 0.1, 0.05, 0.30000000000000004)
    other = ProviderTariff("n", "api", NOON_S, 1.0, 1.0, 1.0)
    await ledger.set_provider_tariffs([first, other])
    await ledger.set_provider_tariffs([replace(first, since_s=NOON_S + 5)])
    assert await ledger.provider_tariffs() == (first, other)
    dearer = replace(first, since_s=NOON_S + 9, usd_per_mtok_in=0.2)
    await ledger.set_provider_tariffs([dearer])
    # By a controller whose clock is behind: the newest stays.
    await ledger.set_provider_tariffs([replace(first, since_s=NOON_S + 9)])
    assert await ledger.provider_tariffs() == (first, other, dearer)


async def test_an_end_that_comes_again_under_another_start_counts_once(database: Database) -> None:
    """From a controller that was not told that the ledger had taken it."""
    ledger = Ledger(database)
    await ledger.hold_capacity([capacity_hold()], [node_hold()])
    group = capacity_hold(
        started_at_s=NOON_S + 30, seen_at_s=NOON_S + 90, ended_at_s=NOON_S + 90, start_s=None
    )
    node = node_hold(started_at_s=NOON_S + 70, seen_at_s=NOON_S + 90, ended_at_s=NOON_S + 90)
    for _ in range(3):
        await ledger.hold_capacity([group], [node])
    assert await ledger.capacity() == (
        replace(capacity_hold(), seen_at_s=NOON_S + 90, ended_at_s=NOON_S + 90),
    )
    assert await ledger.nodes() == (
        replace(node_hold(), seen_at_s=NOON_S + 90, ended_at_s=NOON_S + 90),
    )


async def test_a_hold_that_began_before_the_last_one_ended_counts_from_there(
    database: Database,
) -> None:
    ledger = Ledger(database)
    ended = NOON_S + 60
    await ledger.hold_capacity([capacity_hold(ended_at_s=ended)], [node_hold(ended_at_s=ended)])
    late = NOON_S + 40
    await ledger.hold_capacity(
        [capacity_hold(started_at_s=late, seen_at_s=NOON_S + 80)],
        [node_hold(started_at_s=late, seen_at_s=NOON_S + 80)],
    )
    assert [hold.started_at_s for hold in await ledger.capacity()] == [NOON_S, ended]
    assert [node.started_at_s for node in await ledger.nodes()] == [NOON_S, ended]
