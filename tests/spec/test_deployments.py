"""The shipped manifests: they load, agree with the catalogue, and mean something to vLLM 0.29."""

import ast
import functools
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from expertmesh.core.domain.accelerator import PriceMarket, prices_of
from expertmesh.core.domain.deployment import ModelDeployment
from expertmesh.core.domain.fleet import ExternalUse
from expertmesh.core.domain.hardware import Market
from expertmesh.core.domain.model_shape import Dtype
from expertmesh.core.perf.parameters import parameters
from expertmesh.core.planner.candidates import Constraint
from expertmesh.core.planner.plan import NoPlan, Plan
from expertmesh.core.planner.question import Checkpoint, GpuPool, Question, Targets
from expertmesh.core.planner.search import search
from expertmesh.errors import ManifestError
from expertmesh.spec.catalog import models
from expertmesh.spec.catalog_hardware import accelerators, prices
from expertmesh.spec.load import System, load_system

DEPLOYMENTS = Path(__file__).parents[2] / "deployments"
PLATFORM = DEPLOYMENTS / "platform.example.yaml"
LOCAL = {"local.yaml", "tiny-moe.yaml"}
"""A system of its own: everything else runs on the example's pools."""
ELSEWHERE = DEPLOYMENTS / "qwen2-5-max.yaml"
"""Served by a provider only."""
FILES = sorted(
    file
    for file in DEPLOYMENTS.glob("*.yaml")
    if file not in (PLATFORM, ELSEWHERE) and file.name not in LOCAL
)
NAMES = [file.stem for file in FILES]
ASKED_FOR = {
    "Qwen3-30B-A3B",
    "Qwen3-235B-A22B",
    "Qwen3-Coder-480B-A35B",
    "Qwen3-Next-80B-A3B",
    "Qwen3-VL-235B-A22B",
    "Qwen3-Omni-30B-A3B",
    "Qwen3.5-397B-A17B",
    "Qwen2.5-72B",
    "DeepSeek-V3",
    "DeepSeek-V4-Pro",
    "Kimi-K2",
    "GLM-4.7",
    "gpt-oss-120b",
}
SET_BY_US = {
    "model",
    "served_model_name",
    "max_model_len",
    "revision",
    "tensor_parallel_size",
    "data_parallel_size",
    "enable_expert_parallel",
    "enable_eplb",
    "eplb_config",
    "all2all_backend",
    "distributed_executor_backend",
}
"""Engine arguments that follow from other keys of the manifest."""


@functools.cache
def system() -> System:
    return load_system([PLATFORM, *FILES])


def deployment(name: str) -> ModelDeployment:
    return next(model for model in system().models if model.name == name)


def test_all_load_together_and_are_named_as_their_files() -> None:
    assert [model.name for model in system().models] == NAMES


def test_the_local_system_loads() -> None:
    assert load_system([DEPLOYMENTS / name for name in sorted(LOCAL)]).models


def test_a_model_that_only_a_provider_serves() -> None:
    loaded = load_system([PLATFORM, ELSEWHERE])
    (model,) = loaded.models
    assert (model.source, model.pools, model.scaling.max_groups) == ("", (), 0)
    (route,) = model.external
    assert (route.pool, route.use) == ("qwen-api", ExternalUse.FALLBACK)
    assert loaded.chosen == {}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"external": []}, "name a pool, or a provider under external"),
        ({"pools": ["h200-od"]}, "model.source: missing"),
        ({"engine": {"seed": 1}}, "remove model.source, parallelism, engine"),
        ({"scaling": {"groups": {"min": 1}}}, "scaling.groups, or name a pool"),
    ],
)
def test_what_a_model_without_groups_cannot_say(
    tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    file = tmp_path / "model.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(ELSEWHERE.read_text()) | change))
    with pytest.raises(ManifestError, match=words):
        load_system([PLATFORM, file])


def test_the_models_that_people_ask_for_are_there() -> None:
    served = {models()[model.source].name for model in system().models}
    assert served >= ASKED_FOR
    assert {"deepseek-v3", "deepseek-r1"} <= set(NAMES)  # one shape


@pytest.mark.parametrize("name", NAMES)
def test_the_context_is_one_that_the_model_knows(name: str) -> None:
    model = deployment(name)
    shape = models()[model.source].shape
    assert 8192 <= model.max_model_len <= shape.max_position_embeddings


@pytest.mark.parametrize("name", NAMES)
def test_clients_may_use_the_makers_name(name: str) -> None:
    model = deployment(name)
    same = {known.id for known in models().values() if known.name == models()[model.source].name}
    assert same & set(model.aliases)


@pytest.mark.parametrize("name", NAMES)
def test_cached_tokens_cost_no_more_than_others_and_completions_no_less(name: str) -> None:
    model = deployment(name)
    assert 0 < model.tariff.usd_per_mtok_cached <= model.tariff.usd_per_mtok_in
    assert model.tariff.usd_per_mtok_in <= model.tariff.usd_per_mtok_out


@pytest.mark.parametrize("file", FILES, ids=NAMES)
def test_a_tariff_says_where_it_is_from(file: Path) -> None:
    lines = file.read_text().splitlines()
    index = next(n for n, line in enumerate(lines) if line.startswith("tariff:"))
    above: list[str] = []
    while lines[index - 1].startswith("#"):
        index -= 1
        above.append(lines[index])
    text = " ".join(above)
    assert any(word in text for word in ("router", "maker's own price", "An example, not a price"))


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("qwen3-vl-235b-a22b", {"image"}),
        ("qwen3-omni-30b-a3b", {"audio"}),
        ("qwen3-5-397b-a17b", {"image"}),
    ],
)
def test_models_that_see_or_hear_have_limits(name: str, allowed: set[str]) -> None:
    engine = deployment(name).engine
    limits = engine["limit_mm_per_prompt"]
    assert {kind for kind, most in limits.items() if most} == allowed
    assert set(limits) <= {"image", "video", "audio"}
    # Otherwise a rank fetches whatever URL a client names, inside our network too.
    assert engine["allowed_media_domains"]


def test_code_from_a_checkpoint_runs_only_where_it_has_to() -> None:
    trusting = {model.name for model in system().models if model.engine.get("trust_remote_code")}
    assert trusting == {"kimi-k2"}


def test_prices_of_the_pools_are_in_the_catalogue() -> None:
    known = accelerators()
    for pool in system().pools:
        assert pool.accelerator is not None
        market = PriceMarket.SPOT if pool.market is Market.SPOT else PriceMarket.ON_DEMAND
        listed = prices_of(prices(), known[pool.accelerator], market)
        assert round(pool.usd_per_node_hour / pool.accelerators_per_node, 6) in {
            price.usd_per_hour for price in listed
        }


def test_every_pool_of_the_example_is_used() -> None:
    used = {name for model in system().models for name in model.pools}
    assert used == {pool.name for pool in system().pools}


# --- plans ---

NODE_POOLS = ("h100-od", "h200-od", "b200-od")
PROMPT_TOKENS, ANSWER_TOKENS = 2000, 500
GIB = 2**30


@functools.cache
def planned(name: str, pool_name: str, nodes: int | None = None) -> Plan | NoPlan:
    model = deployment(name)
    pool = next(pool for pool in system().pools if pool.name == pool_name)
    assert pool.accelerator is not None
    return search(
        Question(
            checkpoints=(Checkpoint(model.source, models()[model.source].shape),),
            targets=Targets(
                context_tokens=model.max_model_len,
                input_tokens=PROMPT_TOKENS,
                output_tokens=ANSWER_TOKENS,
                ttft_s=model.slo.ttft_s,
                tpot_s=model.slo.tpot_s,
            ),
            kv=Dtype.FP8 if model.engine.get("kv_cache_dtype") == "fp8" else Dtype.BF16,
        ),
        GpuPool(
            name=pool.name,
            accelerator=accelerators()[pool.accelerator],
            gpus_per_node=pool.accelerators_per_node,
            max_nodes=pool.max_nodes if nodes is None else nodes,
            usd_per_gpu_hour=pool.usd_per_hour(1),
            market=pool.market.value,
        ),
    )


@pytest.mark.parametrize("pool_name", NODE_POOLS)
@pytest.mark.parametrize("name", NAMES)
def test_each_has_a_plan_on_each_kind_of_gpu(name: str, pool_name: str) -> None:
    model, plan = deployment(name), planned(name, pool_name)
    assert isinstance(plan, Plan), str(plan)
    group = plan.serving_group
    assert group.memory.fits and group.max_concurrency >= 1
    assert group.tpot_s.expected <= model.slo.tpot_s
    assert group.ttft_s.expected <= model.slo.ttft_s
    assert plan.users >= 1 and plan.gpus <= plan.pool.max_gpus
    assert group.layout.data == 1 or models()[model.source].shape.experts is not None


@pytest.mark.parametrize("name", NAMES)
def test_each_of_its_pools_has_groups_within_the_budget(name: str) -> None:
    model, chosen = deployment(name), system().chosen[name]
    budget = model.scaling.usd_per_hour_budget
    assert budget is not None
    assert list(dict.fromkeys(option.pool for option in model.options)) == list(model.pools)
    for option, plan in zip(model.options, chosen.plans, strict=True):
        group = plan.serving_group
        assert (option.pool, option.parallelism) == (plan.pool.name, group.parallelism)
        assert group.memory.fits and option.usd_per_hour <= budget
        assert option.rates.seconds(PROMPT_TOKENS, ANSWER_TOKENS) is not None
        assert 60 < option.start_s < 1200
    assert model.scaling.target_in_flight_per_group == model.options[0].rates.in_flight


@pytest.mark.parametrize("name", NAMES)
def test_the_first_option_of_a_pool_is_the_best_plan_within_the_budget(name: str) -> None:
    model = deployment(name)
    for pool_name in set(NODE_POOLS) & set(model.pools):
        best = planned(name, pool_name)
        first = next(option for option in model.options if option.pool == pool_name)
        assert isinstance(best, Plan)
        if best.usd_per_hour <= (model.scaling.usd_per_hour_budget or 0):
            assert first.parallelism == best.serving_group.parallelism


def weight_bytes(name: str) -> float:
    """Of one copy, without scales."""
    shape = models()[deployment(name).source].shape
    counted, dtypes = parameters(shape), shape.quantisation
    others = counted.total - counted.experts
    return (
        counted.experts * dtypes.experts.bytes_per_element
        + others * dtypes.others.bytes_per_element
    )


@pytest.mark.parametrize("pool_name", NODE_POOLS)
@pytest.mark.parametrize("name", NAMES)
def test_a_node_that_is_too_small_is_short_by_so_much(name: str, pool_name: str) -> None:
    plan = planned(name, pool_name, nodes=1)
    node_bytes = plan.pool.gpus_per_node * plan.pool.accelerator.memory_bytes
    if isinstance(plan, Plan):
        assert weight_bytes(name) < node_bytes
        return
    assert plan.constraint is Constraint.MEMORY
    short = re.search(r"does not fit: ([\d,]+) GiB short", plan.problem)
    assert short, plan.problem
    missing_bytes = float(short[1].replace(",", "")) * GIB
    # The rest is cache for one sequence, activations, buffers, and what is left to the driver.
    rest_bytes = missing_bytes - (weight_bytes(name) - node_bytes)
    assert 0 < rest_bytes < 0.3 * node_bytes
    assert re.search(r"\d+ GPUs of this kind would hold it", " ".join(plan.nearest))


def test_some_nodes_are_too_small() -> None:
    none = {
        (name, pool_name)
        for name in NAMES
        for pool_name in NODE_POOLS
        if isinstance(planned(name, pool_name, nodes=1), NoPlan)
    }
    assert none >= {("kimi-k2", "h100-od"), ("deepseek-v3", "h100-od")}
    assert not {pair for pair in none if pair[0] in ("gpt-oss-120b", "qwen3-30b-a3b")}


# --- what vLLM knows, read from its files: importing it takes many seconds ---


def vllm_folder() -> Path:
    found = importlib.util.find_spec("vllm")
    if found is None or not found.submodule_search_locations:
        pytest.skip("vLLM is not installed")
    return Path(found.submodule_search_locations[0])


@functools.cache
def parsed(relative: str) -> ast.Module:
    return ast.parse((vllm_folder() / relative).read_text())


def fields_of(relative: str, *classes: str) -> dict[str, ast.expr]:
    """Names and types of the fields of dataclasses."""
    return {
        line.target.id: line.annotation
        for node in parsed(relative).body
        if isinstance(node, ast.ClassDef) and node.name in classes
        for line in node.body
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)
    }


def engine_arguments() -> dict[str, ast.expr]:
    """As Ray Serve sorts them: those of the engine and those of its API server."""
    engine = fields_of("engine/arg_utils.py", "EngineArgs", "AsyncEngineArgs")
    server = fields_of("entrypoints/launchers/cli_args.py", "BaseFrontendArgs", "FrontendArgs")
    assert "max_num_seqs" in engine and "tool_call_parser" in server
    return engine | server


def keys_of(relative: str, name: str) -> set[str]:
    """Of a dict literal at the top of a file."""
    for node in parsed(relative).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            assert isinstance(node.value, ast.Dict)
            return {ast.literal_eval(key) for key in node.value.keys if key is not None}
    raise AssertionError(f"{relative} has no {name}")


@functools.cache
def literals() -> dict[str, set[Any]]:
    """`Name = Literal[...]` of vLLM's config files."""
    found: dict[str, set[Any]] = {}
    for file in sorted((vllm_folder() / "config").glob("*.py")):
        for node in parsed(f"config/{file.name}").body:
            if not (isinstance(node, ast.Assign) and isinstance(node.value, ast.Subscript)):
                continue
            members = getattr(node.value.slice, "elts", [node.value.slice])
            plain = all(isinstance(member, ast.Constant) for member in members)
            if plain and ast.unparse(node.value.value) == "Literal":
                found[ast.unparse(node.targets[0])] = {member.value for member in members}
    assert "CacheDType" in found
    return found


@pytest.mark.parametrize("name", NAMES)
def test_engine_arguments_are_vllms(name: str) -> None:
    known = engine_arguments()
    for key, value in deployment(name).engine.items():
        assert key in known, f"vLLM has no argument {key}"
        names = {node.id for node in ast.walk(known[key]) if isinstance(node, ast.Name)}
        choices = [literals()[choice] for choice in names if choice in literals()]
        if choices:
            assert any(value in choice for choice in choices), f"{key}: vLLM knows no {value!r}"


@pytest.mark.parametrize("name", NAMES)
def test_parsers_are_vllms(name: str) -> None:
    engine = deployment(name).engine
    tools = keys_of("tool_parsers/__init__.py", "_TOOL_PARSERS_TO_REGISTER")
    reasoning = keys_of("reasoning/__init__.py", "_REASONING_PARSERS_TO_REGISTER")
    assert engine.get("tool_call_parser", "hermes") in tools
    assert engine.get("reasoning_parser", "qwen3") in reasoning
    # Without this, vLLM refuses requests with tools; without a parser, it does not start.
    assert engine.get("enable_auto_tool_choice", False) is ("tool_call_parser" in engine)


@pytest.mark.parametrize("name", NAMES)
def test_vllm_knows_the_architecture(name: str) -> None:
    architecture = models()[deployment(name).source].shape.architecture
    assert f'"{architecture}"' in (vllm_folder() / "model_executor/models/registry.py").read_text()


def test_a_wrong_argument_would_be_noticed() -> None:
    assert "max_num_seq" not in engine_arguments()
    assert "fp9" not in literals()["CacheDType"]
    with pytest.raises(AssertionError, match="has no NOTHING"):
        keys_of("tool_parsers/__init__.py", "NOTHING")


@pytest.mark.parametrize("file", FILES, ids=NAMES)
def test_engine_arguments_repeat_no_other_key(file: Path) -> None:
    written = yaml.safe_load(file.read_text()).get("engine", {})
    assert set(written).isdisjoint(SET_BY_US)


STARTER = """
import json, sys
from ray.llm._internal.serve.engines.vllm.vllm_models import VLLMEngineConfig
from vllm.config import MultiModalConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.cli_args import FrontendArgs
from expertmesh.core.domain.fleet import GroupSpec, Parallelism
from expertmesh.serving.group_app import llm_config

for name, source, length, engine in json.load(sys.stdin):
    spec = GroupSpec(name, name, source, "pool", Parallelism(1, 1, 1), length, 1.0, "H200", engine)
    config = VLLMEngineConfig.from_llm_config(llm_config(spec))
    arguments = AsyncEngineArgs(**config.get_initialization_kwargs())
    FrontendArgs(**config.frontend_kwargs)
    MultiModalConfig(
        limit_per_prompt=arguments.limit_mm_per_prompt,
        mm_encoder_tp_mode=arguments.mm_encoder_tp_mode,
    )
    print("accepted", name, arguments.max_model_len)
"""


@pytest.mark.integration
def test_ray_and_vllm_accept_the_arguments_themselves() -> None:
    given = [[m.name, m.source, m.max_model_len, m.engine] for m in system().models]
    run = subprocess.run(
        [sys.executable, "-c", STARTER],
        input=json.dumps(given),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    accepted = [line for line in run.stdout.splitlines() if line.startswith("accepted ")]
    wanted = [f"accepted {name} {length}" for name, _, length, _ in given]
    assert (run.returncode, accepted) == (0, wanted), run.stderr[-2000:]


def test_the_files_hold_one_manifest_each() -> None:
    for file in [PLATFORM, ELSEWHERE, *FILES]:
        assert len(list(yaml.safe_load_all(file.read_text()))) == 1
