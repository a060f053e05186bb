from collections.abc import Iterator

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from expertmesh.core.routing.health import Evidence, Health, HealthConfig, RankState

A0, A1, B0 = "http://a/0", "http://a/1", "http://b/0"
GROUPS = {"a": (A0, A1), "b": (B0,)}
STEADY = HealthConfig(jitter=0.0)


def health(config: HealthConfig = STEADY, salt: str = "") -> Health:
    made = Health(config, salt)
    made.keep(GROUPS)
    return made


def eject(made: Health, url: str = A0, now_s: float = 0.0) -> None:
    era = made.begin(url)
    made.end(url, era)
    made.failed("a" if url != B0 else "b", url, era, Evidence.REFUSED, now_s)


def restore(made: Health, url: str, now_s: float) -> None:
    made.probe_ok(url)
    era = made.begin(url)
    made.answered(url, era, now_s)
    made.end(url, era)
    assert made.state(url) is RankState.HEALTHY


def probe_times(made: Health, url: str, first_s: float, count: int) -> Iterator[float]:
    """When probes that all fail at once are due, to a hundredth of a second."""
    at = round(first_s * 100)
    while count:
        if url in made.due_probes(at / 100):
            made.probe_failed(url, at / 100)
            count -= 1
            yield at / 100
        at += 1


HARD = [evidence for evidence in Evidence if evidence is not Evidence.BUSY]


@pytest.mark.parametrize("evidence", HARD)
def test_the_first_evidence_ejects_the_rank_or_its_group(evidence: Evidence) -> None:
    made = health()
    made.failed("a", A0, made.begin(A0), evidence, 1.0)
    alone = evidence in (Evidence.REFUSED, Evidence.RESET)
    assert made.state(A0) is RankState.EJECTED and not made.usable(A0)
    assert made.usable(A1) is alone and made.usable(B0)
    assert made.ejected_at_s(A0) == 1.0 and made.ejected_at_s(B0) is None
    assert not made.all_healthy


def test_probes_back_off_to_ten_seconds() -> None:
    made = health()
    eject(made)
    times = list(probe_times(made, A0, 0.0, 8))
    gaps = [round(b - a, 2) for a, b in zip([0.0, *times], times, strict=False)]
    assert gaps == [0.5, 1.0, 2.0, 4.0, 8.0, 10.0, 10.0, 10.0]


def test_jitter_is_repeatable_and_differs_by_name() -> None:
    def times(salt: str, url: str) -> list[float]:
        made = health(HealthConfig(), salt)
        eject(made, url)
        return list(probe_times(made, url, 0.0, 6))

    assert times("w1", A0) == times("w1", A0)
    assert times("w1", A0) != times("w2", A0) and times("w1", A0) != times("w1", A1)
    assert 0.37 <= times("w1", A0)[0] <= 0.51
    assert all(0.75 * 25.5 - 0.1 <= times(f"w{n}", A0)[5] <= 25.6 for n in range(9))


def test_a_due_probe_is_named_once_and_again_when_nothing_is_heard_of_it() -> None:
    made = health()
    eject(made)
    assert made.due_probes(0.49) == ()
    assert made.due_probes(0.5) == (A0,)
    assert made.due_probes(0.6) == () == made.due_probes(5.4)
    assert made.due_probes(5.5) == (A0,)


def test_on_trial_one_request_at_a_time_until_one_is_answered() -> None:
    made = health()
    eject(made)
    made.probe_ok(A0)
    assert made.state(A0) is RankState.TRIAL and made.usable(A0)
    first = made.begin(A0)
    assert not made.usable(A0) and made.state(A0) is RankState.TRIAL
    made.end(A0, first)
    assert made.usable(A0), "the client left: the next one tries"
    second = made.begin(A0)
    made.answered(A0, second, 1.0)
    assert made.state(A0) is RankState.HEALTHY and made.all_healthy
    made.end(A0, second)
    assert made.due_probes(1e9) == ()


def test_a_trial_that_fails_ejects_again_and_for_longer() -> None:
    made = health()
    eject(made)
    made.probe_ok(A0)
    eject(made, now_s=100.0)
    assert made.state(A0) is RankState.EJECTED
    assert list(probe_times(made, A0, 100.0, 2)) == [102.0, 106.0]


def test_old_news_change_nothing() -> None:
    made = health()
    old = [made.begin(A0) for _ in range(3)]
    made.failed("a", A0, old[0], Evidence.RESET, 1.0)
    made.failed("a", A0, old[1], Evidence.RESET, 2.0)
    made.answered(A0, old[2], 2.0)
    assert made.state(A0) is RankState.EJECTED and made.ejected_at_s(A0) == 1.0
    made.probe_ok(A0)
    made.end(A0, old[1])
    made.failed("a", A0, old[1], Evidence.STALL, 3.0)
    made.answered(A0, old[2], 3.0)
    assert made.state(A0) is RankState.TRIAL and made.usable(A0) and made.usable(A1)
    trial = made.begin(A0)
    made.end(A0, old[2])
    assert not made.usable(A0), "it was not the trial that ended"
    made.answered(A0, trial, 4.0)
    made.failed("a", A0, old[2], Evidence.RESET, 5.0)
    assert made.all_healthy
    made.failed("a", A0, trial, Evidence.RESET, 6.0)
    assert not made.usable(A0), "but a stream that breaks off later is news"


def test_an_answer_while_ejected_restores_and_a_failure_moves_it_to_the_end() -> None:
    made = health()
    eject(made, A0, 1.0)
    era = made.begin(A0)
    made.failed("a", A0, era, Evidence.STALL, 5.0)
    assert made.ejected_at_s(A0) == 5.0 and made.usable(A1)
    made.answered(A0, made.begin(A0), 6.0)
    assert made.all_healthy


@pytest.mark.parametrize(("pause_s", "first_probe_s"), [(29.9, 2.0), (30.0, 0.5)])
def test_a_rank_that_flaps_backs_off_longer(pause_s: float, first_probe_s: float) -> None:
    made = health()
    eject(made, now_s=0.0)
    restore(made, A0, 10.0)
    eject(made, now_s=10.0 + pause_s)
    (at_s,) = probe_times(made, A0, 10.0 + pause_s, 1)
    assert at_s == pytest.approx(10.0 + pause_s + first_probe_s)


def test_flapping_ends_at_a_minute_and_is_forgiven() -> None:
    made = health()
    now_s = 0.0
    waits = []
    for _ in range(7):
        eject(made, now_s=now_s)
        (at_s,) = probe_times(made, A0, now_s, 1)
        waits.append(round(at_s - now_s, 2))
        restore(made, A0, at_s)
        now_s = round(at_s + 1.0, 2)
    assert waits == [0.5, 2.0, 8.0, 32.0, 60.0, 60.0, 60.0]
    eject(made, now_s=now_s + 30.0)
    assert made.due_probes(now_s + 30.5) == (A0,)


def test_a_busy_rank_is_left_alone_until_its_next_good_probe() -> None:
    made = health()
    era = made.begin(A0)
    before = made.begin(A0)
    made.end(A0, era)
    made.failed("a", A0, era, Evidence.BUSY, 1.0)
    assert made.state(A0) is RankState.BUSY and not made.usable(A0) and made.usable(A1)
    assert made.ejected_at_s(A0) is None
    made.answered(A0, before, 1.1)
    assert made.state(A0) is RankState.BUSY, "an older request got through, not a new one"
    assert made.due_probes(1.49) == () and made.due_probes(1.5) == (A0,)
    made.probe_ok(A0)
    assert made.all_healthy, "it was sound all the time: no trial"
    made.failed("a", A0, before, Evidence.BUSY, 2.0)
    assert made.due_probes(2.5) == (A0,), "being busy often is no flapping"


def test_a_busy_rank_that_is_dead_is_ejected() -> None:
    made = health()
    eras = [made.begin(A0), made.begin(A1)]
    made.failed("a", A0, eras[0], Evidence.BUSY, 1.0)
    made.failed("a", A1, eras[1], Evidence.BUSY, 1.0)
    made.failed("a", A0, eras[0], Evidence.RESET, 1.2)
    assert made.state(A0) is RankState.EJECTED
    made.probe_failed(A1, 2.0)
    assert made.state(A1) is RankState.EJECTED
    made.failed("a", A1, made.begin(A1), Evidence.BUSY, 3.0)
    assert made.state(A1) is RankState.EJECTED


def test_a_trial_that_finds_it_busy_ends_the_ejection() -> None:
    made = health()
    eject(made)
    made.probe_ok(A0)
    era = made.begin(A0)
    made.end(A0, era)
    made.failed("a", A0, era, Evidence.BUSY, 1.0)
    assert made.state(A0) is RankState.BUSY
    made.probe_ok(A0)
    assert made.all_healthy


def test_a_group_that_leaves_is_forgotten() -> None:
    made = health()
    eject(made, A0)
    eject(made, B0)
    made.keep({"a": (A0, A1)})
    assert made.usable(B0) and len(made) == 1
    made.failed("b", B0, 0, Evidence.RESET, 1.0)
    assert len(made) == 1, "news of what has gone"
    made.keep({"c": (A0,)})
    assert made.all_healthy and len(made) == 0, "another group has the address now"
    made.failed("a", A0, 1, Evidence.RESET, 1.0)
    assert made.all_healthy


def test_reports_of_probes_that_nobody_waits_for_change_nothing() -> None:
    made = health()
    made.probe_ok(A0)
    made.probe_failed(A0, 1.0)
    assert made.all_healthy and len(made) == 0
    eject(made)
    made.probe_ok(A0)
    made.probe_failed(A0, 1.0)
    assert made.state(A0) is RankState.TRIAL


class HealthMachine(RuleBasedStateMachine):
    """Any course of requests, failures, probes and fleets; a model says what must hold."""

    def __init__(self) -> None:
        super().__init__()
        self.health = Health(HealthConfig())
        self.groups = dict(GROUPS)
        self.health.keep(self.groups)
        self.now_s = 0.0
        self.open: list[tuple[str, str, int]] = []
        self.probing: set[str] = set()

    urls = st.sampled_from([A0, A1, B0])

    def group_of(self, url: str) -> str | None:
        return next((name for name, urls in self.groups.items() if url in urls), None)

    @rule(seconds=st.floats(0, 40))
    def wait(self, seconds: float) -> None:
        self.now_s += seconds

    @rule(url=urls)
    def send(self, url: str) -> None:
        group = self.group_of(url)
        if group is not None:
            self.open.append((group, url, self.health.begin(url)))

    @precondition(lambda self: self.open)
    @rule(data=st.data(), answered=st.booleans(), evidence=st.none() | st.sampled_from(Evidence))
    def finish(self, data: st.DataObject, answered: bool, evidence: Evidence | None) -> None:
        group, url, era = self.open.pop(data.draw(st.integers(0, len(self.open) - 1)))
        if answered:
            self.health.answered(url, era, self.now_s)
        self.health.end(url, era)
        if evidence is not None:
            version = self.health.version
            before = {one: self.health.state(one) for one in (A0, A1, B0)}
            self.health.failed(group, url, era, evidence, self.now_s)
            if self.health.version != version:
                expected = RankState.BUSY if evidence is Evidence.BUSY else RankState.EJECTED
                assert self.health.state(url) is expected
            elif before[url] is not RankState.EJECTED:
                assert self.health.state(url) is before[url]

    @rule()
    def probe(self) -> None:
        due = self.health.due_probes(self.now_s)
        assert len(set(due)) == len(due)
        for url in due:
            assert self.health.state(url) in (RankState.EJECTED, RankState.BUSY)
        self.probing.update(due)

    @precondition(lambda self: self.probing)
    @rule(data=st.data(), good=st.booleans())
    def report(self, data: st.DataObject, good: bool) -> None:
        url = data.draw(st.sampled_from(sorted(self.probing)))
        self.probing.discard(url)
        was = self.health.state(url)
        if good:
            self.health.probe_ok(url)
            assert self.health.state(url) is not RankState.EJECTED
            if was is not RankState.TRIAL:
                assert self.health.usable(url)
        else:
            self.health.probe_failed(url, self.now_s)
            expected = RankState.EJECTED if was is RankState.BUSY else was
            assert self.health.state(url) is expected

    @rule(names=st.sets(st.sampled_from(["a", "b"])))
    def change_fleet(self, names: set[str]) -> None:
        self.groups = {name: GROUPS[name] for name in sorted(names)}
        self.health.keep(self.groups)
        self.probing = {url for url in self.probing if self.group_of(url) is not None}

    @invariant()
    def remembers_no_more_than_the_fleet(self) -> None:
        there = {url for urls in self.groups.values() for url in urls}
        assert len(self.health) <= len(there)
        for url in (A0, A1, B0):
            if url not in there:
                assert self.health.state(url) is RankState.HEALTHY and self.health.usable(url)

    @invariant()
    def states_agree(self) -> None:
        states = [self.health.state(url) for url in (A0, A1, B0)]
        assert self.health.all_healthy is (set(states) == {RankState.HEALTHY})
        for url, state in zip((A0, A1, B0), states, strict=True):
            assert (self.health.ejected_at_s(url) is not None) is (state is RankState.EJECTED)
            if state is RankState.HEALTHY:
                assert self.health.usable(url)
            if state in (RankState.EJECTED, RankState.BUSY):
                assert not self.health.usable(url)

    def teardown(self) -> None:
        """Whatever has happened: a probe is due within a minute, and good ones bring all back."""
        out = (RankState.EJECTED, RankState.BUSY)
        ejected = {u for u in (A0, A1, B0) if self.health.state(u) in out}
        assert set(self.health.due_probes(self.now_s + 60.0)) == ejected
        for url in ejected:
            self.health.probe_ok(url)
        # Trials that are still open end first; their end must free the rank for another one.
        for _, url, era in self.open:
            self.health.end(url, era)
        for url in (A0, A1, B0):
            assert self.health.usable(url)
            era = self.health.begin(url)
            self.health.answered(url, era, self.now_s)
            self.health.end(url, era)
        assert self.health.all_healthy


HealthMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
test_every_course = HealthMachine.TestCase
