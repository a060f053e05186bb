"""The shape of a model, as far as memory, time and placement depend on it.

Counts of parameters follow from it (`core.perf.parameters`); nothing here is a name of a model.
"""

from dataclasses import dataclass
from enum import StrEnum


class Dtype(StrEnum):
    """Of weights, of the KV cache, or of arithmetic."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP8 = "fp8"
    INT4 = "int4"
    FP4 = "fp4"
    """MXFP4 and NVFP4."""

    @property
    def bytes_per_element(self) -> float:
        """Without scales: see `Quantisation.scale_bytes_per_element`."""
        return {"fp32": 4.0, "bf16": 2.0, "fp8": 1.0, "int4": 0.5, "fp4": 0.5}[self.value]


@dataclass(frozen=True, slots=True)
class FullAttention:
    """Multi-head, grouped-query or multi-query attention."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    v_head_dim: int | None = None
    """None: as head_dim."""
    window: int | None = None
    """Sliding window in tokens; None for the whole context."""
    gated: bool = False
    """The output has a gate of its own, as wide as the heads."""
    q_lora_rank: int = 0
    """Of a factored query projection; 0 for a plain one."""
    o_lora_rank: int = 0
    """Of a factored output projection, per group of heads; 0 for a plain one."""
    o_groups: int = 1
    values_are_keys: bool = False
    """One projection and one cached vector serve as key and as value."""
    compression: int = 1
    """The cache keeps one entry for this many tokens, apart from a few recent ones."""
    index_heads: int = 0
    index_head_dim: int = 0
    """Of the indexer of sparse attention; its keys are cached as well."""
    extras: int = 0
    """Elements of biases, norms, sinks, indexers and compressors of one layer."""

    @property
    def value_dim(self) -> int:
        return self.head_dim if self.v_head_dim is None else self.v_head_dim

    @property
    def kv_elements_per_token(self) -> float:
        """Of one layer, without the indexer's keys, and as if there were no window."""
        values = 0 if self.values_are_keys else self.value_dim
        return self.kv_heads * (self.head_dim + values) / self.compression

    @property
    def index_elements_per_token(self) -> float:
        return self.index_head_dim / self.compression


@dataclass(frozen=True, slots=True)
class LatentAttention:
    """Multi-head latent attention (MLA): the cache holds a latent vector and a rotary key."""

    layers: int
    heads: int
    q_lora_rank: int
    """0 for a plain query projection."""
    kv_lora_rank: int
    nope_head_dim: int
    rope_head_dim: int
    v_head_dim: int
    index_heads: int = 0
    index_head_dim: int = 0
    """Of the indexer of sparse attention (DSA); its keys are cached as well."""
    gated: bool = False
    """The output has a gate of its own, as wide as the heads' values."""
    extras: int = 0
    """Elements of biases and norms of one layer, and of its indexer."""

    @property
    def kv_elements_per_token(self) -> float:
        """Of one layer, without the indexer's keys."""
        return self.kv_lora_rank + self.rope_head_dim

    @property
    def index_elements_per_token(self) -> float:
        return self.index_head_dim


@dataclass(frozen=True, slots=True)
class LinearAttention:
    """Gated delta nets and their kin: a state per sequence instead of a cache per token."""

    layers: int
    key_heads: int
    value_heads: int
    key_head_dim: int
    value_head_dim: int
    conv_kernel: int = 4
    gated: bool = True
    """The output has a gate of its own, as wide as the values."""
    state_dtype: Dtype = Dtype.FP32
    """Of the recurrent state; the convolution's is in the model's dtype."""
    extras: int = 0
    """Elements of the convolution, biases, norms and small projections of one layer."""

    @property
    def key_width(self) -> int:
        return self.key_heads * self.key_head_dim

    @property
    def value_width(self) -> int:
        return self.value_heads * self.value_head_dim

    @property
    def kv_elements_per_token(self) -> float:
        return 0.0

    @property
    def index_elements_per_token(self) -> float:
        return 0.0

    @property
    def recurrent_elements(self) -> int:
        """State of one sequence in one layer: a matrix for each value head."""
        return self.value_heads * self.key_head_dim * self.value_head_dim

    @property
    def conv_elements(self) -> int:
        """Last inputs of the convolution, of one sequence in one layer."""
        return (self.conv_kernel - 1) * (2 * self.key_width + self.value_width)

    @property
    def state_bytes_per_sequence(self) -> float:
        """Of one layer, with the convolution in BF16."""
        recurrent = self.recurrent_elements * self.state_dtype.bytes_per_element
        return recurrent + self.conv_elements * Dtype.BF16.bytes_per_element


Attention = FullAttention | LatentAttention | LinearAttention


@dataclass(frozen=True, slots=True)
class Experts:
    layers: int
    """That have experts; the others are dense."""
    count: int
    """Routed experts a layer."""
    per_token: int
    width: int
    """Inner width of one expert."""
    shared_width: int = 0
    """Of all shared experts together; 0 for none."""
    latent: int = 0
    """Width in which experts work when it is not the hidden size; 0 for the hidden size."""
    groups: int = 1
    """Routing picks `groups_per_token` groups of experts first."""
    groups_per_token: int = 1
    projections: int = 3
    """Matrices of one expert: gate, up and down."""
    bias: int = 0
    """Elements of the biases of one expert."""
    extras: int = 0
    """Elements of the router's biases and of gates and norms of one layer."""
    hash_layers: int = 0
    """Layers that route by a table of tokens: their load does not depend on the text."""
    balanceable: bool = True
    """vLLM can move and copy its experts (EPLB)."""


@dataclass(frozen=True, slots=True)
class Quantisation:
    """Of the checkpoint on offer."""

    experts: Dtype = Dtype.BF16
    others: Dtype = Dtype.BF16
    """Attention, dense and shared layers; embeddings and norms stay in BF16."""
    expert_scale_bytes_per_element: float = 0.0
    other_scale_bytes_per_element: float = 0.0


@dataclass(frozen=True, slots=True)
class ModelShape:
    architecture: str
    """As in config.json, e.g. `Qwen3MoeForCausalLM`."""
    layers: int
    hidden: int
    vocab: int
    max_position_embeddings: int
    attention: tuple[Attention, ...]
    """Kinds of attention, whose layers add up to `layers`."""
    experts: Experts | None
    """None for a dense model."""
    dense_width: int
    """Inner width of the MLP of layers without experts; 0 when there are none."""
    tied_embeddings: bool = False
    quantisation: Quantisation = Quantisation()
    norms: int = 0
    """Elements of norms and residual paths outside attention and experts, over all layers."""
    prediction_layers: int = 0
    """Of multi-token prediction; in the checkpoint, and loaded only for speculative decoding."""
    other_parameters: int = 0
    """Of vision and audio towers, which work on inputs that are no text."""
    kv_bytes_per_token_layer: float | None = None
    """Mean over the layers, in BF16, where the cache is compressed; None to compute it."""

    @property
    def dense_layers(self) -> int:
        return self.layers - (self.experts.layers if self.experts is not None else 0)

    @property
    def kv_elements_per_token(self) -> float:
        """Over all layers; as if there were no windows, and without the indexers' keys."""
        return sum(kind.layers * kind.kv_elements_per_token for kind in self.attention)

    @property
    def index_elements_per_token(self) -> float:
        """Keys of the indexers of sparse attention, over all layers."""
        return sum(kind.layers * kind.index_elements_per_token for kind in self.attention)

    @property
    def state_bytes_per_sequence(self) -> float:
        """Of the linear layers, which keep a state per sequence and nothing per token."""
        return sum(
            kind.layers * kind.state_bytes_per_sequence
            for kind in self.attention
            if isinstance(kind, LinearAttention)
        )
