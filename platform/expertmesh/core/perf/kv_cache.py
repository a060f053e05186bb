"""What sequences cost in the cache of one GPU, in vLLM's blocks.

Layers of one kind share a block table. Models that mix kinds have their layers cut into groups of
equally many layers, all with blocks of the same size, from one pool.
"""

from dataclasses import dataclass

from expertmesh.core.domain.model_shape import (
    Attention,
    Dtype,
    FullAttention,
    LatentAttention,
    LinearAttention,
    ModelShape,
)

BLOCK_TOKENS = 16
"""vLLM's default on GPUs; its CPU engine has 128, and 16 for latent attention."""
LATENT_HYBRID_BLOCK_TOKENS = 128
SPARSE_FP8_EXTRA_BYTES = 16
"""Scales of one FP8 latent (`fp8_ds_mla`), whose rotary key stays in BF16: 656 bytes in all."""
STATES_PER_SEQUENCE = 2
"""Of linear attention with prefix caching; 1 without (vLLM's `mamba_cache_mode` align and none)."""


@dataclass(frozen=True, slots=True)
class BlockTable:
    """Layers of one kind, or as many of them as make up one group."""

    block_tokens: int
    window: int | None = None
    states: int = 0
    """Blocks that hold a state of a sequence, whatever its length; 0 for a cache by token."""

    def blocks(self, context_tokens: int, in_flight_tokens: int) -> int:
        if self.states:
            return self.states
        if self.window is None:
            return -(-context_tokens // self.block_tokens)
        kept = min(self.window - 1 + in_flight_tokens, context_tokens)
        # One more, as a window need not start where a block does.
        return -(-kept // self.block_tokens) + 1


@dataclass(frozen=True, slots=True)
class KvCache:
    """Of one attention rank, as one of its GPUs sees it."""

    tables: tuple[BlockTable, ...]
    block_bytes: int
    """Of one block of any table, over all layers of the group."""
    in_flight_tokens: int
    """Scheduled and not yet settled; windows keep room for them."""

    def blocks(self, context_tokens: int) -> int:
        """That one sequence of this length takes."""
        return sum(table.blocks(context_tokens, self.in_flight_tokens) for table in self.tables)

    def sequence_bytes(self, context_tokens: int) -> int:
        return self.blocks(context_tokens) * self.block_bytes

    def tokens(self, space_bytes: int, context_tokens: int) -> int:
        """Capacity as vLLM reports it: sequences of this length, in tokens."""
        if space_bytes <= 0 or not self.tables:
            return 0
        blocks = space_bytes // self.block_bytes
        return int(blocks / self.blocks(context_tokens) * context_tokens)

    def sequences(self, space_bytes: int, context_tokens: int) -> int:
        """Whole sequences of this length at once."""
        if space_bytes <= 0 or not self.tables:
            return 0
        return space_bytes // self.block_bytes // self.blocks(context_tokens)

    @property
    def bytes_per_token(self) -> float:
        """Of one more token of a sequence that is longer than all windows."""
        return sum(
            self.block_bytes / table.block_tokens
            for table in self.tables
            if table.window is None and not table.states
        )

    @property
    def state_bytes_per_sequence(self) -> int:
        """Whatever the length: states of linear layers, and windows when they are full."""
        bounded = (t for t in self.tables if t.states or t.window is not None)
        blocks = (
            table.blocks((table.window or 0) + self.in_flight_tokens, self.in_flight_tokens)
            for table in bounded
        )
        return sum(blocks) * self.block_bytes


def kv_cache(
    shape: ModelShape,
    tensor: int,
    kv: Dtype = Dtype.BF16,
    *,
    in_flight_tokens: int = 0,
    block_tokens: int = BLOCK_TOKENS,
    states_per_sequence: int = STATES_PER_SEQUENCE,
    model: Dtype = Dtype.BF16,
) -> KvCache:
    """`tensor` GPUs share an attention rank. Heads are cut over them, and repeated when there are
    more GPUs than heads; latent and compressed caches are repeated on each.

    `model` is the dtype of activations, in which linear layers keep their convolution.
    """
    if shape.kv_bytes_per_token_layer is not None:
        scale = kv.bytes_per_element / Dtype.BF16.bytes_per_element
        token_bytes = shape.kv_bytes_per_token_layer * shape.layers * scale
        return KvCache((BlockTable(block_tokens),), round(token_bytes * block_tokens), 0)

    unbounded = [k for k in shape.attention if _unbounded(k)]
    windows = [k for k in shape.attention if isinstance(k, FullAttention) and not _unbounded(k)]
    linear = [k for k in shape.attention if isinstance(k, LinearAttention)]
    token_bytes_of = {kind: _token_bytes(kind, tensor, kv) for kind in unbounded + windows}
    if not windows and not linear:
        block = sum(kind.layers * token_bytes_of[kind] for kind in unbounded) * block_tokens
        return KvCache((BlockTable(block_tokens),), round(block), in_flight_tokens)

    widest = max(token_bytes_of.values(), default=0.0)
    state = max((_state_bytes(kind, tensor, model) for kind in linear), default=0.0)
    if state and widest:
        aligned = block_tokens
        if any(isinstance(kind, LatentAttention) for kind in unbounded):
            aligned = max(aligned, LATENT_HYBRID_BLOCK_TOKENS)
        # A block of a cache by token is made as large as a state.
        block_tokens = max(block_tokens, aligned * _ceil(state / (aligned * widest)))
    page = max(widest * block_tokens, state)

    buckets: list[tuple[int, BlockTable]] = []
    if unbounded:
        layers = sum(kind.layers for kind in unbounded)
        buckets.append((layers, BlockTable(block_tokens)))
    for kind in windows:
        # Narrower layers get longer blocks when they fit in, else they leave a rest unused.
        ratio = widest / token_bytes_of[kind]
        tokens = block_tokens * int(ratio) if ratio == int(ratio) else block_tokens
        buckets.append((kind.layers, BlockTable(tokens, window=kind.window)))
    if linear:
        layers = sum(kind.layers for kind in linear)
        buckets.append((layers, BlockTable(block_tokens, states=states_per_sequence)))

    counts = [layers for layers, _ in buckets]
    # vLLM's rule: by the rarest kind, or by the commonest when that wastes less than half.
    group = max(counts) if max(counts) < 1.5 * min(counts) else min(counts)
    tables = tuple(table for layers, table in buckets for _ in range(_ceil(layers / group)))
    return KvCache(tables, round(group * page), in_flight_tokens)


def _unbounded(kind: Attention) -> bool:
    if isinstance(kind, LinearAttention):
        return False
    return isinstance(kind, LatentAttention) or kind.window is None or kind.compression > 1


def _token_bytes(kind: Attention, tensor: int, kv: Dtype) -> float:
    """Of one token in one layer on one GPU."""
    index = kind.index_elements_per_token
    # Keys of an indexer are FP8 with an FP32 scale for every 128.
    index_bytes = index + index / 128 * 4
    if isinstance(kind, LatentAttention):
        if kv is Dtype.FP8 and kind.index_heads:
            rotary = kind.rope_head_dim * Dtype.BF16.bytes_per_element
            return kind.kv_lora_rank + SPARSE_FP8_EXTRA_BYTES + rotary + index_bytes
        return kind.kv_elements_per_token * kv.bytes_per_element + index_bytes
    assert isinstance(kind, FullAttention)
    share = max(1.0, kind.kv_heads / tensor) / kind.kv_heads
    return kind.kv_elements_per_token * share * kv.bytes_per_element + index_bytes


def _state_bytes(kind: LinearAttention, tensor: int, model: Dtype) -> float:
    recurrent = kind.recurrent_elements * kind.state_dtype.bytes_per_element
    return (recurrent + kind.conv_elements * model.bytes_per_element) / tensor


def _ceil(value: float) -> int:
    return int(-(-value // 1))
