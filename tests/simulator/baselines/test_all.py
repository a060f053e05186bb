"""What holds for every baseline, whatever it sees."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.simulator.baselines.views import drained, group, option, scenario, started, view

from expertmesh.core.domain.fleet import GroupState
from expertmesh.core.domain.hardware import Market
from expertmesh.launch.policies import OWN, policy_names, read_policy
from expertmesh.simulator.policy import Move, View

TEXTS = [
    {"static": "static:groups=3", "skyserve": "skyserve:requests_per_s=2"}.get(name, name)
    for name in policy_names()
    if name != OWN
]
OPTIONS = (
    option("small", usd_per_hour=10.0),
    option("large", usd_per_hour=18.0, decode_tokens_per_s=2000.0),
    option("spot", usd_per_hour=4.0, market=Market.SPOT),
)
MADE = scenario(*OPTIONS, min_groups=1)

amounts = st.floats(0.0, 500.0)
groups = st.builds(
    group,
    number=st.integers(1, 30),
    option=st.integers(0, 2),
    state=st.sampled_from(
        [GroupState.STARTING, GroupState.READY, GroupState.READY, GroupState.DRAINING]
    ),
    in_flight=st.floats(100.0, 500.0),
    waiting=st.floats(0.0, 100.0),
    kv_usage=st.floats(0.0, 1.0),
    prompt_tokens_per_s=amounts,
    output_tokens_per_s=amounts,
)
looks = st.lists(
    st.builds(
        view,
        groups=st.lists(groups, max_size=12, unique_by=lambda group: group.name),
        room=st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(0, 5)),
        queued=amounts,
        arrivals_per_s=amounts,
        prompt_tokens=st.floats(1.0, 5000.0),
        output_tokens=st.floats(1.0, 5000.0),
    ),
    min_size=1,
    max_size=8,
)


def decisions(text: str, seen: Sequence[View], every_s: float) -> list[tuple[Move, ...]]:
    policy = read_policy(text)(MADE)
    return [policy.decide(replace(one, now_s=index * every_s)) for index, one in enumerate(seen)]


@pytest.mark.parametrize("text", TEXTS)
@settings(max_examples=25, deadline=None)
@given(seen=looks, every_s=st.sampled_from([10.0, 60.0, 400.0]))
def test_moves_are_possible_and_the_same_each_time(
    text: str, seen: list[View], every_s: float
) -> None:
    made = decisions(text, seen, every_s)
    assert made == decisions(text, seen, every_s)
    for one, moves in zip(seen, made, strict=True):
        for index in range(len(OPTIONS)):
            assert started(moves).count(index) <= one.room[index]
        leaving = drained(moves)
        active = {
            group.name
            for group in one.groups
            if group.state in (GroupState.STARTING, GroupState.READY)
        }
        assert len(set(leaving)) == len(leaving)
        assert set(leaving) <= active
