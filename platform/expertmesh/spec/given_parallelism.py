"""Sizes of groups that a manifest gives itself: rated by the planner where it knows enough."""

from collections.abc import Mapping, Sequence
from typing import Any

from expertmesh.core.domain.fleet import Parallelism
from expertmesh.core.domain.hardware import Pool
from expertmesh.core.domain.model_shape import ModelShape
from expertmesh.core.domain.option import GroupOption
from expertmesh.core.perf.layout import Layout
from expertmesh.core.planner.candidates import Backend, Candidate, Role, RuledOut, checked
from expertmesh.core.planner.engine_arguments import eplb_arguments
from expertmesh.core.planner.plan import NoPlan, Plan
from expertmesh.core.planner.question import GpuPool, Question
from expertmesh.core.planner.search import plan_given
from expertmesh.spec.catalog_hardware import accelerators
from expertmesh.spec.group_options import Chosen, Wanted, planned_option, question, unplanned_option
from expertmesh.spec.planning import platform_pool


def given(
    wanted: Wanted, shape: ModelShape | None, pools: Sequence[Pool], layouts: Sequence[Layout]
) -> Chosen:
    """One option for each pool and size that it has room for.

    A size that misses the targets, or that the planner cannot rate, has no rates.
    """
    options: list[GroupOption] = []
    plans: list[Plan] = []
    unrated: dict[str, str] = {}
    for pool in pools:
        for layout in layouts:
            if layout.world_size > pool.workers_per_node * pool.max_nodes:
                continue
            plan = _plan(wanted, shape, pool, layout)
            if isinstance(plan, Plan):
                options.append(planned_option(wanted, pool, plan))
                plans.append(plan)
                continue
            sizes = Parallelism(layout.tensor, layout.data, layout.expert)
            arguments = eplb_arguments(layout.redundant_experts)
            options.append(unplanned_option(wanted, pool, sizes, arguments))
            unrated[options[-1].name] = plan
    return Chosen(tuple(options), tuple(plans), "as the manifest says", unrated)


def _plan(wanted: Wanted, shape: ModelShape | None, pool: Pool, layout: Layout) -> Plan | str:
    """Or why there is none."""
    if pool.accelerator is None:
        return "it has no GPUs"
    if shape is None:
        return f"the catalogue has no {wanted.source}"
    if pool.accelerator.lower() not in _known():
        return f"the catalogue has no {pool.accelerator}"
    plan = plan_size(question(wanted, shape), wanted.engine, platform_pool(pool), layout)
    return plan if isinstance(plan, Plan) else plan.problem


def plan_size(
    asked: Question, engine: Mapping[str, Any], pool: GpuPool, layout: Layout
) -> Plan | NoPlan:
    """Of groups of this size with a manifest's engine arguments."""
    checkpoint = asked.checkpoints[0]
    candidate = Candidate(
        checkpoint,
        layout,
        Role.BOTH,
        _backend(engine, checkpoint.shape, layout),
        engine.get("max_num_batched_tokens"),
    )
    possible = checked(candidate, pool, asked.targets, asked.kv)
    if isinstance(possible, RuledOut):
        nearest = (possible.possible,) if possible.possible else ()
        return NoPlan(pool, asked.targets, possible.constraint, possible.problem, nearest)
    return plan_given(asked, pool, candidate)


def _known() -> set[str]:
    return {name.lower() for name in accelerators()}


def _backend(engine: Mapping[str, Any], shape: ModelShape, layout: Layout) -> Backend:
    """vLLM's default where the manifest names none, or one that the planner has no figures of."""
    if layout.data == 1 or shape.experts is None:
        return Backend.NONE
    named = engine.get("all2all_backend")
    return Backend(named) if named in tuple(Backend) else Backend.ALL_GATHER
