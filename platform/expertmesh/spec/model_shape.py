"""A model's config.json becomes its shape."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from expertmesh.core.domain.model_shape import Experts, FullAttention, ModelShape
from expertmesh.errors import ManifestError
from expertmesh.spec.attention import (
    AttentionOf,
    block_sparse,
    chunked,
    compressed,
    gated_delta,
    grouped_query,
    kimi_delta,
    latent,
    two_geometries,
)
from expertmesh.spec.config_reader import ConfigReader
from expertmesh.spec.quantisation import read_quantisation
from expertmesh.spec.vision import tower_parameters

# The same number under the names that the model families use.
_EXPERT_KEYS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")
_TOP_K_KEYS = (
    "num_experts_per_tok", "num_experts_per_token", "experts_per_token", "top_k_experts",
    "moe_top_k", "moe_k",
)  # fmt: skip
_TEXT_KEYS = ("text_config", "llm_config", "language_config")

_MOST_LAYERS = 10_000

READ_AS = "read_as"
"""Override that names a known architecture whose keys and layers the config shares."""


@dataclass(frozen=True, slots=True)
class _Family:
    """What the config of an architecture does not say by itself."""

    attention: AttentionOf
    width_is_experts: bool = False
    """`intermediate_size` is the width of an expert, not of a dense layer."""
    dense_key: str = "intermediate_size"
    balanceable: bool = True
    router_bias: bool = False
    """Each expert has a learned bias in the router."""
    biased_experts: bool = False
    shared_gate: bool = False
    """The shared expert has a gate of its own."""


_FAMILIES: dict[str, _Family] = {
    "LlamaForCausalLM": _Family(grouped_query()),
    "MistralForCausalLM": _Family(grouped_query()),
    "Qwen2ForCausalLM": _Family(grouped_query(qkv_bias=True)),
    "Qwen2MoeForCausalLM": _Family(grouped_query(qkv_bias=True), shared_gate=True),
    "Qwen3ForCausalLM": _Family(grouped_query(qk_norm="head")),
    "Qwen3VLForConditionalGeneration": _Family(grouped_query(qk_norm="head")),
    "Qwen3MoeForCausalLM": _Family(grouped_query(qk_norm="head")),
    "Qwen3VLMoeForConditionalGeneration": _Family(grouped_query(qk_norm="head")),
    "Qwen3OmniMoeForConditionalGeneration": _Family(grouped_query(qk_norm="head")),
    "Qwen3NextForCausalLM": _Family(gated_delta, shared_gate=True),
    "Qwen3_5ForCausalLM": _Family(gated_delta),
    "Qwen3_5ForConditionalGeneration": _Family(gated_delta),
    "Qwen3_5MoeForCausalLM": _Family(gated_delta, shared_gate=True),
    "Qwen3_5MoeForConditionalGeneration": _Family(gated_delta, shared_gate=True),
    "DeepseekV2ForCausalLM": _Family(latent),
    "DeepseekV3ForCausalLM": _Family(latent, router_bias=True),
    "DeepseekV32ForCausalLM": _Family(latent, router_bias=True),
    "DeepseekV4ForCausalLM": _Family(compressed, router_bias=True),
    "KimiK25ForConditionalGeneration": _Family(latent, router_bias=True),
    "KimiLinearForCausalLM": _Family(kimi_delta, router_bias=True),
    "KimiK3ForConditionalGeneration": _Family(kimi_delta, router_bias=True),
    "Glm4MoeForCausalLM": _Family(grouped_query(), router_bias=True),
    "Glm4MoeLiteForCausalLM": _Family(latent, router_bias=True),
    "GlmMoeDsaForCausalLM": _Family(latent, router_bias=True),
    "GptOssForCausalLM": _Family(
        grouped_query(o_bias=True, sinks=True),
        width_is_experts=True,
        balanceable=False,
        router_bias=True,
        biased_experts=True,
    ),
    "MiniMaxM2ForCausalLM": _Family(
        grouped_query(qk_norm="layer"), width_is_experts=True, balanceable=False, router_bias=True
    ),
    "MiniMaxM3ForCausalLM": _Family(
        block_sparse,
        width_is_experts=True,
        dense_key="dense_intermediate_size",
        balanceable=False,
        router_bias=True,
    ),
    "Llama4ForCausalLM": _Family(chunked, width_is_experts=True, dense_key="intermediate_size_mlp"),
    "MixtralForCausalLM": _Family(grouped_query(), width_is_experts=True),
    "MiMoV2FlashForCausalLM": _Family(two_geometries, router_bias=True),
}
_FAMILIES |= {
    "Llama4ForConditionalGeneration": _FAMILIES["Llama4ForCausalLM"],
    "MiniMaxM3SparseForCausalLM": _FAMILIES["MiniMaxM3ForCausalLM"],
    "MiniMaxM3SparseForConditionalGeneration": _FAMILIES["MiniMaxM3ForCausalLM"],
}


def read_shape(config: Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> ModelShape:
    """`overrides`: keys of the text config to take instead, and `read_as`.

    Raises ManifestError, which says what is missing, for a config that cannot be read.
    """
    changes = dict(overrides or {})
    architecture = _architecture(config)
    read_as = str(changes.pop(READ_AS, architecture))
    family = _FAMILIES.get(read_as)
    if family is None:
        raise ManifestError(
            f"config.json: architectures: {read_as!r} is not known to the planner; give the "
            f"override {READ_AS}: <known architecture> when its layers are alike, and overrides "
            f"for keys that differ; known are {', '.join(sorted(_FAMILIES))}"
        )
    text = {**_text_config(config), **changes}
    reader = ConfigReader(architecture, text)
    layers = reader.positive("num_hidden_layers")
    if layers > _MOST_LAYERS:
        raise reader.refuse(f"num_hidden_layers: {layers} is above {_MOST_LAYERS}")
    hidden = reader.positive("hidden_size")
    experts = _experts(reader, family, layers)
    dense_layers = layers - (experts.layers if experts else 0)
    attention = family.attention(reader, layers)
    tied = text.get("tie_word_embeddings", config.get("tie_word_embeddings", False))
    return ModelShape(
        architecture=architecture,
        layers=layers,
        hidden=hidden,
        vocab=reader.positive("vocab_size"),
        max_position_embeddings=reader.count("max_position_embeddings", default=0),
        attention=attention,
        experts=experts,
        dense_width=reader.positive(family.dense_key, "intermediate_size") if dense_layers else 0,
        tied_embeddings=bool(tied),
        quantisation=read_quantisation(config, text),
        norms=_norms(reader, layers, hidden),
        prediction_layers=reader.count(
            "num_nextn_predict_layers", "mtp_num_hidden_layers", default=0
        ),
        other_parameters=reader.count("other_parameters", default=tower_parameters(config)),
        kv_bytes_per_token_layer=_compressed_cache_bytes(attention, layers),
    )


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    if isinstance(names, list) and names:
        return str(names[0])
    raise ManifestError(
        "config.json: architectures is missing; add the name of the model's class, "
        f"or give the override {READ_AS}"
    )


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Models for images and sound keep the text part, which is what works for tokens, apart."""
    thinker = config.get("thinker_config")
    if isinstance(thinker, Mapping):
        return _text_config(thinker)
    for key in _TEXT_KEYS:
        inner = config.get(key)
        # Some converted configs hold an empty one beside the real keys.
        if isinstance(inner, Mapping) and "num_hidden_layers" in inner:
            return inner
    return config


def _experts(config: ConfigReader, family: _Family, layers: int) -> Experts | None:
    count = config.count(*_EXPERT_KEYS, default=0)
    if not count:
        return None
    hidden = config.positive("hidden_size")
    per_token = config.positive(*_TOP_K_KEYS)
    if per_token > count:
        raise config.refuse(f"{per_token} experts per token of {count}; a token uses at most all")
    if family.width_is_experts:
        width = config.positive("intermediate_size")
    else:
        width = config.positive("moe_intermediate_size")
    shared = _shared_width(config, width)
    latent_width = config.count("routed_expert_hidden_size", default=0)
    extras = count if family.router_bias else 0
    if family.shared_gate and shared:
        extras += hidden
    if config.flag("latent_moe_use_norm"):
        extras += latent_width
    return Experts(
        layers=_expert_layers(config, layers),
        count=count,
        per_token=per_token,
        width=width,
        shared_width=shared,
        latent=latent_width,
        groups=config.count("n_group", "num_expert_group", default=1),
        groups_per_token=config.count("topk_group", default=1),
        balanceable=family.balanceable,
        bias=2 * width + hidden if family.biased_experts else 0,
        extras=extras,
        hash_layers=config.count("num_hash_layers", default=0),
    )


def _shared_width(config: ConfigReader, width: int) -> int:
    explicit = config.count(
        "shared_expert_intermediate_size", "shared_intermediate_size", default=0
    )
    if explicit:
        return explicit
    count = config.count("n_shared_experts", "num_shared_experts", default=0)
    # Llama 4 has one, which its config does not name.
    if "interleave_moe_layer_step" in config.text:
        count = 1
    return count * width


def _expert_layers(config: ConfigReader, layers: int) -> int:
    """Layers with experts, from whichever key of the families says it."""
    kinds = config.per_layer("mlp_layer_types", layers)
    if kinds is not None:
        return sum(1 for kind in kinds if kind == "sparse")
    flags = config.per_layer("moe_layer_freq", layers)
    if flags is not None:
        return sum(1 for flag in flags if flag)
    listed = config.numbers("moe_layers")
    if listed:
        return sum(1 for layer in set(listed) if 0 <= layer < layers)
    step = config.count("interleave_moe_layer_step", "decoder_sparse_step", default=1)
    dense = set(config.numbers("mlp_only_layers"))
    first = config.count("first_k_dense_replace", default=0)
    if isinstance(config.text.get("moe_layer_freq"), int):
        step = config.positive("moe_layer_freq")
        return sum(1 for layer in range(first, layers) if layer % step == 0)
    return sum(
        1
        for layer in range(first, layers)
        if layer not in dense and step and (layer + 1) % step == 0
    )


def _norms(config: ConfigReader, layers: int, hidden: int) -> int:
    """Of the layers, the last one, and the residual paths that some models have."""
    count = (2 * layers + 1) * hidden
    streams = config.count("hc_mult", default=0)
    if streams:
        # Hyper-connections: two a layer mix the streams, and one joins them at the end.
        mixing = (2 + streams) * streams
        count += 2 * layers * (mixing * (streams * hidden + 1) + 3)
        count += streams * (streams * hidden + 1) + 1
    if config.count("attn_res_block_size", default=0):
        count += (2 * layers + 1) * 2 * hidden
    return count


def _compressed_cache_bytes(attention: tuple[object, ...], layers: int) -> float | None:
    """Per token, as a mean over the layers; None when no layer compresses its cache."""
    full = [kind for kind in attention if isinstance(kind, FullAttention)]
    if all(kind.compression == 1 for kind in full):
        return None
    elements = sum(
        kind.layers * (kind.kv_elements_per_token + kind.index_elements_per_token)
        for kind in full
        if kind.window is None
    )
    return 2 * elements / layers
