"""Room in the pools."""

from expertmesh.core.domain.hardware import Market, Pool
from expertmesh.core.scaling.contract import GroupRecord, PoolSeen, workers_of


def capacity_workers(pool: Pool, seen: PoolSeen | None) -> int | None:
    """Workers that the pool can hold, or None when that is not known now.

    A local pool is the nodes that it has. Every other pool can grow to its limit: a group that is
    pending makes Ray's autoscaler add nodes. An external pool holds no groups.
    """
    if pool.market is Market.EXTERNAL:
        return 0
    if pool.market is Market.LOCAL:
        return seen.live_workers if seen else None
    return pool.max_nodes * pool.workers_per_node


def held_workers(pool: Pool | None, record: GroupRecord, leaving_workers: int) -> int:
    """Workers by which a group fills its pool; `leaving_workers` of them are on nodes that will be
    taken away, which are no part of a local pool any more."""
    workers = workers_of(record.spec.parallelism)
    if pool is not None and pool.market is Market.LOCAL:
        return max(0, workers - leaving_workers)
    return workers


def room_workers(pool: Pool, seen: PoolSeen | None, own_workers: int) -> int | None:
    """Workers still free in the pool; a group holds its place until it is gone."""
    capacity = capacity_workers(pool, seen)
    if capacity is None:
        return None
    return capacity - (seen.used_elsewhere if seen else 0) - own_workers
