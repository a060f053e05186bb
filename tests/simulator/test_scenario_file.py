"""From a scenario file to what is simulated."""

from pathlib import Path

import pytest
import yaml
from pydantic import TypeAdapter

from expertmesh.core.domain.hardware import Market
from expertmesh.simulator.scenario import Availability
from expertmesh.simulator.scenario_file import load_scenario, to_scenario
from expertmesh.spec.scenario import ScenarioManifest

TEXT = """
kind: Scenario
name: small
typical_request: {prompt_tokens: 400, output_tokens: 100}
slo: {ttft_s: 3, tpot_s: 0.04, attainment: 0.95}
max_wait_s: 7
min_groups: 1
budget: {usd_per_hour: 99}
seed: 4
options:
  - pool: od
    market: on-demand
    parallelism: {expert: 16, tensor: 2}
    nodes: 2
    max_groups: 4
    initial_groups: 1
    usd_per_hour: 10
    plan_error: 1.25
    start: {median_s: 60, told_s: 90, sigma: 0.2, failure_probability: 0.1}
    service: &service {alpha_s: 0.02, beta_s: 2.0e-5, gamma_s: 2.0e-7, kv_tokens: 400000,
                       max_seqs: 50, max_batched_tokens: 4096}
  - pool: spot
    market: spot
    parallelism: {expert: 16}
    nodes: 2
    max_groups: 3
    usd_per_hour: 4
    rates: {in_flight: 9, prefill_tokens_per_s: 8, decode_tokens_per_s: 7}
    start: {median_s: 60}
    service: *service
    availability: {at_s: [0, 100], nodes: [6, 0], notice_s: 30}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(TEXT)
    return path


def test_every_value_arrives(file: Path) -> None:
    scenario = load_scenario(file)
    assert (scenario.name, scenario.max_wait_s, scenario.seed) == ("small", 7.0, 4)
    assert (scenario.slo.ttft_s, scenario.slo.tpot_s, scenario.slo.attainment) == (3.0, 0.04, 0.95)
    assert (scenario.min_groups, scenario.budget_usd_per_hour) == (1, 99.0)
    assert scenario.initial_groups == (1, 0)
    on_demand, spot = scenario.options
    assert on_demand.option.name == "od/t2d8e16"
    assert (on_demand.option.start_s, on_demand.start.median_s) == (90.0, 60.0)
    assert (on_demand.start.sigma, on_demand.start.failure_probability) == (0.2, 0.1)
    assert (on_demand.nodes, on_demand.max_groups, on_demand.market) == (2, 4, Market.ON_DEMAND)
    assert on_demand.availability is None
    assert spot.availability == Availability((0.0, 100.0), (6, 0), 30.0)
    assert (spot.option.start_s, spot.option.usd_per_hour) == (60.0, 4.0)


def test_rates_that_are_told_are_written_or_follow_from_the_service_times(file: Path) -> None:
    on_demand, spot = load_scenario(file).options
    assert spot.option.rates.in_flight == 9.0
    # 50 at once, at most; 1.25 times that is what is told.
    assert on_demand.option.rates.in_flight == pytest.approx(62.5)
    assert on_demand.option.rates.prefill_tokens_per_s == pytest.approx(1.25 / 2e-5)
    context = 400 + 100 * (1 + 1.0) / 2
    decode = 1.25 / (0.02 / 50 + 2e-5 + 2e-7 * context)
    assert on_demand.option.rates.decode_tokens_per_s == pytest.approx(decode)


def test_another_seed_draws_other_zones(file: Path) -> None:
    text = TEXT.replace("{at_s: [0, 100], nodes: [6, 0], notice_s: 30}", "{generated_hours: 48}")
    file.write_text(text)
    first, again, other = (load_scenario(file, seed).options[1].availability for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert first is not None
    assert set(first.nodes) <= set(range(7))


def test_the_schema_can_be_made(file: Path) -> None:
    schema = TypeAdapter(ScenarioManifest).json_schema()
    assert "options" in schema["properties"]


def test_a_manifest_made_in_code(file: Path) -> None:
    manifest = ScenarioManifest.model_validate(yaml.safe_load(TEXT))
    assert to_scenario(manifest, 9).seed == 9
