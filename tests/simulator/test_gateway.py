from dataclasses import replace

import pytest
from tests.simulator.event_world import SERVICE, option, scenario

from expertmesh.core.admission.fair_queue import QueueBounds
from expertmesh.core.admission.slots import SlotRules
from expertmesh.core.domain.fleet import GroupState
from expertmesh.simulator.engine import Sequence
from expertmesh.simulator.fleet import SimulatedGroup
from expertmesh.simulator.gateway import Gateway, GatewayRules, Place


def group(number: int, state: GroupState = GroupState.READY) -> SimulatedGroup:
    return SimulatedGroup(f"g{number}", 0, state, 0.0, 0.0, number)


def sequence(index: int, prompt: int = 100, at_s: float = 0.0) -> Sequence:
    return Sequence(index, at_s, prompt, 50)


def arrive(gateway: Gateway, each: Sequence, tenant: str = "a") -> Place | bool:
    """And into the engine, as the run does."""
    place = gateway.arrive(each, tenant, each.arrived_at_s)
    if isinstance(place, Place):
        place.engine.submit(each, each.arrived_at_s)
    return place


def small(in_flight: float = 4.0, **rules: object) -> Gateway:
    return Gateway(scenario(option(in_flight=in_flight)), GatewayRules(**rules))  # type: ignore[arg-type]


def test_requests_spread_over_the_ready_groups_only() -> None:
    gateway = small()
    gateway.use([group(1), group(2), group(3, GroupState.DRAINING)], 0.0)
    for index in range(6):
        assert isinstance(arrive(gateway, sequence(index)), Place)
    in_flight = [place.engine.in_flight for place in gateway.places.values()]
    assert in_flight == [3, 3, 0]


def test_a_group_takes_what_its_rates_say_and_one_to_wait_in_its_engine() -> None:
    gateway = small(in_flight=4.0)
    gateway.use([group(1)], 0.0)
    places = [arrive(gateway, sequence(index)) for index in range(7)]
    assert [isinstance(place, Place) for place in places] == [True] * 5 + [False] * 2
    assert places[5:] == [True, True]
    assert gateway.queued == 2
    assert gateway.counts.queued_prompt_tokens == 200
    assert gateway.oldest_wait_s(3.0) == 3.0


def test_an_end_makes_room_for_the_head_of_the_queue() -> None:
    gateway = small(in_flight=1.0)
    gateway.use([group(1)], 0.0)
    requests = [sequence(index) for index in range(4)]
    for each in requests:
        arrive(gateway, each)
    assert gateway.next_to_send() is None
    place = gateway.places["g1"]
    finished: list[Sequence] = []
    while not finished:
        now_s = place.engine.next_s
        finished = list(place.engine.step())
    gateway.finished(place, finished[0], now_s)
    sent = gateway.next_to_send()
    assert sent is not None
    assert sent[0] is requests[2]
    assert sent[1] is place
    assert gateway.counts.finished == 1
    assert gateway.counts.finished_output_tokens == 50


def test_a_full_cache_makes_requests_wait() -> None:
    gateway = small(in_flight=1000.0, slots=SlotRules(kv_ceiling=0.5))
    gateway.use([group(1)], 0.0)
    assert isinstance(arrive(gateway, sequence(0, 60_000)), Place)
    assert isinstance(arrive(gateway, sequence(1, 60_000)), Place)
    assert arrive(gateway, sequence(2)) is True


def test_a_full_queue_refuses() -> None:
    gateway = small(bounds=QueueBounds(1, 10**9, 10**9))
    assert arrive(gateway, sequence(0)) is True
    assert arrive(gateway, sequence(1)) is False
    assert gateway.queued == 1
    assert gateway.counts.arrivals == 2


def test_what_waits_for_too_long_leaves() -> None:
    gateway = small()
    early, late = sequence(0), sequence(1, at_s=5.0)
    arrive(gateway, early)
    arrive(gateway, late)
    assert gateway.expire(9.9) == []
    assert gateway.expire(10.0) == [early]
    assert gateway.counts.queued_prompt_tokens == 100
    assert not gateway.again(early, "a", 12.0)
    assert gateway.again(late, "a", 12.0)


def test_no_engine_takes_what_is_longer_than_its_cache() -> None:
    gateway = small()
    gateway.use([group(1)], 0.0)
    assert arrive(gateway, sequence(0, SERVICE.kv_tokens)) is False
    gateway.use([], 0.0)
    assert arrive(gateway, sequence(1, SERVICE.kv_tokens)) is True
    gateway.use([group(2)], 1.0)
    sent = gateway.next_to_send()
    assert sent is not None
    assert sent[1] is None


def test_a_group_keeps_its_engine_while_the_fleet_changes() -> None:
    gateway = small()
    gateway.use([group(1)], 0.0)
    before = gateway.places["g1"]
    assert [place.name for place in gateway.use([group(1), group(2)], 1.0)] == ["g2"]
    assert gateway.places["g1"] is before
    gateway.use([group(2)], 2.0)
    assert list(gateway.places) == ["g2"]


@pytest.mark.parametrize("in_flight", [0.3, 1e9])
def test_a_limit_is_at_least_one_and_at_most_the_batch(in_flight: float) -> None:
    service = replace(SERVICE, max_seqs=7)
    place = Place(group(1), scenario(option(service, in_flight)))
    assert place.in_flight_limit == (1 if in_flight < 1 else 7)
