"""Where the experts of a group lie: which are replicated, and on which rank each replica is.

Loads are tokens by layer and expert, in any unit: only ratios count. A rank's load in a layer is
that of its slots, and all ranks wait for the heaviest, layer by layer. So balancedness is the sum
over layers of the mean rank's load over the sum of the heaviest rank's, as vLLM reports it: 1 is
perfect, 0.5 means that experts take twice the time they need.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import fsum, isfinite

from expertmesh.core.planner.expert_packing import Packing, greedy, pack

Loads = Sequence[Sequence[float]]
"""By layer and expert."""

TRIALS = 16
"""Starts of one layer, or of one node's part of it, at most.

58 layers of 288 slots take 0.1 s of one core with one trial and 0.1 to 2 s with 16.
"""


@dataclass(frozen=True, slots=True)
class Placement:
    experts: int
    """Routed experts a layer."""
    ranks: int
    slots: tuple[tuple[int, ...], ...]
    """By layer, the expert in each slot; a rank's slots follow each other.

    vLLM calls this the map of physical to logical experts.
    """

    @property
    def slots_per_rank(self) -> int:
        return len(self.slots[0]) // self.ranks

    @property
    def redundant(self) -> int:
        """Slots a layer beyond one for each expert."""
        return len(self.slots[0]) - self.experts

    def by_rank(self, layer: int) -> list[tuple[int, ...]]:
        """The experts of each rank in this layer."""
        slots, width = self.slots[layer], self.slots_per_rank
        return [slots[start : start + width] for start in range(0, len(slots), width)]


@dataclass(frozen=True, slots=True)
class Ranks:
    """What a group offers its experts."""

    count: int
    """Expert-parallel ranks."""
    redundant: int = 0
    """Slots a layer beyond one for each expert, over all ranks."""
    nodes: int = 1
    """Of equally many ranks each; ranks of one node follow each other."""
    groups: int = 1
    """Of experts, of which the router picks some first (DeepSeek-V3 has 8); 1 when it does not."""

    @property
    def hierarchical(self) -> bool:
        """Each expert group stays within a node, so that tokens cross fewer node borders."""
        return self.nodes > 1 and self.groups % self.nodes == 0


def place(loads: Loads, ranks: Ranks, trials: int = TRIALS) -> Placement:
    """The placement for these loads; in no layer worse balanced than the published greedy one's.

    `trials` bounds the work: 0 is the greedy start alone. Raises ValueError when the slots do not
    divide by ranks or nodes, or a load is not a finite number of at least 0.
    """
    experts = _checked(loads, ranks)
    return Placement(
        experts,
        ranks.count,
        tuple(_slots(_place_layer(layer, ranks, trials)) for layer in loads),
    )


def first_placement(layers: int, experts: int, ranks: int, redundant: int = 0) -> Placement:
    """How vLLM lays experts out before it has measured anything: in order, then copies in order."""
    slots = tuple(slot % experts for slot in range(experts + redundant))
    if len(slots) % ranks:
        raise ValueError(f"{len(slots)} slots do not divide by {ranks} ranks")
    return Placement(experts, ranks, (slots,) * layers)


def rank_loads(placement: Placement, loads: Loads) -> list[list[float]]:
    """By layer and rank."""
    return [Packing(layer, placement.by_rank(index)).loads for index, layer in enumerate(loads)]


def balancedness(placement: Placement, loads: Loads) -> float:
    """Mean over heaviest rank load, summed over layers, above 0 to 1; 1 without any load."""
    by_layer = rank_loads(placement, loads)
    heaviest = fsum(max(layer) for layer in by_layer)
    return fsum(fsum(layer) / len(layer) for layer in by_layer) / heaviest if heaviest else 1.0


def _checked(loads: Loads, ranks: Ranks) -> int:
    """The number of experts."""
    if not loads or not loads[0]:
        raise ValueError("loads need at least one layer and one expert")
    experts = len(loads[0])
    slots = experts + ranks.redundant
    if ranks.count < 1 or ranks.nodes < 1 or ranks.groups < 1 or ranks.redundant < 0:
        raise ValueError(f"ranks, nodes and groups are at least 1, redundant at least 0: {ranks}")
    if slots % ranks.count:
        raise ValueError(
            f"{experts} experts and {ranks.redundant} redundant ones do not divide by "
            f"{ranks.count} ranks; the next that do are {-experts % ranks.count} redundant ones "
            f"and every {ranks.count} more"
        )
    if ranks.count % ranks.nodes:
        raise ValueError(f"{ranks.count} ranks do not divide by {ranks.nodes} nodes")
    if experts % ranks.groups:
        raise ValueError(f"{experts} experts do not divide by {ranks.groups} groups")
    for index, layer in enumerate(loads):
        if len(layer) != experts:
            raise ValueError(f"layer {index} has loads of {len(layer)} experts, not {experts}")
        if not all(isfinite(load) and load >= 0 for load in layer):
            raise ValueError(f"layer {index} has a load that is negative or not finite")
    return experts


def _place_layer(loads: Sequence[float], ranks: Ranks, trials: int) -> list[list[int]]:
    slots = (len(loads) + ranks.redundant) // ranks.count
    # On one node groups bind nothing, but the published algorithm then takes experts group by
    # group, which can break ties to its favour.
    if not ranks.hierarchical and (ranks.nodes > 1 or ranks.groups == 1):
        return pack(loads, ranks.count, slots, trials).ranks
    per_node = ranks.count // ranks.nodes
    size = len(loads) // ranks.groups
    groups = [loads[start : start + size] for start in range(0, len(loads), size)]
    sums = [fsum(group) for group in groups]
    groups_per_node = ranks.groups // ranks.nodes

    def on_nodes(packed: Packing) -> list[list[int]]:
        return [
            [group * size + i for group in groups for i in range(size)] for groups in packed.ranks
        ]

    def heaviest(nodes: list[Packing]) -> float:
        return max(node.heaviest for node in nodes)

    published = on_nodes(greedy(sums, ranks.nodes, groups_per_node))
    limit = heaviest([greedy([loads[e] for e in node], per_node, slots) for node in published])
    for nodes in (on_nodes(pack(sums, ranks.nodes, groups_per_node, trials)), published):
        packed = [pack([loads[e] for e in node], per_node, slots, trials, limit) for node in nodes]
        if heaviest(packed) <= limit * (1.0 + 1e-12):
            break
    return [
        [node[expert] for expert in rank]
        for node, packing in zip(nodes, packed, strict=True)
        for rank in packing.ranks
    ]


def _slots(by_rank: Sequence[Sequence[int]]) -> tuple[int, ...]:
    return tuple(expert for rank in by_rank for expert in sorted(rank))
