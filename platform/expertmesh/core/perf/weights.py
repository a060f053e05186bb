"""Bytes of weights on one GPU of a group, as vLLM cuts them.

Attention, dense MLPs, shared experts and embeddings are cut over the GPUs of one attention rank
and repeated on each rank; experts lie whole on the GPUs of the group, or are cut over all of them.
"""

from dataclasses import dataclass

from expertmesh.core.domain.model_shape import (
    Attention,
    Dtype,
    Experts,
    FullAttention,
    LatentAttention,
    ModelShape,
)
from expertmesh.core.perf.layout import Layout
from expertmesh.core.perf.parameters import attention_layer, expert, parameters

VOCABULARY_PADDING = 64
"""vLLM rounds the vocabulary up to it (`DEFAULT_VOCAB_PADDING_SIZE`)."""
FP4_WIDTH_PADDING = 128
FP4_HIDDEN_PADDING = 256
"""Tiles of vLLM's Marlin and TensorRT-LLM kernels for FP4 experts; its Triton kernels need less."""


@dataclass(frozen=True, slots=True)
class Weights:
    """Bytes on one GPU, with the scales of quantised weights."""

    attention: int
    dense: int
    experts: int
    """Routed ones, redundant copies included."""
    shared: int
    embeddings: int
    other: int
    """Routers, norms and towers."""

    @property
    def total(self) -> int:
        return (
            self.attention + self.dense + self.experts + self.shared + self.embeddings + self.other
        )


def weights(shape: ModelShape, layout: Layout) -> Weights:
    """Without the layers of multi-token prediction, which vLLM loads only to speculate.

    Off by what a checkpoint adds in small things: V3 over 16 GPUs takes 40.32 GiB by vLLM's log
    (vllm#16692) and 0.1 % less here."""
    tensor = layout.tensor
    quantisation = shape.quantisation
    of_other = quantisation.others.bytes_per_element + quantisation.other_scale_bytes_per_element
    plain = max(Dtype.BF16.bytes_per_element, quantisation.others.bytes_per_element)
    counts = parameters(shape)
    attention = sum(
        kind.layers
        * (
            _attention_elements(shape.hidden, kind, tensor) * of_other
            + _widened_copies(kind, tensor, quantisation.others)
        )
        for kind in shape.attention
    )
    tables = 1 if shape.tied_embeddings else 2
    return Weights(
        attention=round(attention),
        dense=round(counts.dense / tensor * of_other),
        experts=round(_expert_bytes(shape, layout)),
        shared=round(_shared_elements(shape, layout) * of_other),
        embeddings=round(tables * padded_vocabulary(shape.vocab) * shape.hidden / tensor * plain),
        other=round((counts.other - counts.towers + counts.towers / tensor) * plain),
    )


def padded_vocabulary(vocabulary: int) -> int:
    return -(-vocabulary // VOCABULARY_PADDING) * VOCABULARY_PADDING


def expert_slot_bytes(shape: ModelShape) -> int:
    """What one more expert on each GPU costs there, over all layers."""
    if shape.experts is None:
        return 0
    return round(_one_expert_bytes(shape, shape.experts, cut=1) * shape.experts.layers)


def _attention_elements(hidden: int, kind: Attention, tensor: int) -> float:
    whole = attention_layer(hidden, kind)
    if isinstance(kind, FullAttention):
        kept = kind.extras + (hidden * kind.q_lora_rank)
        # Fewer key heads than GPUs: each GPU holds one, which others hold as well.
        key_width = kind.head_dim + (0 if kind.values_are_keys else kind.value_dim)
        keys = hidden * kind.kv_heads * key_width
        local_keys = hidden * max(1.0, kind.kv_heads / tensor) * key_width
        return kept + local_keys + (whole - kept - keys) / tensor
    if isinstance(kind, LatentAttention):
        latent = hidden * (kind.q_lora_rank + kind.kv_lora_rank + kind.rope_head_dim)
        kept = latent + kind.extras
        return kept + (whole - kept) / tensor
    return whole / tensor


def _widened_copies(kind: Attention, tensor: int, stored: Dtype) -> float:
    """Bytes of the copies in BF16 that vLLM keeps of quantised key and value up-projections."""
    if not isinstance(kind, LatentAttention) or stored in (Dtype.BF16, Dtype.FP32):
        return 0.0
    elements = kind.kv_lora_rank * kind.heads * (kind.nope_head_dim + kind.v_head_dim)
    return elements / tensor * Dtype.BF16.bytes_per_element


def _expert_bytes(shape: ModelShape, layout: Layout) -> float:
    if shape.experts is None:
        return 0.0
    cut = 1 if layout.expert_parallel else layout.world_size
    slots = layout.expert_slots(shape.experts.count)
    return slots * _one_expert_bytes(shape, shape.experts, cut) * shape.experts.layers


def _one_expert_bytes(shape: ModelShape, experts: Experts, cut: int) -> float:
    quantisation = shape.quantisation
    elements = expert(shape.hidden, experts) / cut
    if quantisation.experts is Dtype.FP4:
        hidden = experts.latent or shape.hidden
        width = experts.width / cut
        elements *= _rounded_up(width, FP4_WIDTH_PADDING) / width
        elements *= _rounded_up(hidden, FP4_HIDDEN_PADDING) / hidden
    of_one = quantisation.experts.bytes_per_element + quantisation.expert_scale_bytes_per_element
    return elements * of_one


def _shared_elements(shape: ModelShape, layout: Layout) -> float:
    experts = shape.experts
    if experts is None:
        return 0.0
    into_latent = 2 * shape.hidden * experts.latent
    inner = experts.projections * shape.hidden * experts.shared_width
    # With both kinds of parallelism, vLLM gives each GPU its own tokens here (sequence parallel).
    whole = layout.expert_parallel and layout.tensor > 1 and layout.data > 1
    return experts.layers * (into_latent + (inner if whole else inner / layout.tensor))


def _rounded_up(value: float, multiple: int) -> float:
    return -(-value // multiple) * multiple
