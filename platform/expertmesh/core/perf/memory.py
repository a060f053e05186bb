"""What one GPU of a group holds, and how many tokens are left for sequences.

Follows vLLM 0.29: it takes a share of the GPU's whole memory, and what weights, activations,
exchange buffers and CUDA graphs leave of it is the cache. Driver and NCCL lie outside that share.
"""

from dataclasses import dataclass
from enum import StrEnum

from expertmesh.core.domain.accelerator import Accelerator, Era
from expertmesh.core.domain.model_shape import Dtype, FullAttention, LatentAttention, ModelShape
from expertmesh.core.perf.fabric import Exchange
from expertmesh.core.perf.kv_cache import (
    BLOCK_TOKENS,
    STATES_PER_SEQUENCE,
    KvCache,
    kv_cache,
)
from expertmesh.core.perf.layout import Layout
from expertmesh.core.perf.weights import Weights, padded_vocabulary, weights

GPU_MEMORY_UTILIZATION = 0.92
"""vLLM's default since 0.22."""
CONCURRENT_BATCHES = 2
"""With asynchronous scheduling, one runs while the next is prepared."""
NCCL_BYTES = 360 * 2**20
"""342 to 392 MB by aiconfigurator's tables."""
DEEP_EP_BYTES = 1024 * 2**20
"""Of each of DeepEP's buffers, for NVLink and for the NIC (`VLLM_DEEPEP_BUFFER_SIZE_MB`)."""
GRAPH_BYTES = 19 * 2**20
"""Of one captured CUDA graph: 1.62 GiB for 51 piecewise and 35 full ones (vllm#39559)."""
GRAPHS = 86
ACTIVATIONS_BY_TENSOR = {1: 10, 2: 6, 4: 5, 8: 5}
"""Elements a token and hidden element outside of experts: aiconfigurator's fit to dense models."""
LEAST_ACTIVATION_BYTES = 70 * 2**20
BATCHED_TOKENS_LOW_LATENCY = 256
"""Most tokens of a rank in one step with DeepEP's low-latency kernels, by vLLM's default."""

FP8_BLOCK_SCALE_BYTES = 4 / 128**2
"""An element's share of the scale of its block."""
SMALLEST_FP8_BLOCK = 32
"""To which vLLM refines blocks of 128 when experts are cut (`refine_fp8_moe_block_shape`)."""


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """How much one attention rank may take on in a step."""

    batched_tokens: int
    sequences: int


class Reason(StrEnum):
    MEMORY = "memory"
    DTYPE = "dtype"
    CONTEXT = "context"
    LAYOUT = "layout"


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why there is no plan, and the nearest that is possible."""

    reason: Reason
    problem: str
    possible: str

    def __str__(self) -> str:
        return f"{self.problem}; {self.possible}"


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes on one GPU. Weights, activations, buffers, graphs, headroom and cache add up to
    `memory_bytes`, unless something is short."""

    memory_bytes: int
    weights: Weights
    activation_bytes: int
    """At the peak of a step with all the tokens that the engine takes on."""
    buffer_bytes: int
    """NCCL's, and those of the exchange of tokens (NVSHMEM)."""
    graph_bytes: int
    headroom_bytes: int
    """Left to the driver, less NCCL's buffers."""
    kv_bytes: int
    """Space of the cache; negative when the rest does not fit."""
    context_tokens: int
    cache: KvCache
    limits: EngineLimits
    computed_in: Dtype
    """Arithmetic with experts; BF16 where weights are widened on the fly."""

    @property
    def kv_bytes_per_token(self) -> float:
        return self.cache.bytes_per_token

    @property
    def state_bytes_per_sequence(self) -> int:
        return self.cache.state_bytes_per_sequence

    @property
    def kv_tokens(self) -> int:
        """Of one attention rank, as vLLM reports it at this context."""
        return self.cache.tokens(self.kv_bytes, self.context_tokens)

    def max_sequences(self, context_tokens: int) -> int:
        """Of one attention rank at once, by memory and by what the engine takes on."""
        by_memory = self.cache.sequences(self.kv_bytes, context_tokens)
        return min(by_memory, self.limits.sequences)

    @property
    def short_by_bytes(self) -> int:
        """Missing on each GPU for the weights and one sequence of the whole context."""
        needed = self.cache.sequence_bytes(self.context_tokens)
        return max(0, needed - self.kv_bytes) + max(0, -self.headroom_bytes)

    @property
    def fits(self) -> bool:
        return self.short_by_bytes == 0

    @property
    def longest_context_tokens(self) -> int:
        """That one sequence may have; 0 when not even the weights fit."""
        low, high = 0, self.context_tokens
        while low < high:
            middle = (low + high + 1) // 2
            if self.cache.sequence_bytes(middle) <= self.kv_bytes:
                low = middle
            else:
                high = middle - 1
        return low


def engine_limits(accelerator: Accelerator, low_latency: bool = False) -> EngineLimits:
    """vLLM's defaults for its API server (`EngineArgs.get_batch_defaults`)."""
    if low_latency:
        # Each sequence needs a token of a step, so that there are no more of them.
        return EngineLimits(BATCHED_TOKENS_LOW_LATENCY, BATCHED_TOKENS_LOW_LATENCY)
    gib = accelerator.memory_bytes / 2**30
    if gib >= 160:
        return EngineLimits(16384, 1024)
    if gib >= 70 and accelerator.era is not Era.AMPERE:
        return EngineLimits(8192, 1024)
    return EngineLimits(2048, 256)


def _low_latency(layout: Layout, exchange: Exchange, decode_only: bool) -> bool:
    return decode_only and _exchanges(layout) and exchange is Exchange.DEEP_EP


def _exchanges(layout: Layout) -> bool:
    return layout.expert_parallel and layout.data > 1


def memory(
    shape: ModelShape,
    accelerator: Accelerator,
    layout: Layout,
    *,
    context_tokens: int | None = None,
    kv: Dtype = Dtype.BF16,
    exchange: Exchange = Exchange.ALL_GATHER,
    decode_only: bool = False,
    utilization: float = GPU_MEMORY_UTILIZATION,
    limits: EngineLimits | None = None,
    graphs: int = GRAPHS,
    block_tokens: int = BLOCK_TOKENS,
    states_per_sequence: int = STATES_PER_SEQUENCE,
) -> MemoryPlan:
    """Ask `refusal` first: what it refuses has no meaning here.

    `context_tokens` is the longest that a sequence may get, the model's own limit unless given.
    With `decode_only` an exchange by DeepEP has its low-latency kernels, whose buffers grow with
    the experts, else those for throughput.
    """
    context = context_tokens if context_tokens is not None else shape.max_position_embeddings
    low_latency = _low_latency(layout, exchange, decode_only)
    limits = limits or engine_limits(accelerator, low_latency)
    held = weights(shape, layout)
    activation = _activation_bytes(shape, layout, limits, exchange, low_latency)
    exchanged = 0
    if exchange is Exchange.DEEP_EP and _exchanges(layout):
        exchanged = _deep_ep_bytes(shape, accelerator, layout, limits, low_latency)
    nccl = NCCL_BYTES if layout.world_size > 1 else 0
    graph = graphs * GRAPH_BYTES
    budget = int(accelerator.memory_bytes * utilization)
    computed = accelerator.computes_in(shape.quantisation.experts)
    return MemoryPlan(
        memory_bytes=accelerator.memory_bytes,
        weights=held,
        activation_bytes=activation,
        buffer_bytes=exchanged + nccl,
        graph_bytes=graph,
        headroom_bytes=accelerator.memory_bytes - budget - nccl,
        kv_bytes=budget - held.total - activation - exchanged - graph,
        context_tokens=context,
        cache=kv_cache(
            shape,
            layout.tensor,
            kv,
            in_flight_tokens=CONCURRENT_BATCHES * limits.batched_tokens,
            block_tokens=block_tokens,
            states_per_sequence=states_per_sequence,
        ),
        limits=limits,
        computed_in=computed or Dtype.BF16,
    )


def refusal(
    shape: ModelShape,
    accelerator: Accelerator,
    layout: Layout,
    *,
    context_tokens: int | None = None,
    kv: Dtype = Dtype.BF16,
) -> Refusal | None:
    """Why vLLM could not start such a group at all, whatever its memory; None when it could."""
    return (
        _memory_refusal(accelerator)
        or _dtype_refusal(shape, accelerator, kv)
        or _context_refusal(shape, context_tokens)
        or _layout_refusal(shape, layout)
    )


def widened(shape: ModelShape, accelerator: Accelerator) -> str | None:
    """One sentence when the GPU has no arithmetic for the weights, but kernels that widen them."""
    stored = {shape.quantisation.experts, shape.quantisation.others}
    lifted = sorted(d for d in stored if accelerator.computes_in(d) not in (d, None))
    if not lifted:
        return None
    return (
        f"{accelerator.name} has no arithmetic in {' and '.join(lifted).upper()}: "
        "such weights take little memory there, and are computed with in BF16"
    )


def _memory_refusal(accelerator: Accelerator) -> Refusal | None:
    if accelerator.memory_bytes > 0 and accelerator.memory_bytes_per_s > 0:
        return None
    return Refusal(
        Reason.MEMORY,
        f"{accelerator.name} has no memory or no bandwidth",
        "write what software can use of it, as in catalog/accelerators.yaml",
    )


def _dtype_refusal(shape: ModelShape, accelerator: Accelerator, kv: Dtype) -> Refusal | None:
    usable = set(accelerator.flops_per_s) | accelerator.weights_only
    possible = ", ".join(sorted(d.upper() for d in usable)) or "nothing"
    for stored in (shape.quantisation.experts, shape.quantisation.others):
        if accelerator.computes_in(stored) is None:
            return Refusal(
                Reason.DTYPE,
                f"{accelerator.name} cannot work with weights in {stored.upper()}",
                f"it takes checkpoints in {possible}",
            )
    if kv is Dtype.FP8 and Dtype.FP8 not in accelerator.flops_per_s:
        return Refusal(
            Reason.DTYPE,
            f"{accelerator.name} cannot keep its cache in FP8",
            "it keeps one in BF16",
        )
    return None


def _context_refusal(shape: ModelShape, context_tokens: int | None) -> Refusal | None:
    longest = shape.max_position_embeddings
    # 0: the config does not say.
    if context_tokens is None or 1 <= context_tokens <= (longest or context_tokens):
        return None
    return Refusal(
        Reason.CONTEXT,
        f"a context of {context_tokens:,} tokens is outside of what the model reads",
        f"from 1 to {longest:,} is possible",
    )


def _layout_refusal(shape: ModelShape, layout: Layout) -> Refusal | None:
    """vLLM cuts whole heads and blocks, and gives each GPU the same number of experts."""
    if not _cuts_evenly(shape, layout.tensor):
        fitting = [n for n in range(1, _most_heads(shape) + 1) if _cuts_evenly(shape, n)]
        return Refusal(
            Reason.LAYOUT,
            f"{layout.tensor} GPUs cannot share heads and widths evenly",
            f"tensor may be {', '.join(map(str, fitting))}",
        )
    experts = shape.experts
    if experts is None:
        if layout.expert_parallel:
            return Refusal(Reason.LAYOUT, "the model has no experts", "expert must be 1")
        return None
    if layout.redundant_experts and not experts.balanceable:
        return Refusal(
            Reason.LAYOUT, "vLLM cannot copy experts of this model", "redundant_experts must be 0"
        )
    if not layout.expert_parallel:
        step = SMALLEST_FP8_BLOCK if _fp8_by_blocks(shape) else 1
        if layout.world_size == 1 or experts.width % (layout.world_size * step) == 0:
            return None
        return Refusal(
            Reason.LAYOUT,
            f"experts {experts.width} wide cannot be cut over {layout.world_size} GPUs",
            f"they can be whole on them: expert may be {layout.world_size}",
        )
    slots = experts.count + layout.redundant_experts
    if slots % layout.expert == 0:
        return None
    nearest = layout.redundant_experts + (-slots) % layout.expert
    return Refusal(
        Reason.LAYOUT,
        f"{slots} experts do not divide over {layout.expert} GPUs",
        f"with {nearest} redundant experts they do"
        if experts.balanceable
        else f"vLLM cannot copy experts of this model: take a divisor of {experts.count}",
    )


def _cuts_evenly(shape: ModelShape, tensor: int) -> bool:
    widths = shape.dense_width, shape.experts.shared_width if shape.experts is not None else 0
    if any(width % tensor for width in widths):
        return False
    for kind in shape.attention:
        if isinstance(kind, FullAttention):
            keys = kind.kv_heads
            if kind.heads % tensor or (keys % tensor and tensor % keys):
                return False
        elif isinstance(kind, LatentAttention):
            if kind.heads % tensor:
                return False
        elif kind.value_heads % tensor or kind.key_heads % tensor:
            return False
    return True


def _most_heads(shape: ModelShape) -> int:
    return max(
        kind.heads if isinstance(kind, FullAttention | LatentAttention) else kind.value_heads
        for kind in shape.attention
    )


def _fp8_by_blocks(shape: ModelShape) -> bool:
    scale = shape.quantisation.expert_scale_bytes_per_element
    return shape.quantisation.experts is Dtype.FP8 and scale == FP8_BLOCK_SCALE_BYTES


def _activation_bytes(
    shape: ModelShape,
    layout: Layout,
    limits: EngineLimits,
    exchange: Exchange,
    low_latency: bool,
) -> int:
    """Upper bound: residual stream and attention, the experts' two work spaces, and logits."""
    tokens = limits.batched_tokens
    two = Dtype.BF16.bytes_per_element
    per_token = ACTIVATIONS_BY_TENSOR[_power_of_two_up_to_eight(layout.tensor)]
    around = max(float(LEAST_ACTIVATION_BYTES), two * tokens * shape.hidden * per_token)
    inside = 0.0
    if shape.experts is not None:
        experts = shape.experts
        cut = 1 if layout.expert_parallel else layout.world_size
        hidden = experts.latent or shape.hidden
        width = experts.width / cut
        rows = float(tokens * experts.per_token)
        if layout.data > 1:
            if exchange is Exchange.ALL_GATHER or not layout.expert_parallel:
                rows *= layout.data
            elif low_latency:
                # A row for every token that any rank might send to each expert here.
                rows = layout.expert_slots(experts.count) * tokens * layout.world_size
        inside = two * rows * (max(width, hidden) + max(2 * width, hidden))
    logits = limits.sequences * padded_vocabulary(shape.vocab) * (two + 2 * 4)
    return round(around + inside + logits)


def _deep_ep_bytes(
    shape: ModelShape,
    accelerator: Accelerator,
    layout: Layout,
    limits: EngineLimits,
    low_latency: bool,
) -> int:
    """Of DeepEP; the low-latency ones as `LowLatencyLayout` in its csrc/config.hpp."""
    if shape.experts is None:
        return 0
    if not low_latency:
        beyond = layout.world_size > accelerator.link_domain
        return DEEP_EP_BYTES * (2 if beyond else 1)
    message = 16 + shape.hidden * 2
    slots = shape.experts.count + layout.redundant_experts
    one_way = slots * limits.batched_tokens * message
    # Sending and receiving, each twice: one is filled while the other is read.
    return DEEP_EP_BYTES + 4 * one_way


def _power_of_two_up_to_eight(tensor: int) -> int:
    return next(n for n in (8, 4, 2, 1) if tensor >= n)
