from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertmesh.core.admission.slots import SlotRules, has_room
from expertmesh.core.domain.fleet import GroupLoad

RULES = SlotRules()
LOAD = GroupLoad(kv_usage=0.5, kv_tokens=10_000, max_running=8)


def room(
    load: GroupLoad = LOAD,
    rules: SlotRules = RULES,
    *,
    ranks: int = 2,
    elsewhere: int = 0,
    in_flight: int = 1,
    tokens_in_flight: int = 0,
    since: int = 0,
    prompt: int = 100,
    tokens: int = 200,
) -> bool:
    return has_room(
        rules, load, ranks, elsewhere, in_flight, tokens_in_flight, since, prompt, tokens
    )


@pytest.mark.parametrize(("elsewhere", "in_flight"), [(0, 9), (9, 0), (4, 5)])
def test_the_batch_and_one_in_waiting_per_rank(elsewhere: int, in_flight: int) -> None:
    assert room(elsewhere=elsewhere, in_flight=in_flight)
    assert not room(elsewhere=elsewhere + 1, in_flight=in_flight)
    assert not room(elsewhere=elsewhere, in_flight=in_flight + 1)


def test_an_engine_that_does_not_say_its_batch_has_a_bound_too() -> None:
    unknown = replace(LOAD, max_running=0)
    assert room(unknown, in_flight=511)
    assert not room(unknown, in_flight=512)
    assert room(unknown, replace(RULES, max_in_flight_per_rank=2), in_flight=3)
    assert not room(unknown, replace(RULES, max_in_flight_per_rank=2), in_flight=4)


def test_the_cache_has_a_ceiling_and_what_was_sent_since_the_report_counts() -> None:
    assert room(prompt=4_500)
    assert not room(prompt=4_501)
    assert room(since=4_000, prompt=500)
    assert not room(since=4_000, prompt=501)
    assert not room(replace(LOAD, kv_usage=0.951), prompt=0)


def test_without_a_known_cache_only_the_batch_counts() -> None:
    assert room(replace(LOAD, kv_tokens=0, kv_usage=1.0), prompt=10**6)


def test_long_completions_can_be_bounded_too() -> None:
    rules = replace(RULES, kv_overcommit=1.5)
    assert room(rules=rules, tokens_in_flight=14_000, tokens=1_000)
    assert not room(rules=rules, tokens_in_flight=14_000, tokens=1_001)
    assert room(tokens_in_flight=14_000, tokens=1_001)


LOADS = st.builds(
    GroupLoad,
    kv_usage=st.floats(0, 1),
    kv_tokens=st.integers(0, 10**6),
    max_running=st.integers(0, 600),
)
COUNT = st.integers(0, 700)
TOKENS = st.integers(0, 2 * 10**6)


@given(LOADS, st.integers(1, 16), TOKENS, TOKENS)
def test_an_idle_group_takes_anything(load: GroupLoad, ranks: int, since: int, prompt: int) -> None:
    assert room(load, ranks=ranks, in_flight=0, since=since, prompt=prompt, tokens=prompt)


@given(LOADS, st.integers(1, 16), COUNT, COUNT, TOKENS, TOKENS, st.integers(1, 100))
def test_more_work_never_makes_room(
    load: GroupLoad, ranks: int, elsewhere: int, in_flight: int, since: int, prompt: int, more: int
) -> None:
    if not room(
        load, ranks=ranks, elsewhere=elsewhere, in_flight=in_flight, since=since, prompt=prompt
    ):
        for worse in (
            {"elsewhere": elsewhere + more},
            {"in_flight": in_flight + more},
            {"since": since + more},
            {"prompt": prompt + more},
        ):
            usual = {
                "elsewhere": elsewhere,
                "in_flight": in_flight,
                "since": since,
                "prompt": prompt,
            }
            assert not room(load, ranks=ranks, **(usual | worse))


@given(LOADS, st.integers(1, 16), st.lists(st.integers(0, 10_000), max_size=1_000))
def test_admitting_while_there_is_room_keeps_the_bounds(
    load: GroupLoad, ranks: int, prompts: list[int]
) -> None:
    in_flight = sent = 0
    for prompt in prompts:
        if room(load, ranks=ranks, in_flight=in_flight, since=sent, prompt=prompt):
            in_flight += 1
            sent += prompt
    most = load.max_running + ranks if load.max_running else 256 * ranks
    assert in_flight <= most
    if load.kv_tokens and in_flight > 1:
        first = max(prompts)  # The first of all is let in whatever its length.
        assert load.kv_usage * load.kv_tokens + sent <= max(
            0.95 * load.kv_tokens, load.kv_usage * load.kv_tokens + first
        )
