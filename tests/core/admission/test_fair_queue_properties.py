"""Under any order of calls: all leave once, bounds hold, priorities and shares are kept."""

from itertools import accumulate

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from expertmesh.core.admission.fair_queue import FairQueue, Full, QueueBounds, Waiting
from expertmesh.core.domain.tenant import Priority

BOUNDS = QueueBounds(requests=12, tokens=400, size_bytes=3_000, age_s=50.0)
ORDER = list(Priority)
WEIGHTS = {"a": 1.0, "b": 2.0, "c": 0.5, "d": 1.0}


class QueueMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.queue = FairQueue(BOUNDS)
        self.now_s = 0.0
        self.inside: list[Waiting] = []
        """In the order in which they came."""
        self.outside: list[Waiting] = []

    def leave(self, *entries: Waiting) -> None:
        for entry in entries:
            self.inside.remove(entry)
            self.outside.append(entry)

    @rule(
        tenant=st.sampled_from(sorted(WEIGHTS)),
        priority=st.sampled_from(ORDER),
        tokens=st.integers(0, 60) | st.just(390),
        size=st.integers(0, 400) | st.just(2_900),
        patience_s=st.integers(1, 100),
    )
    def push(
        self, tenant: str, priority: Priority, tokens: int, size: int, patience_s: int
    ) -> None:
        entry = Waiting(
            None,
            tenant,
            WEIGHTS[tenant],
            priority,
            tokens,
            size,
            self.now_s,
            self.now_s + patience_s,
        )
        fits = (
            len(self.inside) < BOUNDS.requests
            and self.queue.tokens + tokens <= BOUNDS.tokens
            and self.queue.size_bytes + size <= BOUNDS.size_bytes
        )
        pushed_out = self.queue.push(entry, self.now_s)
        if isinstance(pushed_out, Full):
            assert not fits
            return
        assert fits == (pushed_out == ())
        if pushed_out:
            self.check_first_victim(pushed_out[0], entry)
        for victim in pushed_out:
            assert ORDER.index(victim.priority) >= ORDER.index(priority)
            assert (victim.tenant, victim.priority) != (tenant, priority)
            line = [
                one
                for one in self.inside
                if (one.tenant, one.priority) == (victim.tenant, victim.priority)
            ]
            assert victim is line[-1]
            lowest = max(ORDER.index(one.priority) for one in self.inside)
            assert ORDER.index(victim.priority) == lowest
            self.leave(victim)
        self.inside.append(entry)

    def check_first_victim(self, victim: Waiting, newcomer: Waiting) -> None:
        """Its tenant has most of what is scarce, for its weight."""
        if len(self.inside) + 1 > BOUNDS.requests:
            size = {id(one): 1 for one in self.inside}
        elif sum(one.tokens for one in (*self.inside, newcomer)) > BOUNDS.tokens:
            size = {id(one): one.tokens for one in self.inside}
        else:
            size = {id(one): one.size_bytes for one in self.inside}
        backlogs: dict[str, float] = {}
        for one in self.inside:
            if one.priority is victim.priority:
                share = size[id(one)] / one.weight
                backlogs[one.tenant] = backlogs.get(one.tenant, 0.0) + share
        assert backlogs[victim.tenant] == max(backlogs.values())

    @precondition(lambda self: self.inside)
    @rule()
    def pop(self) -> None:
        head = self.queue.head()
        popped = self.queue.pop()
        assert popped is head
        first = min(ORDER.index(one.priority) for one in self.inside)
        assert ORDER.index(popped.priority) == first
        line = [
            one
            for one in self.inside
            if (one.tenant, one.priority) == (popped.tenant, popped.priority)
        ]
        assert popped is line[0]
        self.leave(popped)

    @precondition(lambda self: self.inside)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        entry = data.draw(st.sampled_from(self.inside))
        assert self.queue.remove(entry)
        self.leave(entry)

    @precondition(lambda self: self.outside)
    @rule(data=st.data())
    def remove_again(self, data: st.DataObject) -> None:
        assert not self.queue.remove(data.draw(st.sampled_from(self.outside)))

    @rule(elapsed_s=st.integers(0, 30))
    def expire(self, elapsed_s: int) -> None:
        self.now_s += elapsed_s
        expired = self.queue.expire(self.now_s)
        assert set(map(id, expired)) == {
            id(one)
            for one in self.inside
            if min(one.deadline_s, one.queued_at_s + 50.0) <= self.now_s
        }
        self.leave(*expired)

    @rule(tenant=st.sampled_from(sorted(WEIGHTS)), tokens=st.integers(-100, 100))
    def correct(self, tenant: str, tokens: int) -> None:
        self.queue.charge(tenant, tokens, WEIGHTS[tenant])

    @invariant()
    def figures_are_those_of_what_waits(self) -> None:
        queue = self.queue
        assert queue.requests == len(self.inside) <= BOUNDS.requests
        assert queue.tokens == sum(one.tokens for one in self.inside) <= BOUNDS.tokens
        assert queue.size_bytes == sum(one.size_bytes for one in self.inside) <= BOUNDS.size_bytes
        assert queue.oldest_at_s == min((one.queued_at_s for one in self.inside), default=None)
        by_tenant: dict[str, int] = {}
        for one in self.inside:
            by_tenant[one.tenant] = by_tenant.get(one.tenant, 0) + one.tokens
        assert queue.tokens_by_tenant == by_tenant
        assert (queue.head() is None) == (not self.inside)


QueueMachine.TestCase.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
TestFairQueue = QueueMachine.TestCase

SIZES = st.lists(st.integers(1, 500), min_size=1, max_size=60)


@given(SIZES, SIZES, st.sampled_from([0.25, 1.0, 3.0]), st.data())
def test_two_that_always_wait_are_served_alike(
    of_a: list[int], of_b: list[int], weight_b: float, data: st.DataObject
) -> None:
    """The bound of the paper, over every interval in which both wait."""
    queue = FairQueue()
    late = data.draw(st.integers(0, len(of_a) - 1))
    for tokens in of_a:
        queue.push(Waiting(None, "a", 1.0, Priority.STANDARD, tokens, 0, 0.0, 1e9), 0.0)
    for _ in range(late):
        queue.pop()
    for tokens in of_b:
        queue.push(Waiting(None, "b", weight_b, Priority.STANDARD, tokens, 0, 0.0, 1e9), 0.0)
    differences = []
    while len(queue.tokens_by_tenant) == 2:
        popped = queue.pop()
        share = popped.tokens / popped.weight
        differences.append(share if popped.tenant == "a" else -share)
    largest = max(*of_a, max(of_b) / weight_b)
    sums = list(accumulate(differences, initial=0.0))
    # The last one may have been the last of its tenant, which then did not wait any more.
    assert max(sums) - min(sums) <= 2 * largest + 1e-6


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(1, 100)), max_size=80))
def test_nobody_who_waits_falls_behind_by_more_than_two_requests(
    arrivals: list[tuple[str, int]],
) -> None:
    """A tenant that comes and goes gets no more than one that waits all the time."""
    queue = FairQueue()
    for _ in range(200):
        queue.push(Waiting(None, "w", 1.0, Priority.STANDARD, 100, 0, 0.0, 1e9), 0.0)
    served: dict[str, int] = {}
    for tenant, tokens in arrivals:
        queue.push(Waiting(None, tenant, 1.0, Priority.STANDARD, tokens, 0, 0.0, 1e9), 0.0)
        popped = queue.pop()
        served[popped.tenant] = served.get(popped.tenant, 0) + popped.tokens
    for tenant in "abcd":
        assert served.get(tenant, 0) - served.get("w", 0) <= 200
