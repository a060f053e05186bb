"""`parallelism: auto` of a manifest: the planner decides, or on CPUs what fits the nodes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from expertmesh.core.domain.fleet import Parallelism
from expertmesh.core.domain.hardware import Pool
from expertmesh.core.domain.model_shape import Dtype, ModelShape
from expertmesh.core.domain.slo import Slo
from expertmesh.core.planner.engine_arguments import engine_settings
from expertmesh.core.planner.plan import NoPlan, Plan
from expertmesh.core.planner.question import Checkpoint, Question, Targets
from expertmesh.core.planner.search import search_common
from expertmesh.errors import ManifestError
from expertmesh.spec.planning import platform_pool

INPUT_TOKENS = 2000
OUTPUT_TOKENS = 500
"""Of a usual request, where nobody has said."""
MOST_CPU_RANKS = 2
"""Of a group without GPUs: enough to be parallel, and few enough for a small machine."""

_LEFT_TO_VLLM = ("gpu_memory_utilization", "max_num_seqs")
"""Its own defaults differ by GPU, and pools may have different ones."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """What `auto` stands for in one manifest."""

    parallelism: Parallelism
    engine: dict[str, Any] = field(default_factory=dict)
    """Engine arguments that belong to it; the manifest's own come before them."""
    users_per_group: int | None = None
    """That the plan expects one group to serve at the targets, in its weakest pool."""
    plans: tuple[Plan, ...] = ()
    """One for each pool; none without GPUs."""
    why: str = ""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a manifest says about the model and its targets."""

    source: str
    shape: ModelShape
    max_model_len: int
    slo: Slo
    kv: Dtype = Dtype.BF16


def usual_request(context_tokens: int) -> tuple[int, int]:
    """Tokens of a prompt and of its answer, which fit in this context of at least 2."""
    whole = INPUT_TOKENS + OUTPUT_TOKENS
    length = min(whole, context_tokens)
    answer = max(1, length * OUTPUT_TOKENS // whole)
    return length - answer, answer


def kv_format(engine: Mapping[str, Any]) -> Dtype:
    """Of the cache, by a manifest's engine arguments."""
    named = str(engine.get("kv_cache_dtype", "auto"))
    return Dtype.FP8 if named.startswith("fp8") else Dtype.BF16


def choose(wanted: Wanted, pools: tuple[Pool, ...]) -> Chosen:
    """One parallelism for groups in any of the pools.

    Raises ManifestError, without file and field, when there is none.
    """
    with_gpus = [pool for pool in pools if pool.accelerator is not None]
    if not with_gpus:
        return _on_cpus(wanted.shape, pools)
    if len(with_gpus) < len(pools):
        raise ManifestError("some of its pools have GPUs and some have none; choose one kind")
    prompt, answer = usual_request(wanted.max_model_len)
    question = Question(
        checkpoints=(Checkpoint(wanted.source, wanted.shape),),
        targets=Targets(
            context_tokens=wanted.max_model_len,
            input_tokens=prompt,
            output_tokens=answer,
            ttft_s=wanted.slo.ttft_s,
            tpot_s=wanted.slo.tpot_s,
        ),
        kv=wanted.kv,
    )
    plans = search_common(question, [platform_pool(pool) for pool in pools])
    if isinstance(plans, NoPlan):
        raise ManifestError(f"pool {plans.pool.name}: {plans}")
    group = plans[0].serving_group
    settings = [engine_settings(p.serving_group, p.pool, wanted.kv).engine for p in plans]
    left = set(_LEFT_TO_VLLM)
    if group.backend.low_latency:
        left = set()
    elif group.batched_tokens is None:
        left.add("max_num_batched_tokens")
    engine = {
        key: value
        for key, value in settings[0].items()
        if key not in left and all(other.get(key) == value for other in settings)
    }
    return Chosen(
        parallelism=group.parallelism,
        engine=engine,
        users_per_group=min(plan.serving_group.users for plan in plans),
        plans=plans,
        why=plans[0].why,
    )


def _on_cpus(shape: ModelShape, pools: tuple[Pool, ...]) -> Chosen:
    """As many ranks as every pool has room for, at most two, that divide the experts."""
    room = min(pool.workers_per_node * pool.max_nodes for pool in pools)
    experts = 1 if shape.experts is None else shape.experts.count
    ranks = max(n for n in range(1, MOST_CPU_RANKS + 1) if n <= max(1, room) and experts % n == 0)
    many = f"{ranks} ranks share the experts" if ranks > 1 else "one rank holds the whole model"
    return Chosen(
        Parallelism(tensor=1, data=ranks, expert=ranks),
        why=f"without GPUs: {many}, of at most {MOST_CPU_RANKS}",
    )
