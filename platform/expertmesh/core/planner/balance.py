"""How unevenly a group's experts are asked, and so how much longer its busiest GPU takes."""

from collections.abc import Sequence
from dataclasses import dataclass

from expertmesh.core.domain.model_shape import Experts, ModelShape
from expertmesh.core.perf.layout import Layout
from expertmesh.core.planner.expert_load import power_law
from expertmesh.core.planner.placement import (
    Loads,
    Ranks,
    balancedness,
    first_placement,
    place,
)

PLACED_LAYERS = 4
"""That stand for all: the balancedness of more of them differs by a few percent."""
ORDERED_LAYERS = 16
"""The same of experts in order, which is quick to tell and varies more."""
IN_ORDER_PER_DOUBLING = 0.31
"""Busiest GPU over the mean, less 1, per doubling of EP: 1.56 at EP 32 (TensorRT-LLM blog 4)."""
DRIFT_PER_DOUBLING = 0.06
"""The same where experts have been placed: loads drift between two placements. Between 0.02
(TensorRT-LLM blog 4: 0.109 at EP 32) and 0.1 (Ant, 2025-09-26: mean over busiest above 0.7 at
EP 16); 0.06 is what SGLang lost to perfect balance at EP 32 (lmsys 2025-05-05)."""
EXPONENT = 1.01
EXPONENT_QWEN3 = 1.2
"""Of the power law: measured for DeepSeek-V3 and Qwen3-235B (aiconfigurator,
docs/POWER_LAW_DISTRIBUTION.md)."""


@dataclass(frozen=True, slots=True)
class ExpertLoad:
    """Measured: how often each expert of each layer was asked."""

    source: str
    """Where it is from, for a person."""
    layers: tuple[tuple[float, ...], ...]

    @property
    def experts(self) -> int:
        return len(self.layers[0]) if self.layers else 0


@dataclass(frozen=True, slots=True)
class Balance:
    """Balancedness is that of the mean over the busiest rank, 1 at best."""

    before: float
    """With the experts and copies in order, as vLLM starts."""
    after: float
    """As vLLM's EPLB places them; without copies it is off, and this is as before."""
    skew: float
    """Load of the busiest rank over the mean: what balancedness says, and no less than groups of
    this size have been seen to have."""


class Balances:
    """Of all layouts of a search, each worked out once."""

    def __init__(self, measured: ExpertLoad | None = None) -> None:
        self._measured = measured
        self._known: dict[tuple[object, ...], Balance] = {}
        self._loads: dict[tuple[int, float, int], Loads] = {}

    def of(self, shape: ModelShape, layout: Layout, gpus_per_node: int) -> Balance | None:
        """None without expert parallelism."""
        experts = shape.experts
        if experts is None or not layout.expert_parallel:
            return None
        ranks = ranks_of(experts, layout, gpus_per_node)
        key = (experts.count, usual_exponent(shape), ranks)
        if key not in self._known:
            self._known[key] = self._balance(shape, experts.count, ranks)
        return self._known[key]

    def _balance(self, shape: ModelShape, experts: int, ranks: Ranks) -> Balance:
        ordered = self.loads(shape, ORDERED_LAYERS)
        first = first_placement(len(ordered), experts, ranks.count, ranks.redundant)
        before = balancedness(first, ordered)
        doublings = (ranks.count - 1).bit_length()
        least = 1 + DRIFT_PER_DOUBLING * doublings
        if not ranks.redundant:
            if self._measured is None:
                # A power law does not know which hot experts are neighbours.
                least = 1 + IN_ORDER_PER_DOUBLING * doublings
            return Balance(before, before, max(least, 1 / before))
        loads = self.loads(shape, PLACED_LAYERS)
        # vLLM's own policy, which is the greedy one.
        after = balancedness(place(loads, ranks, trials=0), loads)
        return Balance(before, after, max(least, 1 / after))

    def loads(self, shape: ModelShape, most_layers: int) -> Loads:
        experts = shape.experts
        assert experts is not None, f"{shape.architecture} has no experts"
        if self._measured is not None:
            return _sample(self._measured.layers, most_layers)
        key = (experts.count, usual_exponent(shape), min(most_layers, experts.layers))
        if key not in self._loads:
            count, exponent, layers = key
            self._loads[key] = power_law(count, layers, exponent)
        return self._loads[key]


def ranks_of(experts: Experts, layout: Layout, gpus_per_node: int) -> Ranks:
    whole = layout.expert % gpus_per_node == 0
    return Ranks(
        layout.expert,
        layout.redundant_experts,
        nodes=max(1, layout.expert // gpus_per_node) if whole else 1,
        groups=max(1, experts.groups),
    )


def usual_exponent(shape: ModelShape) -> float:
    return EXPONENT_QWEN3 if shape.architecture.startswith("Qwen3") else EXPONENT


def _sample(layers: Sequence[tuple[float, ...]], most: int) -> Loads:
    """Evenly from first to last."""
    if len(layers) <= most:
        return layers
    return [layers[index * (len(layers) - 1) // (most - 1)] for index in range(most)]
