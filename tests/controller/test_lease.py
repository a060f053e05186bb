"""The rules of the lease alone: no clock, no I/O."""

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.controller.lease import LeaseStep, LeaseTiming, LeaseView
from expertmesh.core.domain.lease import LeaseRecord

ME, OTHER = "here_1", "there_2"
URL, OTHER_URL = "http://here:1", "http://there:2"
FREE = LeaseRecord(None)
THEIRS = LeaseRecord(OTHER, OTHER_URL, 10.0, 1, "7")


def view() -> LeaseView:
    return LeaseView(ME, URL)


def leading(at_s: float = 100.0) -> LeaseView:
    seen = view().saw(FREE, at_s)
    return seen.wrote(replace(seen.claim(), version="1"), at_s, at_s + 0.5)


def test_nothing_is_done_before_the_first_look() -> None:
    assert view().next_step(0.0) is LeaseStep.WAIT
    assert not view().may_act(0.0)


def test_a_free_lease_is_taken() -> None:
    seen = view().saw(FREE, 100.0)
    assert seen.next_step(100.0) is LeaseStep.TAKE
    assert seen.claim() == LeaseRecord(ME, URL, 10.0, 1, "")


def test_the_holder_counts_from_when_it_sent_not_from_the_answer() -> None:
    leader = leading(100.0)
    assert leader.act_until_s == 108.0
    assert leader.may_act(107.9)
    assert not leader.may_act(108.0)


def test_it_is_renewed_every_2_s_under_the_same_count_of_holders() -> None:
    leader = leading(100.0)
    assert leader.next_step(101.9) is LeaseStep.WAIT
    assert leader.wake_at_s(100.5) == 101.5
    assert leader.next_step(102.0) is LeaseStep.RENEW
    assert leader.claim() == LeaseRecord(ME, URL, 10.0, 1, "1")
    renewed = leader.wrote(replace(leader.claim(), version="2"), 102.0, 102.1)
    assert renewed.act_until_s == 110.0


def test_a_follower_waits_10_s_of_its_own_clock_since_the_last_change() -> None:
    follower = view().saw(THEIRS, 100.0)
    assert follower.saw(THEIRS, 105.0).expires_at_s == 110.0
    changed = follower.saw(replace(THEIRS, version="8"), 105.0)
    assert changed.next_step(114.9) is LeaseStep.WAIT
    assert changed.next_step(115.0) is LeaseStep.TAKE
    assert changed.claim() == LeaseRecord(ME, URL, 10.0, 2, "8")
    assert changed.wake_at_s(114.5) == 115.0


def test_the_longer_duration_counts_where_two_configurations_meet() -> None:
    assert view().saw(replace(THEIRS, duration_s=30.0), 0.0).expires_at_s == 30.0
    assert view().saw(replace(THEIRS, duration_s=1.0), 0.0).expires_at_s == 10.0


def test_a_lease_that_was_given_back_is_taken_at_once() -> None:
    follower = view().saw(THEIRS, 100.0)
    freed = follower.saw(LeaseRecord(None, "", 0.0, 1, "8"), 101.0)
    assert freed.next_step(101.0) is LeaseStep.TAKE


def test_a_holder_that_sees_another_one_stops_at_once() -> None:
    lost = leading(100.0).saw(THEIRS, 101.0)
    assert not lost.may_act(101.0)
    assert lost.next_step(101.0) is LeaseStep.WAIT
    assert lost.leader_url == OTHER_URL


def test_a_holder_whose_time_ran_out_takes_it_again_when_nobody_else_has() -> None:
    late = leading(100.0)
    assert late.next_step(109.0) is LeaseStep.TAKE


def test_a_renewal_without_an_answer_that_was_done_does_not_end_the_leadership() -> None:
    leader = leading(100.0).saw(LeaseRecord(ME, URL, 10.0, 1, "2"), 103.0)
    assert leader.may_act(103.0)
    assert leader.act_until_s == 108.0
    assert leader.next_step(103.0) is LeaseStep.RENEW


def test_only_the_holder_gives_it_back() -> None:
    assert leading().release() == LeaseRecord(None, "", 0.0, 1, "1")
    assert view().saw(THEIRS, 0.0).release() is None
    assert view().release() is None


def test_a_process_at_the_same_address_of_the_same_host_has_replaced_the_former_one() -> None:
    former = LeaseRecord("here_0", URL, 10.0, 1, "7")
    assert view().saw(former, 100.0).next_step(100.0) is LeaseStep.TAKE
    for other in (replace(former, url=OTHER_URL), replace(former, holder="there_0")):
        assert view().saw(other, 100.0).next_step(100.0) is LeaseStep.WAIT


def test_that_counts_at_the_first_look_only() -> None:
    former = LeaseRecord("here_0", URL, 10.0, 1, "7")
    known = view().saw(FREE, 99.0).saw(former, 100.0)
    assert known.next_step(100.0) is LeaseStep.WAIT


def test_an_order_of_times_that_would_let_two_act_is_refused() -> None:
    for wrong in (
        {"act_for_s": 10.0},
        {"act_for_s": 12.0},
        {"renew_every_s": 8.0},
        {"renew_every_s": 0.0},
    ):
        with pytest.raises(ValueError, match="must hold"):
            LeaseTiming(**wrong)


class World:
    """Candidates with clocks of their own, a store that is slow, and processes that pause."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.record = FREE
        self.views = [LeaseView(f"host{i}_{i}", f"http://host{i}:1") for i in range(3)]
        self.offsets_s = [self.random.uniform(0, 1e6) for _ in self.views]
        self.terms: list[str] = []

    def run(self, seconds: float) -> None:
        now_s = 0.0
        due_s = [self.random.uniform(0, 2) for _ in self.views]
        while now_s < seconds:
            who = min(range(len(self.views)), key=due_s.__getitem__)
            now_s = due_s[who]
            self._check(now_s)
            due_s[who] = self._step(who, now_s)

    def _check(self, now_s: float) -> None:
        acting = [
            view.me
            for view, offset_s in zip(self.views, self.offsets_s, strict=True)
            if view.may_act(now_s + offset_s)
        ]
        assert len(acting) <= 1, (now_s, acting)
        if acting and self.terms[-1:] != acting:
            self.terms += acting

    def _step(self, who: int, now_s: float) -> float:
        """Read, then write if it is due; each may be slow or get lost. Returns the next time."""
        offset_s, view = self.offsets_s[who], self.views[who]
        sent_s = now_s
        now_s += self._delay_s()
        if not view.may_act(sent_s + offset_s):
            if self.random.random() < 0.1:
                return now_s + 1.0
            view = view.saw(self.record, now_s + self._delay_s() + offset_s)
        sent_s = now_s
        if view.next_step(sent_s + offset_s) is not LeaseStep.WAIT:
            wanted = view.claim()
            if wanted.version == self.record.version and self.random.random() > 0.05:
                self.record = replace(wanted, version=str(int(wanted.version or 0) + 1))
                if self.random.random() > 0.1:
                    view = view.wrote(self.record, sent_s + offset_s, now_s + offset_s)
            else:
                view = view.saw(self.record, now_s + offset_s)
        self.views[who] = view
        pause_s = self.random.uniform(5, 40) if self.random.random() < 0.03 else 0.0
        return max(now_s, view.wake_at_s(now_s + offset_s) - offset_s) + pause_s + 0.001

    def _delay_s(self) -> float:
        return self.random.choice((0.0, 0.01, 0.1, 1.0))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32))
def test_two_never_act_together_whatever_is_slow_lost_or_paused(seed: int) -> None:
    world = World(seed)
    world.run(600.0)
    assert world.terms


def test_the_simulated_world_does_see_changes_of_leader() -> None:
    """Else the property above would say little."""
    world = World(3)
    world.run(2000.0)
    assert len(world.terms) > 5
