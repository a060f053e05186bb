"""What one GPU of a group reads and computes in one step, before any efficiency."""

from dataclasses import dataclass
from typing import Self

from expertmesh.core.domain.model_shape import (
    Attention,
    Dtype,
    LatentAttention,
    LinearAttention,
    ModelShape,
)
from expertmesh.core.perf.layout import Layout
from expertmesh.core.perf.parameters import Parameters, expert, parameters
from expertmesh.core.perf.weights import Weights, weights

SPARSE_TOKENS = 2048
"""That sparse attention (DSA) reads of a context; its indexer scores all of them."""
TILE_ROWS = 64
"""Rows of an expert's smallest matrix product: fewer take as long (Hopper's WGMMA)."""


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
    """Expected share of `experts` that any of `tokens` picks: `1 - (1 - k/E)^tokens`."""
    if per_token >= experts:
        return 1.0
    # A step of less than one token is a mean over steps: linear between none and one.
    if tokens <= 1:
        return tokens * per_token / experts
    return float(1 - (1 - per_token / experts) ** tokens)


@dataclass(frozen=True, slots=True)
class Model:
    """A shape and what a layout makes of it: worked out once, used for many steps."""

    shape: ModelShape
    layout: Layout
    counts: Parameters
    held: Weights
    """On one GPU."""

    @classmethod
    def of(cls, shape: ModelShape, layout: Layout) -> Self:
        return cls(shape, layout, parameters(shape), weights(shape, layout))


def attention_work(model: Model, tokens: Tokens, kv: Dtype) -> Work:
    shape, layout = model.shape, model.layout
    reads = flops = 0.0
    for kind in shape.attention:
        layer_reads, layer_flops = _cache_work(kind, layout, tokens, kv)
        reads += layer_reads * kind.layers
        flops += layer_flops * kind.layers
    activations = tokens.count * shape.hidden * _ACTIVATION_BYTES * shape.layers
    return Work(
        weight_bytes=model.held.attention,
        other_bytes=reads + activations,
        flops=2 * model.counts.attention / layout.tensor * tokens.count,
        attention_flops=flops,
    )


def dense_work(model: Model, tokens: Tokens) -> Work:
    """Of dense layers, shared experts and the output head."""
    counts, held, tensor = model.counts, model.held, model.layout.tensor
    head = (counts.embeddings - counts.input_embeddings) / tensor
    head_bytes = held.embeddings * (1 - counts.input_embeddings / counts.embeddings)
    return Work(
        weight_bytes=held.dense + held.shared + head_bytes,
        flops=2 * (counts.dense + counts.shared) / tensor * tokens.count
        + 2 * head * tokens.sequences,
    )


def expert_work(model: Model, tokens: Tokens, skew: float) -> Work:
    """Of routed experts, on the GPU that has `skew` times the mean to do.

    Its experts are read no more often for that: favourites of all tokens leave more of the others
    unread (50 to 60 % are hit by 32 tokens where even routing hits 64 %), on every GPU.
    """
    layout, experts = model.layout, model.shape.experts
    if experts is None:
        return Work()
    group_tokens = tokens.count * layout.data
    cut = 1 if layout.expert_parallel else layout.world_size
    elements = expert(model.shape.hidden, experts) / cut
    hit = coverage(experts.count + layout.redundant_experts, experts.per_token, group_tokens)
    hits = layout.expert_slots(experts.count) * hit
    rows = group_tokens * experts.per_token / layout.expert * skew
    width = experts.latent or model.shape.hidden
    return Work(
        weight_bytes=model.held.experts * hit,
        # Received, permuted, quantised, multiplied, activated, multiplied, gathered.
        other_bytes=rows * (8 * width + 10 * experts.width / cut) * experts.layers,
        flops=2 * max(rows, hits * TILE_ROWS) * elements * experts.layers,
    )


# Norms, residuals and quantisation around one layer, in bytes per hidden element.
_ACTIVATION_BYTES = 20.0


def _cache_work(kind: Attention, layout: Layout, tokens: Tokens, kv: Dtype) -> tuple[float, float]:
    """Bytes of cache or state that one GPU reads for one layer, and its FLOPs with them."""
    if isinstance(kind, LinearAttention):
        tensor = min(layout.tensor, kind.value_heads)
        state = 2 * kind.state_bytes_per_sequence / tensor  # Read and written.
        flops = 6 * kind.recurrent_elements / tensor
        return tokens.sequences * state, tokens.count * flops
    # In prefill a token attends to half of the prompt on average, while the cache is read once a
    # sequence; in decode both are the whole context.
    cached = tokens.context
    attended = tokens.context / 2 if tokens.prefill else tokens.context
    heads = kind.heads / min(layout.tensor, kind.heads)
    if isinstance(kind, LatentAttention):
        compression, copies = 1, 1.0
        if tokens.prefill:
            pair = kind.nope_head_dim + kind.rope_head_dim + kind.v_head_dim
        else:
            pair = 2 * kind.kv_lora_rank + kind.rope_head_dim
    else:
        compression = kind.compression
        # Heads that are fewer than GPUs are kept more than once.
        copies = 1 / min(layout.tensor, kind.kv_heads)
        pair = kind.head_dim + kind.value_dim
        if kind.window is not None:
            cached, attended = min(cached, kind.window), min(attended, kind.window)
    indexed = attended / compression
    attended /= compression
    if kind.index_heads:
        attended = min(attended, SPARSE_TOKENS)
        if not tokens.prefill:
            cached = min(cached, SPARSE_TOKENS * compression)
    entry_bytes = kind.kv_elements_per_token * copies * kv.bytes_per_element
    index_bytes = kind.index_elements_per_token * Dtype.FP8.bytes_per_element
    index_flops = kind.index_heads * kind.index_head_dim * indexed
    reads = cached * entry_bytes + tokens.context * index_bytes
    return tokens.sequences * reads, 2 * tokens.count * (heads * pair * attended + index_flops)
