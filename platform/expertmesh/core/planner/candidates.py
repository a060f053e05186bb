"""All ways to cut a model over a pool's GPUs that vLLM 0.29 can start, and why not the rest."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from expertmesh.core.domain.accelerator import Era
from expertmesh.core.domain.model_shape import Dtype, ModelShape
from expertmesh.core.perf.fabric import Exchange, Fabric
from expertmesh.core.perf.layout import Layout
from expertmesh.core.perf.memory import Reason, refusal
from expertmesh.core.planner.question import Checkpoint, GpuPool, Targets

LARGEST_GROUP_GPUS = 320
"""DeepSeek's own decode groups have 144; one dead rank stops all of a group."""
LOW_LATENCY_HIDDEN = 8192
LOW_LATENCY_TOP_K = 11
"""Widest hidden size and most experts a token that DeepEP's low-latency kernels are compiled for
(vLLM's deepep_ll.py; `kNumMaxTopK` in DeepEP's internode_ll.cu)."""
HIGH_THROUGHPUT_NODES = frozenset({1, 2, 3, 4, 6, 8, 12, 16, 18, 20})
"""Nodes of 8 GPUs that its high-throughput kernels are compiled for (`SWITCH_RDMA_RANKS`)."""
SMALL_STEP_TOKENS = 2048
"""Tokens of a rank in a step, for groups that would lose much memory to larger steps: after an
all-gather every GPU holds the tokens of all ranks."""
FP8_BLOCK = 128
"""Rows and columns of FP8 weights with one scale, which vLLM does not cut through."""
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
    def overlaps(self) -> bool:
        """vLLM can exchange one half of a batch while it computes the other (DBO)."""
        return self in (Backend.DEEPEP_LOW_LATENCY, Backend.DEEPEP_HIGH_THROUGHPUT)

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
    FORMAT = "format"
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
    batched_tokens: int | None = None
    """Of a rank in one step at most; None for vLLM's default."""

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
    """By how much, to find the nearest: bytes over the group, the least seconds reached, or less
    the users that there is room for."""


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
    for gpus in world_sizes(pool.gpus_per_node, pool.max_nodes, pool.accelerator.link_domain):
        for layout in layouts(shape, gpus, pool.gpus_per_node):
            for backend, tokens in _exchanges(shape, pool, layout, role):
                candidate = Candidate(checkpoint, layout, role, backend, tokens)
                yield checked(candidate, pool, targets, kv)


def _exchanges(
    shape: ModelShape, pool: GpuPool, layout: Layout, role: Role
) -> Iterator[tuple[Backend, int | None]]:
    for backend in backends(shape, pool, layout, role):
        yield backend, None
        if backend is Backend.ALL_GATHER:
            yield backend, SMALL_STEP_TOKENS


def checked(
    candidate: Candidate, pool: GpuPool, targets: Targets, kv: Dtype
) -> Candidate | RuledOut:
    """The candidate, unless GPUs or vLLM rule it out."""
    shape, layout = candidate.checkpoint.shape, candidate.layout
    if not Fabric.of(pool.accelerator).reaches(layout.world_size):
        return RuledOut(
            candidate,
            Constraint.FABRIC,
            f"{pool.accelerator.name} has no network between {layout.world_size} GPUs",
            f"a group of up to {pool.accelerator.link_domain} GPUs",
        )
    cut = cuts_blocks(shape, layout)
    if cut is not None:
        return RuledOut(
            candidate,
            Constraint.FORMAT,
            f"{cut}, which blocks of {FP8_BLOCK} with one scale forbid",
            "fewer GPUs a rank, or whole experts on each GPU",
        )
    found = refusal(shape, pool.accelerator, layout, context_tokens=targets.context_tokens, kv=kv)
    if found is None:
        return candidate
    constraint = _CONSTRAINTS.get(found.reason, Constraint.EXPERTS)
    if found.reason is Reason.LAYOUT and "heads" in found.problem:
        constraint = Constraint.HEADS
    return RuledOut(candidate, constraint, found.problem, found.possible)


def cuts_blocks(shape: ModelShape, layout: Layout) -> str | None:
    """What vLLM refuses to cut in FP8 with scales for blocks; None when all is well."""
    quantisation, experts, tensor = shape.quantisation, shape.experts, layout.tensor

    def uneven(width: int, parts: int) -> bool:
        return parts > 1 and (width % parts > 0 or width // parts % FP8_BLOCK > 0)

    if experts is not None and _in_blocks(
        quantisation.experts, quantisation.expert_scale_bytes_per_element
    ):
        parts = 1 if layout.expert_parallel else layout.world_size
        if uneven(experts.width, parts):
            return f"experts {experts.width:,} wide are cut in {parts}"
    if not _in_blocks(quantisation.others, quantisation.other_scale_bytes_per_element):
        return None
    if experts is not None:
        # With both kinds of parallelism, shared experts are whole on each GPU.
        whole = layout.expert_parallel and layout.data > 1
        if not whole and uneven(experts.shared_width, tensor):
            return f"shared experts {experts.shared_width:,} wide are cut in {tensor}"
    if uneven(shape.dense_width, tensor):
        return f"layers {shape.dense_width:,} wide are cut in {tensor}"
    return None


def _in_blocks(dtype: Dtype, scale_bytes_per_element: float) -> bool:
    """MXFP8 has a scale for every 32 elements of a row, and can be cut there."""
    return dtype is Dtype.FP8 and 0 < scale_bytes_per_element < 1 / FP8_BLOCK


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
        if fill and not movable_experts(shape):
            # Yielded to be refused with its reason.
            yield Layout(tensor, data, gpus)
            continue
        yield Layout(tensor, data, gpus, fill)
        if movable_experts(shape) and data > 1:
            yield Layout(tensor, data, gpus, fill + gpus)


def movable_experts(shape: ModelShape) -> bool:
    """vLLM can copy the experts of this model in this format (EPLB).

    INT4 experts run in Marlin kernels, which it cannot rearrange (`supports_eplb`).
    """
    experts = shape.experts
    return (
        experts is not None and experts.balanceable and shape.quantisation.experts is not Dtype.INT4
    )


def backends(shape: ModelShape, pool: GpuPool, layout: Layout, role: Role) -> tuple[Backend, ...]:
    """DeepEP's high-throughput kernels switch CUDA graphs off, so that they only suit prefill.

    Both kinds need NVLink (or xGMI), and arithmetic in the experts' format: the kernels that widen
    weights (Marlin) take tokens as an all-gather leaves them.
    """
    experts, accelerator = shape.experts, pool.accelerator
    if layout.data == 1 or experts is None:
        return (Backend.NONE,)
    plain = (Backend.ALL_GATHER,)
    if accelerator.era is Era.CDNA:
        low, high = Backend.MORI_LOW_LATENCY, Backend.MORI_HIGH_THROUGHPUT
    elif accelerator.era in (Era.HOPPER, Era.BLACKWELL):
        low, high = Backend.DEEPEP_LOW_LATENCY, Backend.DEEPEP_HIGH_THROUGHPUT
    else:
        return plain
    computed = shape.quantisation.experts in accelerator.flops_per_s
    linked = accelerator.link_bytes_per_s >= NVLINK_BYTES_PER_S
    if not (layout.expert_parallel and computed and linked):
        return plain
    if role is Role.PREFILL:
        nodes = layout.nodes(pool.gpus_per_node)
        compiled = nodes in HIGH_THROUGHPUT_NODES and (nodes == 1 or pool.gpus_per_node == 8)
        return (*plain, high) if compiled else plain
    compiled = shape.hidden <= LOW_LATENCY_HIDDEN and experts.per_token <= LOW_LATENCY_TOP_K
    return (*plain, low) if compiled else plain


def _powers_of_two(up_to: int) -> list[int]:
    return [1 << n for n in range(up_to.bit_length()) if 1 << n <= up_to]


_CONSTRAINTS = {
    Reason.MEMORY: Constraint.MEMORY,
    Reason.DTYPE: Constraint.DTYPE,
    Reason.CONTEXT: Constraint.CONTEXT,
}
