"""The ways to run a group of a model: what a manifest and a plan come to for the controller."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import inf
from typing import Any

from expertmesh.core.domain.fleet import Parallelism
from expertmesh.core.domain.hardware import Market, Pool
from expertmesh.core.domain.model_shape import Dtype, ModelShape
from expertmesh.core.domain.option import GroupOption, GroupRates
from expertmesh.core.domain.slo import Slo
from expertmesh.core.perf.start import NODE_S, UNPLANNED_S
from expertmesh.core.planner.engine_arguments import engine_settings
from expertmesh.core.planner.plan import Plan
from expertmesh.core.planner.question import Checkpoint, Question, Targets

INPUT_TOKENS = 2000
OUTPUT_TOKENS = 500
"""Of a usual request, where nobody has said."""
IN_FLIGHT = 16.0
"""Requests that a group should carry, where neither manifest nor plan says."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """What `parallelism` comes to in one manifest."""

    options: tuple[GroupOption, ...]
    """In the order of its pools, and in each pool the best first."""
    plans: tuple[Plan, ...] = ()
    """One for each option, where the planner knows model and GPU."""
    why: str = ""
    """Of the first option."""
    unrated: Mapping[str, str] = field(default_factory=dict)
    """By name of an option: why the planner has no rates of it."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a manifest says about the model and its targets."""

    source: str
    max_model_len: int
    slo: Slo
    engine: Mapping[str, Any] = field(default_factory=dict)
    """Its own arguments, which win over a plan's."""
    usd_per_hour: float = inf
    """That a group may cost at most."""
    in_flight: float | None = None
    """Requests that one group should carry; None: as planned."""


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


def most_sequences(engine: Mapping[str, Any]) -> int | None:
    """Of a rank at once, by a manifest's engine arguments."""
    named = engine.get("max_num_seqs")
    return named if isinstance(named, int) and named > 0 else None


def question(wanted: Wanted, shape: ModelShape) -> Question:
    prompt, answer = usual_request(wanted.max_model_len)
    return Question(
        checkpoints=(Checkpoint(wanted.source, shape),),
        targets=Targets(
            context_tokens=wanted.max_model_len,
            input_tokens=prompt,
            output_tokens=answer,
            ttft_s=wanted.slo.ttft_s,
            tpot_s=wanted.slo.tpot_s,
            attainment=wanted.slo.attainment,
            sequences_per_rank=most_sequences(wanted.engine),
        ),
        kv=kv_format(wanted.engine),
    )


def engine_of(plan: Plan, own: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments: those of the plan, and a manifest's own, which win."""
    planned = engine_settings(plan.serving_group, plan.pool, kv_format(own)).engine
    return planned | dict(own)


def planned_option(wanted: Wanted, pool: Pool, plan: Plan) -> GroupOption:
    group = plan.serving_group
    rented = pool.market is not Market.LOCAL and pool.min_nodes < group.nodes
    rates = group.rates
    if wanted.in_flight is not None:
        rates = replace(rates, in_flight=wanted.in_flight)
    return GroupOption(
        pool=pool.name,
        parallelism=group.parallelism,
        usd_per_hour=pool.usd_per_hour(group.gpus),
        rates=rates,
        start_s=group.start_s + (NODE_S if rented else 0.0),
        engine=engine_of(plan, wanted.engine),
    )


def unplanned_option(
    wanted: Wanted,
    pool: Pool,
    parallelism: Parallelism,
    engine: Mapping[str, Any] | None = None,
) -> GroupOption:
    """Of CPUs, and of a model or GPU that the planner does not know."""
    return GroupOption(
        pool=pool.name,
        parallelism=parallelism,
        usd_per_hour=pool.usd_per_hour(parallelism.data * parallelism.tensor),
        rates=GroupRates(in_flight=wanted.in_flight or IN_FLIGHT),
        start_s=UNPLANNED_S,
        engine=dict(engine or {}) | dict(wanted.engine),
    )
