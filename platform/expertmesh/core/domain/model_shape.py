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
    o_lora_width: int = 0
    """Rank times groups of a factored output projection; 0 for a plain one."""


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


@dataclass(frozen=True, slots=True)
class LinearAttention:
    """Gated delta nets and their kin: a state per sequence instead of a cache per token."""

    layers: int
    key_heads: int
    value_heads: int
    key_head_dim: int
    value_head_dim: int
    conv_kernel: int = 4


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
    other_parameters: int = 0
    """Counted from the checkpoint or published: vision and audio towers, multi-token prediction."""
    kv_bytes_per_token_layer: float | None = None
    """Where the cache is no product of heads and widths (compressed caches); None to compute it."""

    @property
    def dense_layers(self) -> int:
        return self.layers - (self.experts.layers if self.experts is not None else 0)
