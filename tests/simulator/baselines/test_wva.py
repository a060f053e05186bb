"""llm-d's two saturation analyzers, with the examples of their documentation and code."""

from collections.abc import Sequence

import pytest
from tests.simulator.baselines.views import drained, group, groups, option, scenario, started, view

from expertmesh.core.domain.fleet import GroupState
from expertmesh.simulator.baselines.wva_v1 import WvaV1
from expertmesh.simulator.baselines.wva_v2 import WvaV2
from expertmesh.simulator.policy import GroupView
from expertmesh.simulator.scenario import Scenario

CHEAP, DEAR = 1, 0


def two_variants() -> Scenario:
    return scenario(option("a100", usd_per_hour=20.0), option("h100", usd_per_hour=15.0))


def documented(kv: Sequence[float], queues: Sequence[float]) -> list[GroupView]:
    """Two A100 and three H100 replicas."""
    return [
        group(number, option=DEAR if number <= 2 else CHEAP, kv_usage=usage, waiting=queue)
        for number, (usage, queue) in enumerate(zip(kv, queues, strict=True), 1)
    ]


def test_v1_is_content_with_the_documented_example() -> None:
    """Spare 0.15 and 3.2 on average, but -0.01 with one replica fewer."""
    there = documented((0.70, 0.75, 0.60, 0.65, 0.55), (2, 3, 1, 2, 1))
    assert WvaV1(two_variants()).decide(view(groups=there, room=(9, 9))) == ()


@pytest.mark.parametrize(
    ("kv", "queues"),
    [
        ((0.75, 0.75, 0.72, 0.71, 0.70), (0, 0, 0, 0, 0)),
        ((0.1, 0.1, 0.1, 0.1, 0.1), (3, 3, 2, 2, 1)),
        ((0.9, 0.9, 0.9, 0.9, 0.9), (9, 9, 9, 9, 9)),
    ],
)
def test_v1_adds_one_of_the_cheapest_when_little_is_spare(
    kv: tuple[float, ...], queues: tuple[float, ...]
) -> None:
    moves = WvaV1(two_variants()).decide(view(groups=documented(kv, queues), room=(9, 9)))
    assert (started(moves), drained(moves)) == ([CHEAP], [])


def test_v1_skips_a_variant_with_a_replica_on_the_way() -> None:
    there = documented((0.75,) * 5, (0,) * 5)
    there.append(group(6, option=CHEAP, state=GroupState.STARTING))
    policy = WvaV1(two_variants())
    assert started(policy.decide(view(0.0, groups=there, room=(9, 9)))) == [DEAR]
    there.append(group(7, option=DEAR, state=GroupState.STARTING))
    assert policy.decide(view(60.0, groups=there, room=(9, 9))) == ()


def test_v1_removes_one_of_the_dearest_when_the_rest_is_safe() -> None:
    there = documented((0.2,) * 5, (0,) * 5)
    moves = WvaV1(two_variants()).decide(view(groups=there, room=(9, 9)))
    assert (started(moves), drained(moves)) == ([], ["g2"])


def test_v1_looks_at_the_highest_values_of_a_minute_once_a_minute() -> None:
    policy = WvaV1(scenario())
    assert policy.decide(view(0.0, groups=groups(2, kv_usage=0.5))) == ()
    assert policy.decide(view(10.0, groups=groups(2, kv_usage=0.75))) == ()
    assert started(policy.decide(view(60.0, groups=groups(2, kv_usage=0.5)))) == [0]


def test_v1_counts_requests_that_a_gateway_holds_as_queued() -> None:
    policy = WvaV1(scenario())
    assert started(policy.decide(view(groups=groups(2), queued=6))) == [0]


def test_v1_keeps_one_replica_and_lets_it_go_after_ten_minutes_without_requests() -> None:
    policy = WvaV1(scenario())
    policy.decide(view(0.0, groups=groups(1, in_flight=1)))
    assert policy.decide(view(540.0, groups=groups(1))) == ()
    assert drained(policy.decide(view(600.0, groups=groups(1)))) == ["g1"]
    assert policy.decide(view(610.0)) == ()
    assert started(policy.decide(view(620.0, queued=1))) == [0]


def test_v2_capacity_is_what_the_engine_can_batch() -> None:
    """min(B·O/(I + O), S)·(I + O/2) = min(1000·100/500, 100)·450 = 45,000 of 80,000 tokens.

    0.5 of 100,000 tokens in each of 2 are 100,000; over 0.85 they need 117,647 tokens: 1 more.
    """
    policy = WvaV2(scenario())
    seen = view(groups=groups(2, kv_usage=0.5), prompt_tokens=400, output_tokens=100)
    assert started(policy.decide(seen)) == [0]


def test_v2_capacity_is_bound_by_memory() -> None:
    """80,000 tokens each; 2 with 70,000 in use need 164,706 in all."""
    policy = WvaV2(scenario(option(max_seqs=10_000, max_batched_tokens=100_000)))
    seen = view(groups=groups(2, kv_usage=0.7), prompt_tokens=400, output_tokens=100)
    assert started(policy.decide(seen)) == [0]


def test_v2_counts_replicas_on_the_way() -> None:
    policy = WvaV2(scenario(option(max_seqs=10_000, max_batched_tokens=100_000)))
    there = (*groups(2, kv_usage=0.7), group(3, state=GroupState.STARTING))
    assert policy.decide(view(groups=there, prompt_tokens=400, output_tokens=100)) == ()


def test_v2_learns_capacity_from_a_queue() -> None:
    """Saturated at 20,000 tokens each, 60,000 with what waits are 70,588 over 0.85: 2 more."""
    policy = WvaV2(scenario())
    there = groups(2, kv_usage=0.2, waiting=25)
    seen = view(groups=there, prompt_tokens=400, output_tokens=100)
    assert len(started(policy.decide(seen))) == 2
    # It remembers: the same load without a queue is 40,000 of 40,000.
    after = view(60.0, groups=groups(2, kv_usage=0.2), prompt_tokens=400, output_tokens=100)
    assert len(started(policy.decide(after))) == 1


def test_v2_buys_what_is_cheapest_for_its_capacity() -> None:
    large = option("large", usd_per_hour=30.0, kv_tokens=400_000)
    small = option("small", usd_per_hour=10.0, kv_tokens=100_000)
    policy = WvaV2(scenario(small, large))
    there = groups(2, option=0, kv_usage=0.95)
    assert started(policy.decide(view(groups=there, room=(9, 9)))) == [1]
    assert started(WvaV2(scenario(small, large)).decide(view(groups=there, room=(9, 0)))) == [0]


def test_v2_releases_the_dearest_after_five_minutes_of_less_need() -> None:
    dear, cheap = option("dear", usd_per_hour=30.0), option("cheap", usd_per_hour=10.0)
    policy = WvaV2(scenario(dear, cheap))
    there = [group(1, 0, kv_usage=0.7), group(2, 0, kv_usage=0.7), group(3, 1, kv_usage=0.5)]
    assert policy.decide(view(0.0, groups=there, room=(9, 9))) == ()
    idle = [group(1, 0, kv_usage=0.1), group(2, 0, kv_usage=0.1), group(3, 1, kv_usage=0.1)]
    for now_s in range(60, 300, 60):
        assert policy.decide(view(now_s, groups=idle, room=(9, 9))) == ()
    # 240,000 - 30,000 / 0.7 are 197,000 spare: two replicas of 80,000, the dear ones.
    assert drained(policy.decide(view(300.0, groups=idle, room=(9, 9)))) == ["g2", "g1"]


def test_v2_keeps_the_last_replica() -> None:
    policy = WvaV2(scenario())
    for now_s in range(0, 540, 60):
        assert policy.decide(view(now_s, groups=groups(1, in_flight=1, kv_usage=0.01))) == ()
