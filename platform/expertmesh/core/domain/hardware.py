"""Pools: interchangeable nodes and their price."""

from dataclasses import dataclass
from enum import StrEnum


class Market(StrEnum):
    ON_DEMAND = "on-demand"
    SPOT = "spot"
    LOCAL = "local"
    EXTERNAL = "external"


@dataclass(frozen=True, slots=True)
class Pool:
    name: str
    market: Market
    usd_per_node_hour: float
    accelerator: str | None
    """Accelerator type as Ray names it (`H200`), or None for the CPU engine."""
    accelerators_per_node: int
    cpus_per_node: int
    min_nodes: int
    max_nodes: int
    zone: str | None = None
    """Where its nodes are; spot nodes of one zone are lost together. None: a zone of its own."""

    @property
    def workers_per_node(self) -> int:
        """Engine workers that fit on one node: one an accelerator, or one a CPU slot."""
        return self.accelerators_per_node if self.accelerator else self.cpus_per_node

    def usd_per_hour(self, workers: int) -> float:
        """Price of the share of nodes that `workers` engine workers occupy."""
        return self.usd_per_node_hour * workers / self.workers_per_node
