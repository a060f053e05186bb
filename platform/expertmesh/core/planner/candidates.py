"""All ways to cut a model over the GPUs of a pool that vLLM 0.29 can start, and why not the rest."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from expertmesh.core.domain.accelerator import Accelerator, Era
from expertmesh.core.domain.model_shape import Dtype, ModelShape
from expertmesh.core.perf.fabric import Exchange, Fabric
from expertmesh.core.perf.layout import Layout
from expertmesh.core.perf.memory import Reason, refusal
from expertmesh.core.planner.question import Checkpoint, GpuPool, Targets

LARGEST_GROUP_GPUS = 320
"""DeepSeek's own decode groups have 144; one dead rank stops all of a group."""
LOW_LATENCY_HIDDEN = 8192
"""Widest hidden size that DeepEP's low-latency kernels are compiled for."""
NVLINK_BYTES_PER_S = 100e9
"""DeepEP needs NVLink; slower links are PCIe."""


class Role(StrEnum):
    BOTH = "both"
    PREFILL = "prefill"
    DECODE = "decode"


class Backend(StrEnum):
    """vLLM's `all2all_backend`."""

    NONE = "none"
    """Nothing is exchanged: one attention rank, or a dense model."""
    ALL_GATHER = "allgather_reducescatter"
    DEEPEP_LOW_LATENCY = "deepep_low_latency"
    DEEPEP_HIGH_THROUGHPUT = "deepep_high_throughput"
    MORI_LOW_LATENCY = "mori_low_latency"
    MORI_HIGH_THROUGHPUT = "mori_high_throughput"

    @property
    def exchange(self) -> Exchange:
        gathers = self in (Backend.NONE, Backend.ALL_GATHER)
        return Exchange.ALL_GATHER if gathers else Exchange.DEEP_EP

    @property
    def low_latency(self) -> bool:
        return self in (Backend.DEEPEP_LOW_LATENCY, Backend.MORI_LOW_LATENCY)


class Constraint(StrEnum):
    """What rules a candidate out, or makes it lose."""

    MEMORY = "memory"
    DTYPE = "dtype"
    CONTEXT = "context"
    HEADS = "heads"
    EXPERTS = "experts"
    FABRIC = "fabric"
    ROOM = "room"
    TPOT = "tpot"
    TTFT = "ttft"
    PRICE = "price"
    SIZE = "size"
    SPEED = "speed"
    SERVING = "serving"
    TARGETS = "targets"
    """They contradict themselves, or mean nothing."""


@dataclass(frozen=True, slots=True)
class Candidate:
    checkpoint: Checkpoint
    layout: Layout
    role: Role
    backend: Backend

    def __str__(self) -> str:
        layout = self.layout
        parts = [f"TP{layout.tensor}"]
        if layout.data > 1:
            parts.append(f"DP{layout.data}")
        if layout.expert_parallel:
            parts.append(f"EP{layout.expert}")
        if layout.redundant_experts:
            parts.append(f"+{layout.redundant_experts}")
        if self.role is not Role.BOTH:
            parts.append(self.role.value)
        return " ".join(parts)


@dataclass(frozen=True, slots=True)
class RuledOut:
    """`candidate` cannot be, or loses; `possible` is the nearest that can."""

    candidate: Candidate
    constraint: Constraint
    problem: str
    possible: str = ""
    missing: float = float("inf")
    """By how much, to find the nearest: bytes over the group, or the least seconds reached."""


def world_sizes(gpus_per_node: int, max_nodes: int, link_domain: int) -> list[int]:
    """Powers of two within a node, then whole nodes: all up to 4, and ever fewer of more."""
    sizes = [n for n in _powers_of_two(gpus_per_node) if gpus_per_node % n == 0]
    if gpus_per_node not in sizes:
        sizes.append(gpus_per_node)
    domain_nodes = max(1, link_domain // gpus_per_node)
    for nodes in sorted({*range(2, 5), 6, 8, 9, 12, 16, 18, 24, 32, 36, domain_nodes}):
        if 1 < nodes <= max_nodes and nodes * gpus_per_node <= LARGEST_GROUP_GPUS:
            sizes.append(nodes * gpus_per_node)
    return sizes


def candidates(
    checkpoint: Checkpoint, pool: GpuPool, targets: Targets, role: Role, kv: Dtype
) -> Iterator[Candidate | RuledOut]:
    """Smallest groups first."""
    shape = checkpoint.shape
    fabric = Fabric.of(pool.accelerator)
    for gpus in world_sizes(pool.gpus_per_node, pool.max_nodes, pool.accelerator.link_domain):
        for layout in layouts(shape, gpus, pool.gpus_per_node):
            for backend in backends(shape, pool.accelerator, layout, role):
                candidate = Candidate(checkpoint, layout, role, backend)
                if not fabric.reaches(gpus):
                    yield RuledOut(
                        candidate,
                        Constraint.FABRIC,
                        f"{pool.accelerator.name} has no network between {gpus} GPUs",
                        f"a group of up to {pool.accelerator.link_domain} GPUs",
                    )
                    continue
                refused = refusal(
                    shape, pool.accelerator, layout, context_tokens=targets.context_tokens, kv=kv
                )
                if refused is None:
                    yield candidate
                else:
                    constraint = _CONSTRAINTS.get(refused.reason, Constraint.EXPERTS)
                    if refused.reason is Reason.LAYOUT and "heads" in refused.problem:
                        constraint = Constraint.HEADS
                    yield RuledOut(candidate, constraint, refused.problem, refused.possible)


def layouts(shape: ModelShape, gpus: int, gpus_per_node: int) -> Iterator[Layout]:
    """Of one group. An attention rank stays within a node, as its GPUs talk in every layer."""
    for tensor in _powers_of_two(min(gpus, gpus_per_node)):
        if gpus % tensor:
            continue
        data = gpus // tensor
        experts = shape.experts
        if experts is None:
            # Ranks of a dense model have nothing to do with one another: they are groups.
            if data == 1:
                yield Layout(tensor)
            continue
        if gpus <= gpus_per_node:
            yield Layout(tensor, data)
        if gpus == 1:
            continue
        fill = -experts.count % gpus
        if fill and not balances(shape):
            # Yielded to be refused with its reason.
            yield Layout(tensor, data, gpus)
            continue
        yield Layout(tensor, data, gpus, fill)
        if balances(shape) and data > 1:
            yield Layout(tensor, data, gpus, fill + gpus)


def balances(shape: ModelShape) -> bool:
    """vLLM can copy the experts of this model in this format (EPLB).

    INT4 experts run in Marlin kernels, which it cannot rearrange (`supports_eplb`).
    """
    experts = shape.experts
    return (
        experts is not None and experts.balanceable and shape.quantisation.experts is not Dtype.INT4
    )


def backends(
    shape: ModelShape, accelerator: Accelerator, layout: Layout, role: Role
) -> tuple[Backend, ...]:
    """DeepEP's high-throughput kernels switch CUDA graphs off, so that they only suit prefill."""
    if layout.data == 1 or shape.experts is None:
        return (Backend.NONE,)
    if not layout.expert_parallel:
        return (Backend.ALL_GATHER,)
    if accelerator.era is Era.CDNA:
        fast = (Backend.MORI_LOW_LATENCY, Backend.MORI_HIGH_THROUGHPUT)
    elif accelerator.era in (Era.HOPPER, Era.BLACKWELL):
        fast = (Backend.DEEPEP_LOW_LATENCY, Backend.DEEPEP_HIGH_THROUGHPUT)
    else:
        return (Backend.ALL_GATHER,)
    if accelerator.link_bytes_per_s < NVLINK_BYTES_PER_S:
        return (Backend.ALL_GATHER,)
    if role is Role.PREFILL:
        return (Backend.ALL_GATHER, fast[1])
    if shape.hidden > LOW_LATENCY_HIDDEN:
        return (Backend.ALL_GATHER,)
    return (Backend.ALL_GATHER, fast[0])


def _powers_of_two(up_to: int) -> list[int]:
    return [1 << n for n in range(up_to.bit_length()) if 1 << n <= up_to]


_CONSTRAINTS = {
    Reason.MEMORY: Constraint.MEMORY,
    Reason.DTYPE: Constraint.DTYPE,
    Reason.CONTEXT: Constraint.CONTEXT,
}
