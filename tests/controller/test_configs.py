"""What the scaling core and the gateways are told of a manifest."""

from pathlib import Path

import pytest

from expertmesh.controller.configs import retired_config, scaling_config, served_model
from expertmesh.core.domain.deployment import ScalingMode
from expertmesh.core.scaling.contract import Timing
from expertmesh.spec.load import System, load_system

PLATFORM = """
kind: Platform
name: here
pools:
  - {name: big, market: on-demand, usd_per_node_hour: 27, accelerator: H200,
     accelerators_per_node: 8, nodes: {max: 4}, zone: a}
  - {name: new, market: spot, usd_per_node_hour: 14, accelerator: B200,
     accelerators_per_node: 8, nodes: {max: 2}}
  - {name: unused, market: local, usd_per_node_hour: 1, nodes: {max: 4}}
  - {name: api, market: external, base_url: "https://api.example.com", key_variable: KEY}
"""
MODEL = """
kind: ModelDeployment
name: m
model: {source: Qwen/Qwen3-235B-A22B-Instruct-2507-FP8, max_model_len: 16384}
pools: [new, big]
scaling:
  slo: {ttft_s: 1.5, tpot_s: 0.04, attainment: 0.95}
  max_wait_s: 7
  budget: {usd_per_day: 500}
  mode: advise
  priority: 3
external:
  - pool: api
    model: theirs
    tariff: {usd_per_mtok_in: 1, usd_per_mtok_cached: 1, usd_per_mtok_out: 2}
"""


@pytest.fixture
def system(tmp_path: Path) -> System:
    (tmp_path / "platform.yaml").write_text(PLATFORM)
    (tmp_path / "model.yaml").write_text(MODEL)
    return load_system([tmp_path / "platform.yaml", tmp_path / "model.yaml"])


def test_the_scaling_core_is_told_all_that_the_manifest_says(system: System) -> None:
    (model,) = system.models
    config = scaling_config(model, system.pools, Timing())
    assert config.options == model.options and config.options
    assert {option.pool for option in config.options} == {"new", "big"}
    assert {pool.name: pool.zone for pool in config.pools} == {"big": "a", "new": None}
    assert (config.slo.ttft_s, config.slo.attainment, config.max_wait_s) == (1.5, 0.95, 7)
    assert [route.model for route in config.external] == ["theirs"]
    rules = config.rules
    assert (rules.mode, rules.priority) == (ScalingMode.ADVISE, 3)
    assert (rules.usd_per_hour_budget, rules.usd_per_day_budget) == (None, 500)
    assert rules.down_delay_s is None


def test_a_retired_model_has_no_way_to_run(system: System) -> None:
    config = retired_config("m", Timing())
    assert (config.options, config.pools, config.rules.max_groups) == ((), (), 0)


def test_gateways_know_the_model_and_its_providers(system: System) -> None:
    served = served_model(system.models[0])
    assert (served.name, served.max_wait_s) == ("m", 7)
    assert [route.pool for route in served.external] == ["api"]
