"""A plan in the words of vLLM 0.29."""

import ast
import importlib.util
import itertools
from dataclasses import replace
from pathlib import Path

import pytest
from helm.generate_schema import Workers

from expertmesh.core.domain.model_shape import Dtype
from expertmesh.core.perf.layout import Layout
from expertmesh.core.planner.candidates import SMALL_STEP_TOKENS, Backend, Candidate, Role
from expertmesh.core.planner.engine_arguments import (
    chart_values,
    engine_settings,
    eplb_arguments,
    vllm_serve_arguments,
)
from expertmesh.core.planner.plan import GroupPlan, Plan
from expertmesh.core.planner.question import Checkpoint, GpuPool, Question, Targets
from expertmesh.core.planner.search import plan_given
from expertmesh.spec.catalog import models
from expertmesh.spec.catalog_hardware import accelerators

V3 = "deepseek-ai/DeepSeek-V3"
Key = tuple[Layout, Backend, int | None]
WIDE: Key = (Layout(1, 32, 32, 32), Backend.DEEPEP_LOW_LATENCY, None)
GATHERED: Key = (Layout(1, 16, 16, 16), Backend.ALL_GATHER, SMALL_STEP_TOKENS)
NARROW: Key = (Layout(8, 1, 8), Backend.NONE, None)


def pool(gpu: str = "H200", per_node: int = 8, nodes: int = 18) -> GpuPool:
    return GpuPool(gpu, accelerators()[gpu], per_node, nodes, 3.0, "on-demand")


def group(key: Key, where: GpuPool) -> GroupPlan:
    targets = Targets(16384, 2000, 500, 3.0, 0.1)
    checkpoint = Checkpoint(V3, models()[V3].shape)
    layout, backend, tokens = key
    candidate = Candidate(checkpoint, layout, Role.BOTH, backend, tokens)
    plan = plan_given(Question((checkpoint,), targets), where, candidate)
    assert isinstance(plan, Plan), str(plan)
    return plan.serving_group


def vllm_fields(relative: str, name: str) -> set[str]:
    """Read from the file: importing vLLM takes many seconds."""
    found = importlib.util.find_spec("vllm")
    if found is None or not found.submodule_search_locations:
        pytest.skip("vLLM is not installed")
    text = (Path(found.submodule_search_locations[0]) / relative).read_text()
    (node,) = (n for n in ast.parse(text).body if isinstance(n, ast.ClassDef) and n.name == name)
    return {
        line.target.id
        for line in node.body
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)
    }


@pytest.mark.parametrize("key", [WIDE, GATHERED, NARROW])
def test_every_argument_is_vllms(key: Key) -> None:
    engine = engine_settings(group(key, pool()), pool(), Dtype.BF16).engine
    assert engine.keys() <= vllm_fields("engine/arg_utils.py", "EngineArgs")
    assert engine.get("eplb_config", {}).keys() <= vllm_fields("config/parallel.py", "EPLBConfig")


def test_the_limits_are_those_that_the_memory_is_planned_with() -> None:
    for key in (WIDE, GATHERED, NARROW):
        planned = group(key, pool())
        engine = engine_settings(planned, pool()).engine
        assert engine["max_num_seqs"] == planned.memory.limits.sequences
        assert engine["max_num_batched_tokens"] == planned.memory.limits.batched_tokens
    assert group(GATHERED, pool()).memory.limits.batched_tokens == SMALL_STEP_TOKENS


def test_copies_of_experts_switch_balancing_on() -> None:
    engine = engine_settings(group(WIDE, pool()), pool()).engine
    assert engine["enable_eplb"] is True
    assert engine["eplb_config"] == {"num_redundant_experts": 32}
    narrow = engine_settings(group(NARROW, pool()), pool()).engine
    assert "enable_eplb" not in narrow and "all2all_backend" not in narrow
    assert eplb_arguments(0) == {}


def test_the_exchange_between_nodes_needs_an_environment() -> None:
    settings = engine_settings(group(WIDE, pool()), pool())
    assert settings.engine["all2all_backend"] == "deepep_low_latency"
    assert settings.environment["NVSHMEM_IB_ENABLE_IBGDA"] == "true"
    size = settings.environment["NVSHMEM_SYMMETRIC_SIZE"]
    assert size.endswith("G") and int(size[:-1]) >= 1
    text = " ".join(settings.notes)
    assert "NCCL_SOCKET_IFNAME" in text and "IBGDA" in text and "256 tokens" in text


def test_a_group_on_one_node_needs_none() -> None:
    settings = engine_settings(group(NARROW, pool()), pool())
    assert settings.environment == {} and settings.notes == ()


def test_a_rack_exchanges_over_nvlink() -> None:
    rack = pool("GB300", per_node=4)
    environment = engine_settings(group(WIDE, rack), rack).environment
    assert environment["NCCL_MNNVL_ENABLE"] == "1"
    assert environment["VLLM_DEEPEP_LOW_LATENCY_USE_MNNVL"] == "1"
    assert "NVSHMEM_IB_ENABLE_IBGDA" not in environment


def test_halves_of_a_batch_only_where_they_are_faster() -> None:
    planned = group(WIDE, pool())
    for overlapped in (True, False):
        engine = engine_settings(replace(planned, overlapped=overlapped), pool()).engine
        assert engine.get("enable_dbo", False) is overlapped


def test_a_cache_in_fp8_is_asked_for() -> None:
    planned = group(NARROW, pool())
    assert engine_settings(planned, pool(), Dtype.FP8).engine["kv_cache_dtype"] == "fp8"
    assert "kv_cache_dtype" not in engine_settings(planned, pool()).engine


def test_resources_are_of_a_node() -> None:
    assert engine_settings(group(WIDE, pool()), pool()).node.gpus == 8
    rack = pool("GB300", per_node=4)
    node = engine_settings(group(WIDE, rack), rack).node
    assert node.gpus == 4 and node.cpus >= 4 and node.shared_memory_bytes > 2**30


@pytest.mark.parametrize("key", [WIDE, NARROW])
def test_the_chart_takes_the_resources_of_its_workers(key: Key) -> None:
    settings = engine_settings(group(key, pool()), pool())
    values = chart_values(settings, "h200")
    worker = Workers.model_validate(values["ray"]["workers"]["h200"])
    assert worker.env == settings.environment
    assert worker.sharedMemory == "16Gi"
    assert worker.resources is not None and worker.resources.requests["cpu"] == "32"


def test_the_command_line_says_the_same() -> None:
    words = vllm_serve_arguments(group(WIDE, pool()), V3, Dtype.FP8)
    assert words[:3] == ["vllm", "serve", V3]
    pairs = dict(itertools.pairwise(words))
    assert pairs["--tensor-parallel-size"] == "1" and pairs["--data-parallel-size"] == "32"
    assert pairs["--max-model-len"] == "16384"
    assert pairs["--eplb-config.num_redundant_experts"] == "32"
    assert pairs["--kv-cache-dtype"] == "fp8"
    assert "--enable-eplb" in words and "--enable-expert-parallel" in words
    assert all(isinstance(word, str) for word in words)
