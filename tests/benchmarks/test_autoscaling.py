"""The benchmark of scaling policies: what it tunes, what it chooses, what its tables say."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from benchmarks.autoscaling_bench.cases import CASES, Case, Part, Situation
from benchmarks.autoscaling_bench.grids import Candidate, grid, published
from benchmarks.autoscaling_bench.tables import Measured, front_table, policies_table
from benchmarks.autoscaling_bench.tuning import Tried, Tuned, attempt, choose, run, tune

from expertmesh.launch.policies import OWN, policy_names, read_policy
from expertmesh.simulator.synthetic import steps


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 minutes of rising and falling load, in the form of Azure's traces."""
    parts = [(600.0, 2.0), (600.0, 5.0), (600.0, 1.0), (600.0, 4.0)]
    requests = steps(parts, seed=3, prompt_tokens=1200, output_tokens=100, sigma=0.5)
    folder = tmp_path_factory.mktemp("traces")
    rows = zip(requests.at_s, requests.prompt_tokens, requests.output_tokens, strict=True)
    lines = ["at_s,prompt_tokens,output_tokens", *(f"{t:.3f},{p},{o}" for t, p, o in rows)]
    (folder / "made.csv").write_text("\n".join(lines))
    return folder


CASE = Case(
    "made",
    "A made load",
    "azure",
    8.0,
    tune=(Part("made.csv", 0.0, 1 / 3),),
    report=Part("made.csv", 1 / 3),
    whole=Part("made.csv"),
    tune_seeds=(101,),
)


@pytest.fixture(scope="module")
def situation(traces: Path) -> Situation:
    return Situation(CASE, CASE.report, 1, traces)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_no_case_is_tuned_on_what_it_reports(case: Case) -> None:
    for part in case.tune:
        if part.trace == case.report.trace:
            assert part.end_h is not None
            assert part.end_h <= case.report.start_h
    assert not set(case.tune_seeds) & {1, 2, 3}


def test_a_part_is_scaled_and_the_fleet_at_the_start_fits_it(situation: Situation) -> None:
    assert situation.load.span_s == pytest.approx(1200.0, abs=2.0)
    # 2.5 requests a second on average, 8 times.
    assert situation.load.requests.sum() == pytest.approx(24_000, rel=0.05)
    loads = situation.problem.loads[:, 0]
    usual = max(loads[:10].mean(), loads.mean())
    assert situation.scenario.initial_groups == (int(np.ceil(1.2 * usual)),)


def test_the_oracle_is_cheaper_than_the_best_fleet_that_never_changes(
    situation: Situation,
) -> None:
    assert 0.0 < situation.oracle.usd <= situation.static_usd


@pytest.mark.parametrize("name", policy_names())
def test_every_candidate_of_a_grid_can_be_made(name: str, situation: Situation) -> None:
    candidates = grid(name, situation)
    assert len(set(candidates)) == len(candidates) >= 4
    assert {candidate.name for candidate in candidates} == {name}
    for candidate in candidates:
        assert read_policy(candidate.policy)(situation.scenario) is not None
    assert set(grid(name, situation, thin=True)) <= set(candidates)


def test_several_options_widen_the_grid_of_policies_that_know_one(traces: Path) -> None:
    mixed = replace(CASE, scenario="r1-mixed")
    candidates = grid("knative", Situation(mixed, mixed.report, 1, traces))
    assert {c.policy.rpartition("option=")[2] for c in candidates[:-1]} == {"0", "1", "2"}
    own = grid("wva-v2", Situation(mixed, mixed.report, 1, traces))
    assert not any("option=" in candidate.policy for candidate in own)


def test_published_policies_have_no_parameters_but_those_without_a_default(
    situation: Situation,
) -> None:
    texts = {candidate.name: candidate.policy for candidate in published(situation)}
    assert texts.pop("skyserve").startswith("skyserve:requests_per_s=")
    assert all(name == text for name, text in texts.items())
    assert "static" not in texts


def test_an_aim_changes_the_target_of_the_scenario(situation: Situation) -> None:
    made = Candidate(OWN, 0.95).scenario(situation.scenario)
    assert made.slo.attainment == 0.95
    assert Candidate(OWN).scenario(situation.scenario) is situation.scenario
    assert Candidate(OWN, 0.95).parameters == "attainment=0.95"


def tried(usd: float, attained: float) -> Tried:
    return Tried(Candidate(f"static:groups={usd:g}"), usd, attained)


def test_the_cheapest_that_attains_the_goal_is_chosen() -> None:
    cheap, good, best = tried(1, 0.98), tried(2, 0.99), tried(3, 1.0)
    assert choose([cheap, best, good], 0.99) is good


def test_where_none_attains_the_goal_the_nearest_is_chosen() -> None:
    assert choose([tried(1, 0.9), tried(3, 0.95), tried(2, 0.95)], 0.99) == tried(2, 0.95)


def test_the_front_leaves_out_what_is_dearer_and_no_better() -> None:
    points = (tried(3, 0.9), tried(1, 0.5), tried(2, 0.95), tried(4, 0.99), tried(2, 0.8))
    front = Tuned(points[0], points).front
    assert [(one.usd, one.attained) for one in front] == [(1, 0.5), (2, 0.95), (4, 0.99)]


def test_tuning_finds_the_smallest_static_fleet_that_is_enough(traces: Path) -> None:
    part = Situation(CASE, CASE.tune[0], 101, traces)
    candidates = [Candidate(f"static:groups={count}") for count in range(1, 9)]
    found = tune([part], candidates)
    count = int(found.chosen.candidate.policy.rpartition("=")[2])
    assert 1 < count < 8
    assert found.chosen.attained >= 0.99
    assert attempt([part], candidates[count - 2]).attained < 0.99


def test_a_static_fleet_is_there_from_the_start(situation: Situation) -> None:
    outcome = run(situation, Candidate("static:groups=7"))
    assert outcome.counts.starts == 0
    assert outcome.usd == pytest.approx(7 * 28 * 1200 / 3600, rel=0.01)


def test_a_policy_for_one_option_starts_with_groups_of_it(traces: Path) -> None:
    mixed = Situation(replace(CASE, scenario="r1-mixed"), CASE.report, 1, traces)
    usual = run(mixed, Candidate("keda-running:threshold=1")).series.groups[0].sum(axis=1)
    other = run(mixed, Candidate("keda-running:threshold=1,option=0")).series.groups[0].sum(axis=1)
    assert usual[2] > 0
    assert usual[:2].sum() == 0
    assert other[0] > 0
    assert other[1:].sum() == 0


def test_a_run_by_requests_says_so(traces: Path) -> None:
    short = Situation(CASE, Part("made.csv", 0.0, 0.05), 1, traces)
    outcome = run(short, Candidate("static:groups=4"), event=True)
    assert (outcome.mode, outcome.attainment.both) == ("event", 1.0)
    assert outcome.requests == len(short.requests)


def test_attempts_add_the_parts_and_take_the_worst_of_them(situation: Situation) -> None:
    few = replace(situation, part=CASE.tune[0])
    candidate = Candidate("static:groups=3")
    both = attempt([situation, few], candidate)
    one, other = run(situation, candidate), run(few, candidate)
    assert both.usd == pytest.approx(one.usd + other.usd)
    assert both.attained == pytest.approx(min(one.attainment.both, other.attainment.both))


def test_tables_put_those_that_attain_the_goal_first(situation: Situation) -> None:
    measured = [
        Measured(candidate, True, (situation,), (run(situation, candidate),))
        for candidate in (Candidate("static:groups=1"), Candidate("static:groups=20"))
    ]
    figure = policies_table(CASE, "the part", measured, "fluid")
    attained = [float(row[figure.columns.index("attained %")]) for row in figure.rows]
    assert attained[0] >= 99.0 > attained[1]
    assert float(figure.rows[1][1]) < float(figure.rows[0][1])


def test_the_front_s_table_has_the_least_cost_for_each_level() -> None:
    fronts = {"a": [(1.0, 0.9), (1.5, 0.992), (2.0, 0.9995)], "b": [(1.2, 0.991)]}
    rows = {row[0]: row[1:] for row in front_table(CASE, fronts).rows}
    assert rows["a"] == ("1.50", "1.50", "1.50", "2.00", "2.00")
    assert rows["b"] == ("1.20", "1.20", "1.20", "-", "-")
    assert list(rows) == ["b", "a"]
