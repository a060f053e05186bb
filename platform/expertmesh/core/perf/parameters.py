"""Counts of parameters, by the kinds that lie and are used differently."""

from dataclasses import dataclass

from expertmesh.core.domain.model_shape import (
    Attention,
    Dtype,
    Experts,
    FullAttention,
    LatentAttention,
    ModelShape,
)


@dataclass(frozen=True, slots=True)
class Parameters:
    """Elements of the weights, over all layers."""

    attention: int
    dense: int
    """MLPs of the layers without experts."""
    experts: int
    """Routed ones, each once."""
    shared: int
    """Shared experts, and the projections into and out of a latent width."""
    embeddings: int
    """Input and output table; a tied one counts once."""
    other: int
    """Routers, norms, and the towers for inputs that are no text. Not quantised."""
    active_experts: int
    """Share of `experts` that works for one token."""
    towers: int
    """Share of `other` that no token of text uses."""
    input_embeddings: int
    """Share of `embeddings` that is looked up and not multiplied; 0 when tied."""

    @property
    def total(self) -> int:
        """Without the layers of multi-token prediction."""
        return (
            self.attention + self.dense + self.experts + self.shared + self.embeddings + self.other
        )

    @property
    def active(self) -> int:
        """Used for one token of text, both embeddings included."""
        return self.total - self.experts + self.active_experts - self.towers


def parameters(shape: ModelShape) -> Parameters:
    attention = sum(kind.layers * attention_layer(shape.hidden, kind) for kind in shape.attention)
    dense = shape.dense_layers * 3 * shape.hidden * shape.dense_width
    routed = shared = routers = active = 0
    if shape.experts is not None:
        experts = shape.experts
        one = expert(shape.hidden, experts)
        routed = experts.layers * experts.count * one
        active = experts.layers * experts.per_token * one
        shared = experts.layers * _shared(shape.hidden, experts)
        routers = experts.layers * (shape.hidden * experts.count + experts.extras)
    table = shape.vocab * shape.hidden
    return Parameters(
        attention=attention,
        dense=dense,
        experts=routed,
        shared=shared,
        embeddings=table if shape.tied_embeddings else 2 * table,
        other=routers + shape.norms + shape.other_parameters,
        active_experts=active,
        towers=shape.other_parameters,
        input_embeddings=0 if shape.tied_embeddings else table,
    )


def attention_layer(hidden: int, kind: Attention) -> int:
    """Elements of one layer's attention, with its norms and biases."""
    if isinstance(kind, FullAttention):
        return _full_attention(hidden, kind) + kind.extras
    if isinstance(kind, LatentAttention):
        return _latent_attention(hidden, kind) + kind.extras
    inputs = 2 * kind.key_width + kind.value_width * (2 if kind.gated else 1)
    return hidden * (inputs + kind.value_width) + kind.extras


def _full_attention(hidden: int, kind: FullAttention) -> int:
    query_width = kind.heads * kind.head_dim
    output_width = kind.heads * kind.value_dim
    query = _factored(hidden, query_width, kind.q_lora_rank)
    key_value = hidden * kind.kv_heads * kind.head_dim
    if not kind.values_are_keys:
        key_value += hidden * kind.kv_heads * kind.value_dim
    if kind.o_lora_rank:
        output = kind.o_lora_rank * (output_width + kind.o_groups * hidden)
    else:
        output = output_width * hidden
    return query + key_value + output + (hidden * output_width if kind.gated else 0)


def _factored(inputs: int, outputs: int, rank: int) -> int:
    """Elements of a projection, in two parts when there is a rank."""
    return rank * (inputs + outputs) if rank else inputs * outputs


def _latent_attention(hidden: int, kind: LatentAttention) -> int:
    query_width = kind.heads * (kind.nope_head_dim + kind.rope_head_dim)
    output_width = kind.heads * kind.v_head_dim
    query = _factored(hidden, query_width, kind.q_lora_rank)
    latent = hidden * (kind.kv_lora_rank + kind.rope_head_dim)
    key_value = kind.kv_lora_rank * kind.heads * (kind.nope_head_dim + kind.v_head_dim)
    gate = hidden * output_width if kind.gated else 0
    return query + latent + key_value + output_width * hidden + gate


def expert(hidden: int, experts: Experts) -> int:
    """Elements of one routed expert of one layer."""
    return experts.projections * (experts.latent or hidden) * experts.width + experts.bias


def _shared(hidden: int, experts: Experts) -> int:
    return experts.projections * hidden * experts.shared_width + 2 * hidden * experts.latent


def prediction_parameters(shape: ModelShape) -> int:
    """Elements of the layers of multi-token prediction, which are like the model's last ones.

    Their embeddings are the model's own, though some checkpoints hold a copy.
    """
    layer = attention_layer(shape.hidden, shape.attention[-1]) + 2 * shape.hidden * shape.hidden
    if shape.experts is None:
        layer += 3 * shape.hidden * shape.dense_width
    else:
        routed = shape.experts.count * expert(shape.hidden, shape.experts)
        layer += routed + _shared(shape.hidden, shape.experts)
    return shape.prediction_layers * layer


def checkpoint_bytes(shape: ModelShape) -> float:
    """Of the weights as they are stored, without the layers of multi-token prediction."""
    count = parameters(shape)
    others = count.attention + count.dense + count.shared
    return (
        count.experts * _expert_bytes(shape)
        + others * _other_bytes(shape)
        + (count.embeddings + count.other) * _plain_bytes(shape)
    )


def prediction_bytes(shape: ModelShape) -> float:
    """Of the layers of multi-token prediction as they are stored, with a copy of the tables."""
    if not shape.prediction_layers:
        return 0.0
    each = _expert_bytes(shape) if shape.experts is not None else _other_bytes(shape)
    tables = 0 if shape.tied_embeddings else 2 * shape.vocab * shape.hidden
    return prediction_parameters(shape) * each + tables * _plain_bytes(shape)


def _expert_bytes(shape: ModelShape) -> float:
    stored = shape.quantisation
    return stored.experts.bytes_per_element + stored.expert_scale_bytes_per_element


def _other_bytes(shape: ModelShape) -> float:
    stored = shape.quantisation
    return stored.others.bytes_per_element + stored.other_scale_bytes_per_element


def _plain_bytes(shape: ModelShape) -> float:
    """Of what is never quantised."""
    return max(Dtype.BF16.bytes_per_element, shape.quantisation.others.bytes_per_element)
