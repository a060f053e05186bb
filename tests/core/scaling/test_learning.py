"""Groups here really take `t0 + s * b` for an iteration with b requests in the batch."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertmesh.core.domain.option import GroupRates
from expertmesh.core.domain.slo import Slo
from expertmesh.core.scaling.demand import GroupDoing
from expertmesh.core.scaling.learning import Learned, learn, speed_of, tpot_now_s, usual_ratio
from expertmesh.core.scaling.work import Work

SLO = Slo(ttft_s=2.0, tpot_s=0.05)
T0, S = 0.02, 0.03 / 64
OUTPUT = 256.0
WORK = Work(finished_per_s=5.0, output_tokens_per_s=5.0 * OUTPUT, finished=1000.0)
RATES = GroupRates(256.0, None, None, T0)
PLANNED = GroupRates(256.0, 1e9, 1280.0, T0)
FULL = 64.0
"""The batch at which an iteration takes 50 ms."""


def doing(
    batch: float, s: float = S, kv: float = 0.0, tpot: bool = True, at_s: float = 0.0
) -> GroupDoing:
    t = T0 + s * batch
    return GroupDoing(at_s, 10.0, round(batch), 0, kv, 0.0, batch / t, 0.1, t if tpot else None)


@pytest.mark.parametrize("batch", [16, 32, 64, 90])
def test_from_any_batch_follows_what_a_full_group_does(batch: int) -> None:
    speed = speed_of(doing(batch), RATES, T0, WORK, SLO)
    assert speed is not None
    assert speed.seconds == pytest.approx(OUTPUT * 0.05 / FULL)
    rate, full_rate = batch / (T0 + S * batch), FULL / 0.05
    assert speed.use == pytest.approx(rate / full_rate)


def test_use_is_above_one_beyond_the_target() -> None:
    speed = speed_of(doing(90), RATES, T0, WORK, SLO)
    assert speed is not None
    assert speed.use > 1.0


@given(st.floats(0.25, 4.0), st.integers(20, 60))
def test_a_slower_group_carries_less_in_proportion(slower: float, batch: int) -> None:
    speed = speed_of(doing(batch, S * slower), RATES, T0, WORK, SLO)
    if speed is None:
        return
    full = min(FULL / slower, 256.0)
    t = T0 + S * slower * full
    assert speed.seconds == pytest.approx(OUTPUT * t / full, rel=1e-6)


def test_the_cache_bounds_the_batch() -> None:
    speed = speed_of(doing(32, kv=0.8), RATES, T0, WORK, SLO)
    assert speed is not None
    full = 32 * 0.9 / 0.8
    assert speed.seconds == pytest.approx(OUTPUT * (T0 + S * full) / full)


def test_the_places_bound_the_batch() -> None:
    speed = speed_of(doing(32), GroupRates(40.0, None, None, T0), T0, WORK, SLO)
    assert speed is not None
    assert speed.seconds == pytest.approx(OUTPUT * (T0 + S * 40) / 40)


@pytest.mark.parametrize(
    ("seen", "lone_tpot_s", "work"),
    [
        pytest.param(doing(2), T0, WORK, id="nearly idle"),
        pytest.param(doing(32), None, WORK, id="no time of a lone request"),
        pytest.param(doing(32), 0.05, WORK, id="a lone request misses the target"),
        pytest.param(doing(32), T0, Work(), id="no known work"),
        pytest.param(GroupDoing(0.0, 10.0, 0, 0, 0.0, 0.0, 0.0), T0, WORK, id="nothing runs"),
        pytest.param(
            GroupDoing(0.0, 10.0, 9, 0, 0.0, 0.0, 0.0), T0, WORK, id="no token has come out"
        ),
    ],
)
def test_what_tells_nothing(seen: GroupDoing, lone_tpot_s: float | None, work: Work) -> None:
    assert speed_of(seen, RATES, lone_tpot_s, work, SLO) is None


def test_an_answers_time_per_token_is_the_youngest_there_is() -> None:
    seen = GroupDoing(0.0, 10.0, 128, 0, 0.0, 0.0, 2000.0, 0.1, 0.03)
    assert tpot_now_s(seen, RATES, WORK) == pytest.approx(128 / 2000)
    few = GroupDoing(0.0, 10.0, 2, 0, 0.0, 0.0, 2000.0, 0.1, 0.03)
    assert tpot_now_s(few, RATES, WORK) == 0.03
    short = Work(finished_per_s=5.0, output_tokens_per_s=5.0, finished=1000.0)
    assert tpot_now_s(seen, RATES, short) == 0.03


def taught(
    slower: float, seconds: int, planned: GroupRates = PLANNED, known: Learned | None = None
) -> Learned | None:
    for _ in range(seconds):
        known = learn(known, planned, doing(40, S * slower), WORK, SLO, 1.0, 1.0)
    return known


@pytest.mark.parametrize("slower", [0.5, 1.0, 2.0])
def test_the_ratio_follows_what_groups_really_do(slower: float) -> None:
    learned = taught(slower, 1200)
    assert learned is not None
    full = FULL / slower
    truth = (OUTPUT * 0.05 / full) / (OUTPUT / 1280.0)
    assert learned.seconds_ratio == pytest.approx(truth, rel=0.01)
    assert learned.measured_s == 1200


def test_a_plan_of_something_else_is_followed_only_so_far() -> None:
    learned = taught(1.0, 2000, GroupRates(256.0, 1e9, 1280.0 * 50, T0))
    assert learned is not None
    assert learned.seconds_ratio == pytest.approx(5.0, rel=0.01)


def test_contexts_that_grow_are_followed_within_minutes_and_what_is_own_later() -> None:
    before = taught(1.0, 7200)
    after = taught(2.0, 360, known=before)
    assert before is not None
    assert after is not None
    assert after.seconds_ratio > 1.8
    assert after.own_ratio < 1.2


def test_where_nothing_is_planned_seconds_are_learned_themselves() -> None:
    unplanned = GroupRates(256.0)
    known = learn(None, unplanned, doing(1), WORK, SLO, 1.0, 1.0)
    assert known is not None
    assert known.lone_tpot_s == pytest.approx(T0 + S)
    assert known.seconds is None
    learned = taught(1.0, 600, unplanned, known)
    assert learned is not None
    assert learned.seconds == pytest.approx(OUTPUT * 0.05 / FULL, rel=0.05)


def test_what_all_options_share_is_not_an_options_own() -> None:
    known: Learned | None = None
    for _ in range(4 * 3600):
        known = learn(known, PLANNED, doing(40, 2 * S), WORK, SLO, 1.0, 2.0)
    assert known is not None
    assert known.seconds_ratio == pytest.approx(2.0, rel=0.01)
    assert known.own_ratio == pytest.approx(1.0, rel=0.05)


def test_no_time_teaches_nothing() -> None:
    known = Learned(seconds_ratio=1.3)
    assert learn(known, PLANNED, doing(40, 2 * S), WORK, SLO, 0.0, 1.0) == known
    assert learn(None, PLANNED, doing(40), WORK, SLO, 0.0, 1.0) is None


def test_what_slows_one_option_slows_all() -> None:
    assert usual_ratio([]) == 1.0
    assert usual_ratio([Learned()]) == 1.0
    slow = Learned(seconds_ratio=2.0, own_ratio=1.0, measured_s=600.0)
    assert usual_ratio([slow, Learned()]) == 2.0
    own = Learned(seconds_ratio=2.0, own_ratio=2.0, measured_s=600.0)
    assert usual_ratio([own]) == 1.0
    assert usual_ratio([slow, own]) == pytest.approx(1.5)


def test_a_group_that_stands_still_tells_nothing() -> None:
    still = replace(doing(64), output_tokens_per_s=1e-308)
    assert speed_of(still, PLANNED, 0.02, WORK, SLO) is None


def test_what_was_measured_long_ago_fades_and_then_the_plan_counts_again() -> None:
    old = Learned(seconds_ratio=3.0, measured_s=600.0, at_s=0.0)
    new = Learned(seconds_ratio=1.5, measured_s=600.0, at_s=10_000.0)
    assert usual_ratio([old], 0.0) == pytest.approx(3.0)
    assert 1.5 < usual_ratio([old], 3600.0) < 2.0
    assert usual_ratio([old], 1e6) == pytest.approx(1.0)
    assert usual_ratio([old, new], 10_000.0) == pytest.approx(1.5, rel=0.1)
    assert usual_ratio([old], -500.0) == pytest.approx(3.0), "a clock that was set back"


@pytest.mark.parametrize("rates", [RATES, PLANNED])
def test_what_was_learned_while_the_machine_was_busy_is_unlearned_when_it_is_not(
    rates: GroupRates,
) -> None:
    """A batch of 4 took as long as a full one; later it is as quick as a request alone."""
    known: Learned | None = None
    for _ in range(90):
        known = learn(known, rates, doing(4, S * 16), WORK, SLO, 10.0, 1.0)
    assert known is not None
    fair_s = OUTPUT * 0.05 / FULL
    slow_s = known.seconds or (rates.seconds(0.0, OUTPUT) or 0.0) * known.seconds_ratio
    assert slow_s > 4 * fair_s
    for _ in range(90):
        known = learn(known, rates, doing(4), WORK, SLO, 10.0, 1.0)
    assert known is not None
    quick_s = known.seconds or (rates.seconds(0.0, OUTPUT) or 0.0) * known.seconds_ratio
    assert fair_s <= quick_s < 2 * fair_s


def test_a_quick_group_with_little_to_do_does_not_make_the_others_better_than_they_are() -> None:
    known = learn(None, RATES, doing(64), WORK, SLO, 600.0, 1.0)
    assert learn(known, RATES, doing(4), WORK, SLO, 600.0, 1.0) == known
