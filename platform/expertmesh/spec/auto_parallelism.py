"""`parallelism: auto` of a manifest: the planner decides, or on CPUs what fits the nodes."""

from expertmesh.core.domain.fleet import Parallelism
from expertmesh.core.domain.hardware import Pool
from expertmesh.core.domain.model_shape import ModelShape
from expertmesh.core.planner.plan import NoPlan, Plan
from expertmesh.core.planner.search import search_sizes
from expertmesh.errors import ManifestError
from expertmesh.spec.group_options import Chosen, Wanted, planned_option, question, unplanned_option
from expertmesh.spec.planning import platform_pool

MOST_CPU_RANKS = 2
"""Of a group without GPUs: enough to be parallel, and few enough for a small machine."""


def choose(wanted: Wanted, shape: ModelShape, pools: tuple[Pool, ...]) -> Chosen:
    """For each pool the best group and, with GPUs, other sizes that are of use.

    Raises ManifestError, without file and field, when a pool has none.
    """
    with_gpus = [pool for pool in pools if pool.accelerator is not None]
    if not with_gpus:
        return _on_cpus(wanted, shape, pools)
    if len(with_gpus) < len(pools):
        raise ManifestError("some of its pools have GPUs and some have none; choose one kind")
    found = search_sizes(
        question(wanted, shape), [platform_pool(pool) for pool in pools], wanted.usd_per_hour
    )
    plans: list[Plan] = []
    options = []
    for pool, sizes in zip(pools, found, strict=True):
        if isinstance(sizes, NoPlan):
            raise ManifestError(f"pool {pool.name}: {sizes}")
        plans += sizes
        options += [planned_option(wanted, pool, plan) for plan in sizes]
    return Chosen(tuple(options), tuple(plans), plans[0].why)


def _on_cpus(wanted: Wanted, shape: ModelShape, pools: tuple[Pool, ...]) -> Chosen:
    """As many ranks as every pool has room for, at most two, that divide the experts."""
    room = min(pool.workers_per_node * pool.max_nodes for pool in pools)
    experts = 1 if shape.experts is None else shape.experts.count
    ranks = max(n for n in range(1, MOST_CPU_RANKS + 1) if n <= max(1, room) and experts % n == 0)
    many = f"{ranks} ranks share the experts" if ranks > 1 else "one rank holds the whole model"
    sizes = Parallelism(tensor=1, data=ranks, expert=ranks)
    return Chosen(
        tuple(unplanned_option(wanted, pool, sizes) for pool in pools),
        why=f"without GPUs: {many}, of at most {MOST_CPU_RANKS}",
    )
