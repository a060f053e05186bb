"""Expert counts arrive as totals of each rank and leave as one growing counter."""

from expertmesh.controller.metrics import ControllerMetrics
from expertmesh.core.domain.fleet import RankInfo


def rank(index: int, tokens: dict[str, int]) -> RankInfo:
    return RankInfo("em-tiny-cheap-1", "tiny", index, 2, 0, 0, 0.0, expert_tokens=tokens)


def counted(metrics: ControllerMetrics) -> dict[str, float]:
    lines = metrics.text().decode().splitlines()
    samples = [line for line in lines if line.startswith("em_expert_tokens_total{")]
    return {line.split('expert="')[1].split('"')[0]: float(line.split()[-1]) for line in samples}


def test_each_look_adds_what_is_new() -> None:
    metrics = ControllerMetrics()
    metrics.saw_ranks([rank(0, {"0": 10, "1": 5}), rank(1, {"2": 7})])
    metrics.saw_ranks([rank(0, {"0": 12, "1": 5}), None])
    assert counted(metrics) == {"0": 12, "1": 5, "2": 7}


def test_a_rank_that_was_not_seen_for_a_while_is_not_counted_twice() -> None:
    metrics = ControllerMetrics()
    metrics.saw_ranks([rank(0, {"0": 10})])
    metrics.saw_ranks([None])
    metrics.saw_ranks([rank(0, {"0": 11})])
    assert counted(metrics) == {"0": 11}


def test_a_restarted_rank_goes_on_from_where_it_was() -> None:
    metrics = ControllerMetrics()
    metrics.saw_ranks([rank(0, {"0": 10, "1": 8})])
    metrics.saw_ranks([rank(0, {"0": 3, "1": 9})])
    assert counted(metrics) == {"0": 13, "1": 17}
