"""Who gets what: bounds that always hold, over many bids, and the rules by example."""

from collections.abc import Sequence
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st
from tests.core.scaling.world import World, config, pool

from expertmesh.core.domain.deployment import ScalingMode
from expertmesh.core.scaling.allocation import Ask, Bid, Place, allocate, bid_of
from expertmesh.core.scaling.contract import Grant

POOLS = {"a": 8, "b": 6, "c": 4}
USD_A_WORKER = {"a": 1.0, "b": 2.0, "c": 0.0}


def there(pool: str, workers: int = 2, value: float = 10.0, *, fixed: bool = False) -> Ask:
    return Ask((place(pool, workers, value),), is_there=True, is_fixed=fixed)


def new(*pools: str, workers: int = 2, value: float = 10.0) -> Ask:
    return Ask(tuple(place(pool, workers, value) for pool in pools), is_there=False)


def place(pool: str, workers: int, value: float) -> Place:
    return Place(pool, workers, USD_A_WORKER[pool] * workers, value)


def bid(model: str, *asks: Ask, priority: int = 0) -> Bid:
    """It starts what is new at its first place."""
    there_workers: dict[str, int] = {}
    starts: dict[str, int] = {}
    for ask in asks:
        first = ask.places[0]
        counts = there_workers if ask.is_there else starts
        counts[first.pool] = counts.get(first.pool, 0) + first.workers
    return Bid(
        model=model,
        priority=priority,
        asks=asks,
        pools=tuple(POOLS),
        there_workers=there_workers,
        there_usd_per_hour=sum(a.places[0].usd_per_hour for a in asks if a.is_there),
        starts_workers=starts,
        starts_usd_per_hour=sum(a.places[0].usd_per_hour for a in asks if not a.is_there),
    )


@st.composite
def markets(draw: st.DrawFn) -> tuple[list[Bid], float | None]:
    """Models whose groups are within the pools; they want more of them."""
    room = dict(POOLS)
    bids = []
    for number in range(draw(st.integers(1, 5))):
        asks = []
        for _ in range(draw(st.integers(0, 4))):
            name = draw(st.sampled_from(sorted(POOLS)))
            workers = draw(st.integers(1, 3))
            value = draw(st.floats(0.1, 100.0))
            if draw(st.booleans()) and room[name] >= workers:
                room[name] -= workers
                asks.append(there(name, workers, value, fixed=draw(st.booleans())))
            else:
                others = draw(st.lists(st.sampled_from(sorted(POOLS)), max_size=2))
                asks.append(new(name, *others, workers=workers, value=value))
        bids.append(bid(f"m{number}", *asks, priority=draw(st.integers(0, 2))))
    spent = sum(each.there_usd_per_hour for each in bids)
    budget = draw(st.none() | st.floats(0.0, 30.0).map(lambda more: spent + more))
    return bids, budget


def starts(each: Bid, grant: Grant | None, name: str) -> int:
    """Workers that the model may start at once."""
    if grant is None:
        return each.starts_workers.get(name, 0)
    return max(0, grant.workers.get(name, 0) - each.there_workers.get(name, 0))


@settings(max_examples=400, deadline=None)
@given(markets())
def test_never_above_the_room_of_a_pool(market: tuple[list[Bid], float | None]) -> None:
    bids, budget = market
    grants = allocate(bids, POOLS, budget)
    for name, limit in POOLS.items():
        held = sum(each.there_workers.get(name, 0) for each in bids)
        assert held + sum(starts(each, grants[each.model], name) for each in bids) <= limit


@settings(max_examples=400, deadline=None)
@given(markets())
def test_never_above_the_budget(market: tuple[list[Bid], float | None]) -> None:
    bids, budget = market
    if budget is None:
        return
    grants = allocate(bids, POOLS, budget)
    usd = 0.0
    for each in bids:
        grant = grants[each.model]
        usd += each.there_usd_per_hour
        if grant is None:
            usd += each.starts_usd_per_hour
        else:
            assert grant.usd_per_hour is not None
            usd += max(0.0, grant.usd_per_hour - each.there_usd_per_hour)
    assert usd <= budget + 1e-4


@settings(max_examples=200, deadline=None)
@given(markets(), st.randoms(use_true_random=False))
def test_the_order_of_models_does_not_matter(
    market: tuple[list[Bid], float | None], random: object
) -> None:
    bids, budget = market
    shuffled = list(bids)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert allocate(bids, POOLS, budget) == allocate(shuffled, POOLS, budget)


@settings(max_examples=200, deadline=None)
@given(markets())
def test_where_all_fits_everybody_gets_what_it_wants(
    market: tuple[list[Bid], float | None],
) -> None:
    bids, _ = market
    wanted = {
        name: sum(
            each.there_workers.get(name, 0) + each.starts_workers.get(name, 0) for each in bids
        )
        for name in POOLS
    }
    usd = sum(each.there_usd_per_hour + each.starts_usd_per_hour for each in bids)
    grants = allocate(bids, wanted, usd)
    assert grants == {each.model: None for each in bids}


@settings(max_examples=200, deadline=None)
@given(markets())
def test_what_is_fixed_and_what_nobody_outranks_stays(
    market: tuple[list[Bid], float | None],
) -> None:
    bids, budget = market
    highest = max(each.priority for each in bids)
    alone = [each for each in bids if each.priority == highest]
    for each in bids:
        grant = allocate(bids, POOLS, budget)[each.model]
        if grant is None:
            continue
        safe = [
            ask.places[0]
            for ask in each.asks
            if ask.is_there and (ask.is_fixed or (each in alone and len(alone) == 1))
        ]
        for name in POOLS:
            kept = sum(where.workers for where in safe if where.pool == name)
            assert grant.workers.get(name, 0) >= kept


def grants_of(*bids: Bid, budget: float | None = None) -> dict[str, Grant | None]:
    return allocate(bids, POOLS, budget)


def test_the_higher_priority_is_served_first() -> None:
    low, high = bid("low", new("c", workers=4)), bid("high", new("c", workers=4), priority=1)
    grants = grants_of(low, high)
    assert grants["high"] is None
    assert grants["low"] == Grant(
        {"a": 8, "b": 6, "c": 0}, None, "of 4 workers in pool c high (priority 1) has 4"
    )


def test_a_higher_priority_waits_until_those_that_make_way_have_ended() -> None:
    low = bid("low", there("c"), there("c", value=20.0))
    high = bid("high", replace(new("c")), priority=1)
    grants = grants_of(low, high)
    assert grants["low"] is not None and grants["low"].workers["c"] == 2
    assert grants["high"] is not None and grants["high"].workers["c"] == 0
    assert "groups that make way have not ended yet" in grants["high"].why
    # Now it drains, and is not in the bid any more; then it has ended.
    draining = replace(bid("low", there("c", value=20.0)), there_workers={"c": 4})
    grants = grants_of(draining, high)
    assert grants["low"] is None
    assert grants["high"] is not None and grants["high"].workers["c"] == 0
    assert grants_of(bid("low", there("c", value=20.0)), high) == {"low": None, "high": None}


def test_nobody_makes_way_while_there_is_another_place() -> None:
    low = bid("low", there("c"), there("c"))
    high = bid("high", new("c", "b"), priority=1)
    grants = grants_of(low, high)
    assert grants["low"] is None
    # It wanted to start where there is no room.
    assert grants["high"] is not None
    assert grants["high"].workers["b"] >= 2
    assert grants["high"].workers["c"] == 0


def test_among_equals_what_runs_stays_unless_another_is_worth_more_than_twice_as_much() -> None:
    running = bid("running", there("b", workers=6, value=12.0))
    twice = bid("other", new("b", workers=6, value=24.0))
    more = bid("other", new("b", workers=6, value=24.1))
    assert grants_of(running, twice)["running"] is None
    grant = grants_of(running, more)["running"]
    assert grant is not None and grant.workers["b"] == 0
    fixed = bid("running", there("b", workers=6, value=12.0, fixed=True))
    assert grants_of(fixed, more)["running"] is None


def test_the_last_room_goes_to_the_group_of_most_value() -> None:
    one, other = bid("one", new("c", workers=4, value=3.0)), bid("two", new("c", workers=4))
    grants = grants_of(one, other)
    assert grants["two"] is None
    assert grants["one"] is not None and grants["one"].workers["c"] == 0


def test_only_as_many_make_way_as_must() -> None:
    low = bid("low", *(there("b", value=value) for value in (5.0, 6.0, 7.0)))
    high = bid("high", new("b", workers=2, value=1.0), priority=3)
    grant = grants_of(low, high)["low"]
    assert grant is not None and grant.workers["b"] == 4


def test_the_budget_goes_by_priority_and_is_said() -> None:
    low, high = bid("low", new("a"), new("a")), bid("high", new("b"), priority=1)
    grants = grants_of(low, high, budget=6.0)
    assert grants["high"] is None
    assert grants["low"] is not None
    assert grants["low"].usd_per_hour == 2.0
    assert grants["low"].why == (
        "the platform's budget is $6.00/h, of which high (priority 1) has $4.00/h"
    )


def test_a_budget_that_has_become_too_small_takes_the_least_valuable_first() -> None:
    one = bid("one", there("a", value=9.0), there("a", value=1.0))
    two = bid("two", there("a", value=5.0))
    grants = grants_of(one, two, budget=4.0)
    assert grants["two"] is None
    assert grants["one"] is not None and grants["one"].usd_per_hour == 2.0


def test_a_pool_that_cannot_be_seen_limits_nothing_and_is_granted_to_nobody() -> None:
    first, second = bid("one", new("a", workers=8)), bid("two", new("a", workers=8))
    assert allocate([first, second], {"a": None}, None) == {"one": None, "two": None}


# From decisions


def decided(world: World, queued: int) -> Bid:
    decision = world.step(queued)
    record = world.records[-1]
    return bid_of(record.config, decision, record.observation, record.now_s)


def test_a_bid_tells_what_there_is_and_what_is_wanted() -> None:
    world = World(config(min_groups=1, priority=2, up_delay_s=0.0))
    world.steps(30)
    first = decided(world, 2)
    assert (first.model, first.priority) == ("tiny", 2)
    assert [(ask.is_there, ask.places[0].pool) for ask in first.asks] == [(True, "cheap")]
    assert first.there_workers == {"cheap": 2}
    more = decided(world, 16)
    assert [(ask.is_there, ask.places[0].pool) for ask in more.asks] == [
        (True, "cheap"),
        (False, "dear"),
    ]
    assert (more.starts_workers, more.starts_usd_per_hour) == ({"dear": 2}, 0.9)
    assert more.there_workers == {"cheap": 2}, "not what it is about to start"
    # Of a load of 2 groups, each carries one.
    values = [ask.places[0].value_usd_per_hour for ask in more.asks]
    assert values[0] == values[1] > 10 * 0.9


def test_a_group_that_carries_little_is_worth_little() -> None:
    world = World(config(min_groups=1, up_delay_s=0.0))
    world.steps(30)
    values = [ask.places[0].value_usd_per_hour for ask in decided(world, 9).asks]
    assert values[1] < values[0] / 7


def test_room_that_others_have_is_asked_for() -> None:
    only = World(config(pool("cheap", 0.3), up_delay_s=0.0), live={"cheap": 2})
    only.steps(30, queued=3)
    asks = decided(only, 20).asks
    assert [ask.is_there for ask in asks] == [True, False, False]
    assert {place.pool for ask in asks for place in ask.places} == {"cheap"}


def test_what_is_only_observed_stays_and_asks_for_nothing() -> None:
    world = World(config(min_groups=1, up_delay_s=0.0))
    world.steps(30)
    world.config = replace(
        world.config, rules=replace(world.config.rules, mode=ScalingMode.OBSERVE)
    )
    asks = decided(world, 30).asks
    assert [(ask.is_there, ask.is_fixed) for ask in asks] == [(True, True)]


def test_what_cannot_be_seen_is_not_taken_away() -> None:
    world = World(config(min_groups=1))
    world.steps(30)
    assert [ask.is_fixed for ask in decided(world, 2).asks] == [False]
    world.silence("g1")
    assert all(ask.is_fixed for ask in waited(world, 8))


def waited(world: World, seconds: int) -> Sequence[Ask]:
    world.steps(seconds)
    return decided(world, 0).asks
