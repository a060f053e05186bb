"""The planner's memory against real engines: weights on each rank, kind by kind, and cache tokens.

What differs, and why:
- the CPU engine keeps the state of linear layers in FP32, where GPUs follow the checkpoint;
- blocks hold 128 tokens on CPU (latent attention: 16 without AMX), 16 on GPUs;
- of a model's small vectors (norms, biases, sinks) the planner repeats on each GPU what vLLM may
  cut, and the decay of linear layers (`A_log`), kept in FP32, counts as one of the model's dtype.
"""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.integration.memory_process import MAX_MODEL_LEN, Step
from tests.integration.test_expert_parallelism import child_environment, free_port, kill_tree
from tests.integration.tiny_models import ARCHITECTURES, save_tiny_model

from expertmesh.core.domain.model_shape import (
    Dtype,
    LatentAttention,
    LinearAttention,
    ModelShape,
    Quantisation,
)
from expertmesh.core.perf.kv_cache import kv_cache
from expertmesh.core.perf.layout import Layout
from expertmesh.core.perf.weights import weights
from expertmesh.spec.model_shape import read_shape

pytestmark = [pytest.mark.integration, pytest.mark.slow]

CHILD = Path(__file__).with_name("memory_process.py")
KV_BYTES = 64 * 2**20 + 12345
DTYPES = dict.fromkeys(ARCHITECTURES, Dtype.FP32) | {"qwen3-next": Dtype.BF16}
LAYOUTS = {
    "single": Layout(),
    "tensor": Layout(tensor=2),
    "tensor-expert": Layout(tensor=2, expert=2),
    "data-expert": Layout(data=2, expert=2),
}
KINDS = ("attention", "dense", "experts", "shared", "embeddings", "other")

# Layout, architecture and rank to what the engine says.
Measured = dict[tuple[str, str, int], dict[str, Any]]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoints")
    for name in ARCHITECTURES:
        save_tiny_model(name, directory / name)
    return directory


@pytest.fixture(scope="module")
def measured(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Measured:
    directory = tmp_path_factory.mktemp("memory")
    found: Measured = {}
    for layout_name, layout in LAYOUTS.items():
        ports = {name: free_port() for name in ARCHITECTURES}
        jobs = [
            [
                Step(
                    name=name,
                    model=str(checkpoints / name),
                    dtype={Dtype.FP32: "float32", Dtype.BF16: "bfloat16"}[DTYPES[name]],
                    kv_bytes=KV_BYTES,
                    tensor=layout.tensor,
                    data=layout.data,
                    expert_parallel=layout.expert_parallel,
                    rank=rank,
                    port=ports[name],
                )
                for name in ARCHITECTURES
            ]
            for rank in range(layout.world_size)
        ]
        for rank, results in enumerate(run_children(jobs, directory / layout_name)):
            for name, result in results.items():
                found[layout_name, name, rank] = result
    return found


CASES = [
    (layout_name, name, rank)
    for layout_name, layout in LAYOUTS.items()
    for name in ARCHITECTURES
    for rank in range(layout.world_size)
]


@pytest.mark.parametrize(("layout_name", "name", "rank"), CASES)
def test_weights_on_each_rank(
    layout_name: str, name: str, rank: int, measured: Measured, checkpoints: Path
) -> None:
    layout = LAYOUTS[layout_name]
    shape = shape_of(checkpoints / name, DTYPES[name])
    planned = weights(shape, layout)
    held = by_kind(measured[layout_name, name, rank]["weights"])
    exact = [kind for kind in KINDS if kind not in ("attention", "experts")]
    assert {kind: getattr(planned, kind) for kind in exact} == {kind: held[kind] for kind in exact}

    element = int(DTYPES[name].bytes_per_element)
    decays = sum(
        kind.layers * kind.value_heads // layout.tensor * (4 - element)
        for kind in shape.attention
        if isinstance(kind, LinearAttention)
    )
    small = sum(kind.layers * kind.extras for kind in shape.attention) * element
    difference = held["attention"] - decays - planned.attention
    assert abs(difference) <= (0 if layout.tensor == 1 else small)

    assert shape.experts is not None
    biases = shape.experts.layers * shape.experts.count * shape.experts.bias * element
    difference = held["experts"] - planned.experts
    # Biases of the second matrix are whole on each rank when experts are cut.
    assert 0 <= difference <= (biases if layout_name == "tensor" else 0)
    assert sum(held.values()) == pytest.approx(planned.total, rel=0.002)


@pytest.mark.parametrize(("layout_name", "name", "rank"), CASES)
def test_cache_tokens_on_each_rank(
    layout_name: str, name: str, rank: int, measured: Measured, checkpoints: Path
) -> None:
    layout = LAYOUTS[layout_name]
    said = measured[layout_name, name, rank]
    dtype = DTYPES[name]
    shape = shape_of(checkpoints / name, dtype)
    latent = any(isinstance(kind, LatentAttention) for kind in shape.attention)
    cache = kv_cache(
        on_cpu(shape),
        layout.tensor,
        dtype,
        in_flight_tokens=said["in_flight_tokens"],
        block_tokens=said["block_tokens"] if latent else 128,
        states_per_sequence=2 if said["mamba_cache_mode"] == "align" else 1,
        model=dtype,
    )
    assert KV_BYTES // cache.block_bytes == said["blocks"]
    assert cache.tokens(KV_BYTES, MAX_MODEL_LEN) == said["kv_tokens"]
    assert cache.tables[0].block_tokens == said["block_tokens"]


def shape_of(directory: Path, dtype: Dtype) -> ModelShape:
    shape = read_shape(json.loads((directory / "config.json").read_text()))
    return dataclasses.replace(shape, quantisation=Quantisation(dtype, dtype))


def on_cpu(shape: ModelShape) -> ModelShape:
    attention = tuple(
        dataclasses.replace(kind, state_dtype=Dtype.FP32)
        if isinstance(kind, LinearAttention)
        else kind
        for kind in shape.attention
    )
    return dataclasses.replace(shape, attention=attention)


def by_kind(held: dict[str, int]) -> dict[str, int]:
    sums = dict.fromkeys(KINDS, 0)
    for name, size in held.items():
        # Scales of the cache, which no checkpoint holds.
        if not name.rsplit(".", 1)[-1].startswith("_"):
            sums[kind_of(name)] += size
    return sums


def kind_of(name: str) -> str:
    if "embed" in name or "lm_head" in name:
        return "embeddings"
    if "attn." in name:
        return "attention"
    if ".shared_expert." in name or ".shared_experts." in name:
        return "shared"
    if ".experts." in name and not name.endswith("e_score_correction_bias"):
        return "experts"
    if ".mlp.gate_up_proj." in name or ".mlp.down_proj." in name:
        return "dense"
    return "other"


def run_children(jobs: list[list[Step]], directory: Path) -> list[dict[str, dict[str, Any]]]:
    """One child process a rank, at the same time; their results in order."""
    directory.mkdir()
    environment = child_environment()
    # It would count instead of the bytes that are asked for.
    del environment["VLLM_CPU_KVCACHE_SPACE"]
    children = []
    for rank, steps in enumerate(jobs):
        job = directory / f"job-{rank}.json"
        job.write_text(json.dumps([dataclasses.asdict(step) for step in steps]))
        with (directory / f"log-{rank}.txt").open("w") as log:
            command = [sys.executable, CHILD, job, directory / f"result-{rank}.json"]
            children.append(
                subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
            )
    try:
        for rank, child in enumerate(children):
            status = child.wait(timeout=900)
            said = (directory / f"log-{rank}.txt").read_text()
            assert status == 0, f"rank {rank} ended with {status}:\n{said[-6000:]}"
    finally:
        for child in children:
            kill_tree(child)
    return [json.loads((directory / f"result-{r}.json").read_text()) for r in range(len(jobs))]
