"""What one GPU of a group reads and computes in one step, before any efficiency."""

from dataclasses import dataclass

from expertmesh.core.domain.model_shape import (
    Attention,
    Dtype,
    Experts,
    LatentAttention,
    LinearAttention,
    ModelShape,
)
from expertmesh.core.perf.layout import Layout
from expertmesh.core.perf.parameters import parameters

SPARSE_TOKENS = 2048
"""That sparse attention (DSA) reads of a context; its indexer scores all of them."""
TILE_ROWS = 64
"""Rows of an expert's smallest matrix product: fewer take as long (Hopper's WGMMA)."""
SKEW_PER_DOUBLING = 0.31
"""Busiest GPU over the mean, less 1, per doubling of EP: 1.56 at EP 32 (TensorRT-LLM blog 4)."""
SKEW_PER_DOUBLING_BALANCED = 0.022
"""The same with redundant experts: 0.109 at EP 32."""
STATE_BYTES_PER_ELEMENT = 4.0
"""Of the recurrent state of linear attention, which is kept in FP32."""


@dataclass(frozen=True, slots=True)
class Work:
    """Of one kind of layer, all layers of the kind together, on the busiest GPU."""

    weight_bytes: float = 0.0
    other_bytes: float = 0.0
    """Cache, state and activations."""
    flops: float = 0.0
    """In matrix products with weights."""
    attention_flops: float = 0.0
    """In products with the cache, in the dtype of the cache."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """Of one attention rank in one step."""

    count: float
    """That the layers see."""
    sequences: float
    """That they belong to; each gets logits."""
    context: float
    """Tokens that each attends to at most: the cached ones, or the prompt's length in prefill."""
    prefill: bool


def coverage(experts: int, per_token: int, tokens: float) -> float:
    """Expected share of `experts` that any of `tokens` picks: `1 − (1 − k/E)^tokens`."""
    if per_token >= experts:
        return 1.0
    # A step of less than one token is a mean over steps: linear between none and one.
    if tokens <= 1:
        return tokens * per_token / experts
    return float(1 - (1 - per_token / experts) ** tokens)


def imbalance(layout: Layout) -> float:
    """Busiest GPU over the mean one, in tokens routed to its experts; 1 without EP."""
    if not layout.expert_parallel:
        return 1.0
    skew = SKEW_PER_DOUBLING_BALANCED if layout.redundant_experts else SKEW_PER_DOUBLING
    return 1 + skew * (layout.expert - 1).bit_length()


def attention_work(shape: ModelShape, layout: Layout, tokens: Tokens, kv: Dtype) -> Work:
    counts = parameters(shape)
    reads = flops = 0.0
    for kind in shape.attention:
        kind_reads, kind_flops = _cache_work(kind, shape, layout, tokens, kv)
        reads += kind_reads
        flops += kind_flops
    activations = tokens.count * shape.hidden * _ACTIVATION_BYTES * shape.layers
    return Work(
        weight_bytes=counts.attention / layout.tensor * _other_bytes(shape),
        other_bytes=reads + activations,
        flops=2 * counts.attention / layout.tensor * tokens.count,
        attention_flops=flops,
    )


def dense_work(shape: ModelShape, layout: Layout, tokens: Tokens) -> Work:
    """Of dense layers, shared experts and the output head."""
    counts = parameters(shape)
    weights = (counts.dense + counts.shared) / layout.tensor
    head = shape.vocab * shape.hidden / layout.tensor
    return Work(
        weight_bytes=weights * _other_bytes(shape) + head * Dtype.BF16.bytes_per_element,
        flops=2 * weights * tokens.count + 2 * head * tokens.sequences,
    )


def expert_work(shape: ModelShape, layout: Layout, tokens: Tokens) -> Work:
    """Of routed experts, on the GPU that has most to do."""
    experts = shape.experts
    if experts is None:
        return Work()
    group_tokens = tokens.count * layout.data
    elements = _expert_elements(shape, experts)
    slots = layout.expert_slots(experts.count)
    skew = imbalance(layout)
    hit = coverage(experts.count + layout.redundant_experts, experts.per_token, group_tokens)
    hits = min(float(slots), slots * hit * skew)
    rows = group_tokens * experts.per_token / layout.expert * skew
    cut = layout.world_size if layout.expert == 1 else 1
    quantisation = shape.quantisation
    element_bytes = (
        quantisation.experts.bytes_per_element + quantisation.expert_scale_bytes_per_element
    )
    width = experts.latent or shape.hidden
    return Work(
        weight_bytes=hits * elements / cut * element_bytes * experts.layers,
        other_bytes=rows * (3 * width + 6 * experts.width / cut) * experts.layers,
        flops=2 * max(rows, hits * TILE_ROWS) * elements / cut * experts.layers,
    )


# Norms, residuals and quantisation around one layer, in bytes per hidden element.
_ACTIVATION_BYTES = 20.0


def _expert_elements(shape: ModelShape, experts: Experts) -> float:
    return experts.projections * (experts.latent or shape.hidden) * experts.width


def _other_bytes(shape: ModelShape) -> float:
    quantisation = shape.quantisation
    return quantisation.others.bytes_per_element + quantisation.other_scale_bytes_per_element


def _cache_work(
    kind: Attention, shape: ModelShape, layout: Layout, tokens: Tokens, kv: Dtype
) -> tuple[float, float]:
    """Bytes of cache or state that are read, and FLOPs with them."""
    # In prefill a token attends to half of the prompt on average; its keys are read once a
    # sequence and then reused.
    attended = tokens.context / 2 if tokens.prefill else tokens.context
    if isinstance(kind, LinearAttention):
        state = kind.value_heads * kind.key_head_dim * kind.value_head_dim * kind.layers
        state /= min(layout.tensor, kind.value_heads)
        return 2 * tokens.sequences * state * STATE_BYTES_PER_ELEMENT, 6 * tokens.count * state
    if isinstance(kind, LatentAttention):
        width = kind.kv_lora_rank + kind.rope_head_dim
        heads = kind.heads / min(layout.tensor, kind.heads)
        if tokens.prefill:
            per_pair = heads * (kind.nope_head_dim + kind.rope_head_dim + kind.v_head_dim)
        else:
            per_pair = heads * (2 * kind.kv_lora_rank + kind.rope_head_dim)
        index_bytes = index_flops = 0.0
        if kind.index_heads:
            index_bytes = kind.index_head_dim * tokens.context
            index_flops = kind.index_heads * kind.index_head_dim * attended
            attended = min(attended, SPARSE_TOKENS)
        read = attended if not tokens.prefill else tokens.context
        cached = width * kv.bytes_per_element * read + index_bytes
        flops = 2 * tokens.count * (per_pair * attended + index_flops)
    else:
        value_dim = kind.v_head_dim or kind.head_dim
        if kind.window is not None:
            attended = min(attended, float(kind.window))
        heads = kind.heads / min(layout.tensor, kind.heads)
        kv_heads = max(1.0, kind.kv_heads / layout.tensor)
        per_token = kv_heads * (kind.head_dim + value_dim) * kv.bytes_per_element
        read = attended if not tokens.prefill else tokens.context
        if shape.kv_bytes_per_token_layer is not None:
            # A compressed cache: what is cached of a context is what is read and attended to.
            share = min(1.0, shape.kv_bytes_per_token_layer / per_token)
            read *= share
            attended *= share
        cached = per_token * read
        flops = 2 * tokens.count * heads * (kind.head_dim + value_dim) * attended
    return tokens.sequences * cached * kind.layers, flops * kind.layers

