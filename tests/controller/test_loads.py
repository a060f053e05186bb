"""What a group does, from the totals in its ranks' answers."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertmesh.controller.gateways import NO_LATENCY, Latency
from expertmesh.controller.loads import EngineLoads, groups_doing
from expertmesh.core.domain.fleet import GroupSpec, GroupState, Parallelism, RankInfo
from expertmesh.core.scaling.contract import GroupRecord
from expertmesh.core.scaling.demand import GroupDoing

NAME = "em-tiny-cheap-1"
RECORD = GroupRecord(
    GroupSpec(NAME, "tiny", "/models/tiny", "cheap", Parallelism(1, 2, 2), 1024, 0.6),
    GroupState.READY,
    since_s=0.0,
    requested_at_s=0.0,
)


def rank(index: int, prompt: int, output: int, **changes: Any) -> RankInfo:
    info = RankInfo(
        NAME,
        "tiny",
        index,
        2,
        running=3,
        waiting=1,
        kv_usage=0.25,
        started_at_s=50.0 + index,
        uncached_prompt_tokens_total=prompt,
        output_tokens_total=output,
    )
    return replace(info, **changes)


def saw(engines: EngineLoads, at_s: float, *ranks: RankInfo | None) -> None:
    by_url = {f"http://rank-{index}": info for index, info in enumerate(ranks)}
    engines.saw(by_url, {url: at_s for url, info in by_url.items() if info is not None})


def doing(engines: EngineLoads, record: GroupRecord = RECORD) -> GroupDoing | None:
    return engines.doing(record, NO_LATENCY)


def test_rates_are_sums_over_the_ranks() -> None:
    engines = EngineLoads()
    saw(engines, 100.0, rank(0, 1000, 500), rank(1, 0, 0))
    assert doing(engines) is None
    saw(engines, 102.0, rank(0, 1200, 520, kv_usage=0.5), rank(1, 100, 10, running=1))
    assert engines.doing(RECORD, Latency(0.5, 0.02)) == GroupDoing(
        at_s=102.0,
        span_s=2.0,
        running=4,
        waiting=2,
        kv_usage=0.375,
        uncached_prompt_tokens_per_s=150.0,
        output_tokens_per_s=15.0,
        ttft_s=0.5,
        tpot_s=0.02,
    )


def test_a_rank_that_does_not_answer_shows_as_age() -> None:
    engines = EngineLoads()
    saw(engines, 100.0, rank(0, 0, 0), rank(1, 0, 0))
    saw(engines, 101.0, rank(0, 10, 1), rank(1, 10, 1))
    saw(engines, 104.0, rank(0, 40, 4), None)
    known = doing(engines)
    assert known is not None
    assert (known.at_s, known.span_s, known.output_tokens_per_s) == (101.0, 1.0, 2.0)


def test_a_rank_that_never_answered_leaves_the_group_unknown() -> None:
    engines = EngineLoads()
    saw(engines, 100.0, rank(0, 0, 0), None)
    saw(engines, 101.0, rank(0, 10, 1), None)
    assert doing(engines) is None


@pytest.mark.parametrize(
    "after",
    [
        pytest.param(rank(1, 5, 5, started_at_s=99.5), id="fewer tokens"),
        pytest.param(rank(1, 9000, 9000, started_at_s=99.5), id="more tokens than before"),
        pytest.param(rank(1, 5, 950), id="fewer tokens of one kind, by the same process"),
    ],
)
def test_a_restarted_rank_counts_from_its_own_start(after: RankInfo) -> None:
    engines = EngineLoads()
    saw(engines, 100.0, rank(0, 0, 0), rank(1, 800, 900))
    saw(engines, 101.0, rank(0, 0, 0), rank(1, 810, 910))
    saw(engines, 102.0, rank(0, 0, 0), after)
    assert doing(engines) is None
    later = replace(
        after,
        uncached_prompt_tokens_total=after.uncached_prompt_tokens_total + 30,
        output_tokens_total=after.output_tokens_total + 4,
    )
    saw(engines, 103.0, rank(0, 0, 0), later)
    known = doing(engines)
    assert known is not None
    assert (known.uncached_prompt_tokens_per_s, known.output_tokens_per_s) == (30.0, 4.0)


@pytest.mark.parametrize(
    ("state", "is_known"),
    [
        (GroupState.STARTING, False),
        (GroupState.READY, True),
        (GroupState.DRAINING, True),
        (GroupState.LOST, False),
    ],
)
def test_only_a_group_that_serves_does_anything(state: GroupState, is_known: bool) -> None:
    engines = EngineLoads()
    saw(engines, 100.0, rank(0, 0, 0), rank(1, 0, 0))
    saw(engines, 101.0, rank(0, 9, 9), rank(1, 9, 9))
    record = replace(RECORD, state=state)
    assert (doing(engines, record) is not None) is is_known
    assert groups_doing([record], engines, {}).keys() == ({NAME} if is_known else set())


def test_what_is_forgotten_is_not_known_any_more() -> None:
    engines = EngineLoads()
    saw(engines, 100.0, rank(0, 0, 0), rank(1, 0, 0))
    saw(engines, 101.0, rank(0, 9, 9), rank(1, 9, 9))
    engines.keep({NAME})
    assert doing(engines) is not None
    engines.keep(set())
    assert doing(engines) is None


def test_each_group_gets_its_own_latency() -> None:
    engines = EngineLoads()
    saw(engines, 100.0, rank(0, 0, 0), rank(1, 0, 0))
    saw(engines, 101.0, rank(0, 9, 9), rank(1, 9, 9))
    latencies = {NAME: Latency(0.5, None), "em-other": Latency(9.0, 9.0)}
    known = groups_doing([RECORD], engines, latencies)[NAME]
    assert (known.ttft_s, known.tpot_s) == (0.5, None)


@given(
    st.lists(
        st.tuples(st.floats(0.0, 20.0), st.integers(0, 5000), st.booleans(), st.booleans()),
        min_size=2,
        max_size=50,
    )
)
def test_no_restart_or_missed_answer_makes_more_tokens_than_there_were(
    steps: list[tuple[float, int, bool, bool]],
) -> None:
    """`steps`: seconds, new tokens, whether the rank restarts before, whether it answers."""
    engines = EngineLoads()
    record = replace(RECORD, spec=replace(RECORD.spec, parallelism=Parallelism(1, 1, 1)))
    now_s, started_at_s, total, made = 100.0, 50.0, 0, 0
    for gap_s, new, restarts, answers in steps:
        now_s += gap_s
        if restarts:
            started_at_s, total = now_s, 0
        total, made = total + new, made + new
        info = rank(0, total, total, started_at_s=started_at_s)
        saw(engines, now_s, info if answers else None)
        known = doing(engines, record)
        if known is not None:
            assert 0.0 <= known.output_tokens_per_s * known.span_s <= made * 1.002 + 0.5
