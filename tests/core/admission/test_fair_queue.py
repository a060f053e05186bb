import pytest

from expertmesh.core.admission import fair_queue
from expertmesh.core.admission.fair_queue import Bound, FairQueue, Full, QueueBounds, Waiting
from expertmesh.core.domain.tenant import Priority

HIGH, MID, LOW = Priority.INTERACTIVE, Priority.STANDARD, Priority.BATCH


def waiting(
    call: str,
    *,
    tenant: str | None = None,
    weight: float = 1.0,
    priority: Priority = MID,
    tokens: int = 10,
    size: int = 100,
    at_s: float = 0.0,
    deadline_s: float = 1e9,
) -> Waiting:
    """Of the tenant named by the first letter, if not said otherwise."""
    return Waiting(call, tenant or call[0], weight, priority, tokens, size, at_s, deadline_s)


def queue_of(*entries: Waiting, bounds: QueueBounds | None = None) -> FairQueue:
    queue = FairQueue(bounds)
    for entry in entries:
        assert queue.push(entry, entry.queued_at_s) == ()
    return queue


def drained(queue: FairQueue) -> list[str]:
    order = []
    while (head := queue.head()) is not None:
        popped = queue.pop()
        assert popped is head
        order.append(popped.call)
    return order


def test_empty() -> None:
    queue = FairQueue()
    assert queue.head() is None and queue.oldest_at_s is None
    assert (queue.requests, queue.tokens, queue.size_bytes) == (0, 0, 0)
    assert queue.tokens_by_tenant == {}
    with pytest.raises(IndexError):
        queue.pop()


def test_tenants_take_turns_and_each_is_first_in_first_out() -> None:
    queue = queue_of(*(waiting(f"a{n}") for n in range(4)), waiting("b0"), waiting("b1"))
    assert drained(queue) == ["a0", "b0", "a1", "b1", "a2", "a3"]


def test_turns_go_by_tokens_not_by_requests() -> None:
    queue = queue_of(
        *(waiting(f"a{n}", tokens=30) for n in range(2)),
        *(waiting(f"b{n}", tokens=10) for n in range(6)),
    )
    assert drained(queue) == ["a0", "b0", "b1", "b2", "a1", "b3", "b4", "b5"]


def test_shares_follow_the_weights() -> None:
    queue = queue_of(
        *(waiting(f"a{n}", weight=3.0) for n in range(9)), *(waiting(f"b{n}") for n in range(9))
    )
    first = drained(queue)[:8]
    assert sum(call.startswith("a") for call in first) == 6


def test_priorities_are_strict() -> None:
    queue = queue_of(
        waiting("a-low", priority=LOW), waiting("a-mid"), waiting("b-high", priority=HIGH)
    )
    for number in range(3):
        queue.push(waiting(f"c{number}", priority=HIGH, tokens=10**6), 0.0)
    assert drained(queue)[-2:] == ["a-mid", "a-low"]


def test_idleness_is_not_saved_up() -> None:
    queue = queue_of(*(waiting(f"a{n}") for n in range(20)))
    for _ in range(10):
        queue.pop()
    for number in range(5):
        queue.push(waiting(f"b{number}"), 0.0)
    assert drained(queue)[:6] == ["a10", "b0", "a11", "b1", "a12", "b2"]


def test_neither_is_it_when_nobody_waited_meanwhile() -> None:
    queue = queue_of(*(waiting(f"a{n}") for n in range(20)))
    drained(queue)
    queue.push(waiting("b0"), 0.0)
    queue.push(waiting("b1"), 0.0)
    queue.push(waiting("a20"), 0.0)
    assert drained(queue) == ["b0", "a20", "b1"]


def test_leaving_and_coming_back_does_not_wipe_out_what_was_served() -> None:
    queue = queue_of(waiting("a0", tokens=100), *(waiting(f"b{n}") for n in range(30)))
    assert queue.pop().call == "a0"
    queue.push(waiting("a1", tokens=100), 0.0)
    order = drained(queue)
    assert order.index("a1") == 10


def test_a_settlement_corrects_the_charge() -> None:
    queue = queue_of(
        *(waiting(f"a{n}", tokens=100) for n in range(3)),
        *(waiting(f"b{n}", tokens=100) for n in range(3)),
    )
    assert [queue.pop().call, queue.pop().call] == ["a0", "b0"]
    queue.charge("a", -90, 1.0)
    assert [queue.pop().call, queue.pop().call] == ["a1", "b1"]
    queue.charge("b", 500, 1.0)
    assert drained(queue) == ["a2", "b2"]


def test_a_correction_counts_for_a_tenant_that_waits_no_more() -> None:
    queue = queue_of(waiting("a0"), *(waiting(f"b{n}") for n in range(20)))
    queue.pop()
    queue.charge("a", 90, 1.0)
    queue.push(waiting("a1"), 0.0)
    assert drained(queue).index("a1") == 10


def test_service_without_queueing_can_be_charged_too() -> None:
    queue = FairQueue()
    queue.charge("a", 50, 1.0, MID)
    queue.charge("nobody", 50, 1.0)  # Unknown, and no priority named.
    for number in range(8):
        queue.push(waiting(f"b{number}"), 0.0)
    queue.push(waiting("a0"), 0.0)
    assert drained(queue).index("a0") == 5


def test_requests_without_tokens_do_not_go_first_for_ever() -> None:
    queue = queue_of(*(waiting(f"a{n}", tokens=0) for n in range(30)), waiting("b0"), waiting("b1"))
    assert drained(queue).index("b1") < 20


def test_what_is_removed_is_gone_once() -> None:
    first, second = waiting("a0"), waiting("a1")
    queue = queue_of(first, second)
    assert queue.remove(first) and not queue.remove(first)
    assert queue.head() is second and queue.requests == 1
    assert queue.remove(second)
    assert queue.head() is None and queue.tokens == 0 and queue.size_bytes == 0


def test_deadlines_and_age() -> None:
    queue = queue_of(
        waiting("a0", at_s=0.0, deadline_s=50.0),
        waiting("b0", at_s=0.0, deadline_s=5.0),
        waiting("c0", at_s=4.0),
        bounds=QueueBounds(age_s=10.0),
    )
    assert queue.expire(4.9) == []
    assert [one.call for one in queue.expire(5.0)] == ["b0"]
    assert [one.call for one in queue.expire(13.9)] == ["a0"]
    assert queue.oldest_at_s == 4.0
    assert [one.call for one in queue.expire(14.0)] == ["c0"]
    assert queue.requests == 0 and queue.oldest_at_s is None


def test_the_same_request_waits_once() -> None:
    entry = waiting("a0")
    queue = queue_of(entry)
    with pytest.raises(ValueError, match="once"):
        queue.push(entry, 0.0)
    queue.remove(entry)
    assert queue.push(entry, 1.0) == ()


def test_figures() -> None:
    queue = queue_of(
        waiting("a0", tokens=5, size=7, at_s=3.0),
        waiting("a1", tokens=6, at_s=4.0, priority=HIGH),
        waiting("b0", tokens=1, at_s=5.0),
    )
    assert (queue.requests, queue.tokens, queue.size_bytes, queue.oldest_at_s) == (3, 12, 207, 3.0)
    assert queue.tokens_by_tenant == {"a": 11, "b": 1}


def test_a_lone_tenant_finds_it_full() -> None:
    queue = queue_of(waiting("a0"), waiting("a1"), bounds=QueueBounds(requests=2))
    assert queue.push(waiting("a2"), 0.0) == Full(Bound.REQUESTS, 2)
    assert drained(queue) == ["a0", "a1"]


def test_a_flood_makes_room_for_others_by_its_youngest() -> None:
    bounds = QueueBounds(requests=6)
    queue = queue_of(*(waiting(f"a{n}") for n in range(6)), bounds=bounds)
    for number, dropped in ((0, "a5"), (1, "a4"), (2, "a3")):
        (victim,) = queue.push(waiting(f"b{number}"), 0.0)  # type: ignore[misc]
        assert victim.call == dropped
    # Equal now: neither pushes the other out.
    assert queue.push(waiting("b3"), 0.0) == Full(Bound.REQUESTS, 6)
    assert queue.push(waiting("a6"), 0.0) == Full(Bound.REQUESTS, 6)
    assert drained(queue) == ["a0", "b0", "a1", "b1", "a2", "b2"]


def test_room_is_shared_by_weight() -> None:
    bounds = QueueBounds(requests=8)
    queue = queue_of(*(waiting(f"a{n}") for n in range(8)), bounds=bounds)
    results = [queue.push(waiting(f"b{n}", weight=3.0), 0.0) for n in range(8)]
    assert sum(isinstance(result, tuple) for result in results) == 6


@pytest.mark.parametrize(
    ("bounds", "bound"),
    [
        (QueueBounds(tokens=1_050), Bound.TOKENS),
        (QueueBounds(size_bytes=1_050), Bound.SIZE),
    ],
)
def test_who_holds_what_is_scarce_gives_way(bounds: QueueBounds, bound: Bound) -> None:
    """Not who has most requests: here the other tenant has those."""
    small, large = (
        ({"tokens": 10, "size": 1}, {"tokens": 500, "size": 1})
        if bound is Bound.TOKENS
        else ({"tokens": 1, "size": 10}, {"tokens": 1, "size": 500})
    )
    entries = [waiting(f"a{n}", **small) for n in range(5)]
    queue = queue_of(*entries, waiting("b0", **large), waiting("b1", **large), bounds=bounds)
    (victim,) = queue.push(waiting("c0", **small), 0.0)  # type: ignore[misc]
    assert victim.call == "b1"
    assert queue.push(waiting("b2", **large), 0.0) == Full(bound, 1_050)
    assert queue.push(waiting("d0", **large), 0.0) == Full(bound, 1_050)


def test_tiny_requests_in_large_number_do_not_push_out_a_long_one() -> None:
    queue = queue_of(
        waiting("b0", tokens=10**6),
        *(waiting(f"a{n}", tokens=1) for n in range(9)),
        bounds=QueueBounds(requests=10),
    )
    assert queue.push(waiting("a9", tokens=1), 0.0) == Full(Bound.REQUESTS, 10)
    (victim,) = queue.push(waiting("c0", tokens=10**6), 0.0)  # type: ignore[misc]
    assert victim.call == "a8"


def test_who_has_most_is_known_however_it_came_about() -> None:
    """After the queue was full for the first time too."""
    bounds = QueueBounds(requests=6)
    queue = queue_of(
        *(waiting(f"a{n}") for n in range(4)), *(waiting(f"b{n}") for n in range(2)), bounds=bounds
    )
    assert queue.push(waiting("c0"), 0.0) != Full(Bound.REQUESTS, 6)  # Instead of a3.
    for _ in range(4):
        queue.pop()  # Leaves one each of two tenants, a2 and b1 or c0.
    left = queue.tokens_by_tenant
    assert sum(left.values()) == 20
    for number in range(3):
        assert queue.push(waiting(f"d{number}"), 0.0) == ()
    assert queue.push(waiting("e0"), 0.0) == ()
    (victim,) = queue.push(waiting("f0"), 0.0)  # type: ignore[misc]
    assert victim.call == "d2"
    (victim,) = queue.push(waiting("g0"), 0.0)  # type: ignore[misc]
    assert victim.call == "d1"


def test_a_higher_priority_pushes_out_a_lower_one_and_never_the_other_way() -> None:
    queue = queue_of(waiting("a0", priority=LOW), waiting("b0"), bounds=QueueBounds(requests=2))
    (victim,) = queue.push(waiting("b1"), 0.0)  # type: ignore[misc]
    assert victim.call == "a0"
    assert queue.push(waiting("a1", priority=LOW), 0.0) == Full(Bound.REQUESTS, 2)
    (victim,) = queue.push(waiting("b2", priority=HIGH), 0.0)  # type: ignore[misc]
    assert victim.call == "b1"
    assert drained(queue) == ["b2", "b0"]


def test_one_that_can_never_fit_pushes_nobody_out() -> None:
    queue = queue_of(*(waiting(f"a{n}") for n in range(4)), bounds=QueueBounds(tokens=40))
    assert queue.push(waiting("b0", tokens=41), 0.0) == Full(Bound.TOKENS, 40)
    assert drained(queue) == [f"a{n}" for n in range(4)]


def test_a_huge_request_does_not_cost_many_small_ones_their_place() -> None:
    queue = queue_of(
        *(waiting(f"a{n}", tokens=1, priority=LOW) for n in range(100)),
        bounds=QueueBounds(tokens=100),
    )
    before = fair_queue._MOST_PUSHED_OUT
    assert queue.push(waiting("b0", tokens=before + 1), 0.0) == Full(Bound.TOKENS, 100)
    assert queue.requests == 100 and queue.tokens == 100
    pushed_out = queue.push(waiting("b1", tokens=before), 0.0)
    assert isinstance(pushed_out, tuple)
    assert [one.call for one in pushed_out] == [f"a{n}" for n in range(99, 99 - before, -1)]
    assert drained(queue) == ["b1", *(f"a{n}" for n in range(100 - before))]


def test_a_refused_newcomer_changes_no_turn() -> None:
    """Even when lines were emptied in search for room."""
    # a is far ahead in service; b and c have one each; the newcomer needs more than they hold.
    queue = queue_of(
        waiting("b0", tokens=30, priority=LOW),
        waiting("c0", tokens=30, priority=LOW),
        waiting("a0", tokens=40, priority=HIGH),
        bounds=QueueBounds(tokens=100),
    )
    queue.charge("b", 1_000, 1.0, LOW)
    for _ in range(3):
        assert queue.push(waiting("d0", tokens=70), 0.0) == Full(Bound.TOKENS, 100)
    queue.push(waiting("c1", tokens=0, priority=LOW), 0.0)
    assert drained(queue) == ["a0", "c0", "c1", "b0"]


def test_idle_tenants_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    queue = FairQueue()
    monkeypatch.setattr(fair_queue, "_IDLE_TENANTS", 100)
    band = queue._bands[MID]
    for number in range(300):
        queue.push(waiting("x", tenant=f"t{number}"), 0.0)
        queue.pop()
    assert len(band.idle) == 100 and "t299" in band.idle
    for number in range(300, 600):
        queue.charge(f"t{number}", 1_000, 1.0, MID)
    assert len(band.idle) == 100 and "t599" in band.idle
