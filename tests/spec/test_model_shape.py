"""Configs of the model families, and the traps in them."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.core.domain.model_shape import (
    Dtype,
    Experts,
    FullAttention,
    LatentAttention,
    LinearAttention,
    ModelShape,
)
from expertmesh.errors import ManifestError
from expertmesh.spec.catalog import models
from expertmesh.spec.model_shape import read_shape

BASE = {
    "num_hidden_layers": 8,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 256,
    "vocab_size": 128,
    "max_position_embeddings": 1024,
}
MOE = {**BASE, "num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 32}
MLA = {
    **BASE,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}


def shape_of(architecture: str, config: dict[str, Any], **changes: Any) -> ModelShape:
    return read_shape({"architectures": [architecture], **config, **changes})


def experts_of(architecture: str, config: dict[str, Any], **changes: Any) -> Experts:
    experts = shape_of(architecture, config, **changes).experts
    assert experts is not None
    return experts


@pytest.mark.parametrize(
    "key", ["num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"]
)
@pytest.mark.parametrize(
    "top_k",
    ["num_experts_per_tok", "num_experts_per_token", "experts_per_token", "top_k_experts",
     "moe_top_k", "moe_k"],
)  # fmt: skip
def test_names_of_the_count_and_of_top_k(key: str, top_k: str) -> None:
    config = {**BASE, key: 16, top_k: 4, "moe_intermediate_size": 32}
    experts = experts_of("Qwen3MoeForCausalLM", config)
    assert (experts.count, experts.per_token, experts.width) == (16, 4, 32)


def test_one_key_means_an_expert_in_some_families_and_a_dense_layer_in_others() -> None:
    config = {**BASE, "num_local_experts": 8, "num_experts_per_tok": 2}
    assert experts_of("MixtralForCausalLM", config).width == 256
    assert shape_of("MixtralForCausalLM", config).dense_width == 0
    qwen = shape_of("Qwen3MoeForCausalLM", MOE, mlp_only_layers=[0])
    assert qwen.experts is not None
    assert (qwen.experts.width, qwen.dense_width, qwen.dense_layers) == (32, 256, 1)


@pytest.mark.parametrize(
    ("changes", "width"),
    [
        ({}, 0),
        ({"n_shared_experts": 2}, 64),
        ({"num_shared_experts": 2}, 64),
        ({"n_shared_experts": None}, 0),
        ({"shared_expert_intermediate_size": 48}, 48),
        ({"shared_intermediate_size": 48, "n_shared_experts": 1}, 48),
        ({"shared_expert_intermediate_size": 0, "n_shared_experts": 1}, 32),
    ],
)
def test_width_of_the_shared_experts(changes: dict[str, Any], width: int) -> None:
    assert experts_of("Qwen3MoeForCausalLM", MOE, **changes).shared_width == width


@pytest.mark.parametrize(
    ("changes", "layers"),
    [
        ({}, 8),
        ({"first_k_dense_replace": 3}, 5),
        ({"first_k_dense_replace": 1, "moe_layer_freq": 1}, 7),
        ({"first_k_dense_replace": 1, "moe_layer_freq": 2}, 3),
        ({"moe_layer_freq": [0, 0, 0, 1, 1, 1, 1, 1]}, 5),
        ({"mlp_layer_types": ["dense"] * 3 + ["sparse"] * 5}, 5),
        ({"decoder_sparse_step": 2}, 4),
        ({"mlp_only_layers": [0, 7]}, 6),
        ({"moe_layers": [1, 3, 5, 7]}, 4),
    ],
)
def test_layers_that_have_experts(changes: dict[str, Any], layers: int) -> None:
    shape = shape_of("Qwen3MoeForCausalLM", MOE, **changes)
    assert shape.experts is not None and shape.experts.layers == layers
    assert shape.dense_layers == 8 - layers


def test_llama_4_has_a_shared_expert_that_its_config_does_not_name() -> None:
    config = {
        **BASE,
        "num_local_experts": 8,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 2,
        "intermediate_size_mlp": 512,
        "attention_chunk_size": 64,
    }
    shape = shape_of("Llama4ForConditionalGeneration", {"text_config": config})
    assert shape.experts is not None
    assert (shape.experts.layers, shape.experts.width, shape.experts.shared_width) == (4, 256, 256)
    assert shape.dense_width == 512
    windows = {k.window: k.layers for k in shape.attention if isinstance(k, FullAttention)}
    assert windows == {None: 2, 64: 6}


@pytest.mark.parametrize(
    "nest",
    [
        lambda text: {"text_config": text},
        lambda text: {"llm_config": text},
        lambda text: {"thinker_config": {"text_config": text}},
        lambda text: {"text_config": {}, **text},
    ],
)
def test_the_text_part_may_lie_deeper(nest: Any) -> None:
    plain = shape_of("Qwen3OmniMoeForConditionalGeneration", MOE)
    assert shape_of("Qwen3OmniMoeForConditionalGeneration", nest(MOE)) == plain


def test_a_tower_for_images_is_counted_apart() -> None:
    vision = {"depth": 2, "hidden_size": 8, "intermediate_size": 16, "patch_size": 2}
    plain = shape_of("Qwen3VLMoeForConditionalGeneration", {"text_config": MOE})
    seeing = shape_of(
        "Qwen3VLMoeForConditionalGeneration", {"text_config": MOE, "vision_config": vision}
    )
    blocks = 2 * (4 * 8 * 8 + 2 * 8 * 16)
    assert seeing.other_parameters == blocks + 2 * 2 * 3 * 8 + 32 * (32 + 8)
    assert plain.other_parameters == 0


def test_sliding_windows() -> None:
    kinds = ["sliding_attention", "full_attention"] * 4
    config = {**MOE, "sliding_window": 128}

    def windows(**changes: Any) -> dict[int | None, int]:
        attention = shape_of("GptOssForCausalLM", config, **changes).attention
        return {k.window: k.layers for k in attention if isinstance(k, FullAttention)}

    assert windows(layer_types=kinds) == {None: 4, 128: 4}
    assert windows() == {128: 8}
    assert windows(use_sliding_window=False) == {None: 8}
    assert windows(sliding_window=None) == {None: 8}
    # Lists may go on with the layers of multi-token prediction.
    assert windows(layer_types=[*kinds, "full_attention"]) == {None: 4, 128: 4}


def test_hybrid_layers_by_interval_or_by_list() -> None:
    config = {
        **MOE,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    }
    by_interval = shape_of("Qwen3NextForCausalLM", config, full_attention_interval=4)
    kinds = (["linear_attention"] * 3 + ["full_attention"]) * 2
    by_list = shape_of("Qwen3NextForCausalLM", config, layer_types=kinds)
    assert by_interval == by_list
    full, linear = by_list.attention
    assert isinstance(full, FullAttention) and isinstance(linear, LinearAttention)
    assert (full.layers, full.gated, linear.layers) == (2, True, 6)
    assert linear.state_dtype is Dtype.BF16
    precise = shape_of(
        "Qwen3_5MoeForCausalLM", config, full_attention_interval=4, mamba_ssm_dtype="float32"
    )
    assert precise.state_bytes_per_sequence == 6 * (4 * 16 * 16 * 4 + 3 * 128 * 2)


def test_kimi_linear_layers_are_numbered_from_one() -> None:
    linear = {"kda_layers": [1, 2, 3, 5, 6, 7], "num_heads": 4, "head_dim": 16}
    shape = shape_of("KimiLinearForCausalLM", {**MLA, **MOE}, linear_attn_config=linear)
    latent, delta = shape.attention
    assert isinstance(latent, LatentAttention) and isinstance(delta, LinearAttention)
    assert (latent.layers, delta.layers, delta.gated) == (2, 6, False)
    full_rank = {**linear, "use_full_rank_gate": True}
    k3 = shape_of("KimiK3ForConditionalGeneration", {**MLA, **MOE}, linear_attn_config=full_rank)
    gated = k3.attention[1]
    assert isinstance(gated, LinearAttention) and gated.gated
    assert delta.extras - gated.extras == 16 * (64 + 64)


def test_latent_attention_with_shared_indexers() -> None:
    config = {**MLA, **MOE, "index_n_heads": 4, "index_head_dim": 8}
    plain = shape_of("DeepseekV3ForCausalLM", {**MLA, **MOE})
    indexed = shape_of("DeepseekV32ForCausalLM", config)
    shared = shape_of("GlmMoeDsaForCausalLM", config, indexer_types=["full"] * 2 + ["shared"] * 6)
    assert plain.index_elements_per_token == 0
    assert indexed.index_elements_per_token == 8 * 8
    assert shared.index_elements_per_token == 2 * 8
    assert plain.kv_elements_per_token == shared.kv_elements_per_token == 8 * 40


def test_compressed_caches_and_hash_routed_layers() -> None:
    config = {
        **MOE,
        "num_key_value_heads": 1,
        "q_lora_rank": 24,
        "o_lora_rank": 8,
        "o_groups": 2,
        "index_n_heads": 4,
        "index_head_dim": 8,
        "sliding_window": 32,
        "num_hash_layers": 3,
        # The last one is of the layer of multi-token prediction.
        "compress_ratios": [0, 128, 4, 128, 4, 128, 4, 128, 0],
    }
    shape = shape_of("DeepseekV4ForCausalLM", config)
    layers = {
        (kind.compression, kind.window, kind.index_heads): kind.layers
        for kind in shape.attention
        if isinstance(kind, FullAttention)
    }
    assert layers == {(1, 32, 0): 1, (4, None, 4): 3, (128, None, 0): 4}
    elements = 3 * (16 + 8) / 4 + 4 * 16 / 128
    assert shape.kv_bytes_per_token_layer == 2 * elements / 8
    assert shape.experts is not None and shape.experts.hash_layers == 3


def test_layers_with_a_window_may_have_heads_of_their_own() -> None:
    shape = shape_of(
        "MiMoV2FlashForCausalLM",
        MOE,
        v_head_dim=8,
        sliding_window=32,
        swa_num_key_value_heads=4,
        hybrid_layer_pattern=[0, 1, 1, 1, 0, 1, 1, 1],
    )
    full, short = shape.attention
    assert isinstance(full, FullAttention) and isinstance(short, FullAttention)
    assert (full.layers, full.kv_heads, full.window) == (2, 2, None)
    assert (short.layers, short.kv_heads, short.window) == (6, 4, 32)
    assert full.kv_elements_per_token == 2 * (16 + 8)


def test_missing_head_counts_have_the_usual_meaning() -> None:
    config = {k: v for k, v in MOE.items() if k not in ("num_key_value_heads", "head_dim")}
    (attention,) = shape_of("Qwen3MoeForCausalLM", config).attention
    assert isinstance(attention, FullAttention)
    assert (attention.kv_heads, attention.head_dim) == (4, 16)


@pytest.mark.parametrize("place", ["outside", "inside"])
def test_tied_embeddings(place: str) -> None:
    outside: dict[str, Any] = {"text_config": dict(MOE)}
    (outside if place == "outside" else outside["text_config"])["tie_word_embeddings"] = True
    assert shape_of("Qwen3VLMoeForConditionalGeneration", outside).tied_embeddings
    assert not shape_of("Qwen3MoeForCausalLM", MOE).tied_embeddings


def test_an_unknown_architecture_is_refused_or_read_as_another() -> None:
    config = {"architectures": ["NewMoeForCausalLM"], **MOE}
    with pytest.raises(ManifestError) as caught:
        read_shape(config)
    message = str(caught.value)
    assert "'NewMoeForCausalLM' is not known" in message
    assert "read_as" in message and "Qwen3MoeForCausalLM" in message
    shape = read_shape(config, {"read_as": "Qwen3MoeForCausalLM", "num_experts": 32})
    assert shape.architecture == "NewMoeForCausalLM"
    assert shape.experts is not None and shape.experts.count == 32


def test_overrides_reach_the_text_part() -> None:
    config = {"architectures": ["Qwen3VLMoeForConditionalGeneration"], "text_config": MOE}
    assert read_shape(config, {"num_hidden_layers": 2}).layers == 2


@pytest.mark.parametrize(
    ("architecture", "config", "words"),
    [
        ("Qwen3MoeForCausalLM", {"hidden_size": None}, ("hidden_size", "missing", "override")),
        ("Qwen3MoeForCausalLM", {"vocab_size": "many"}, ("vocab_size", "'many'", "whole number")),
        ("Qwen3MoeForCausalLM", {"num_hidden_layers": 0}, ("num_hidden_layers", "above 0")),
        ("Qwen3MoeForCausalLM", {"num_hidden_layers": -1}, ("num_hidden_layers", "-1")),
        ("Qwen3MoeForCausalLM", {"num_experts_per_tok": None}, ("moe_top_k", "missing")),
        ("Qwen3MoeForCausalLM", {"num_experts_per_tok": 17}, ("17", "of 16")),
        ("Qwen3MoeForCausalLM", {"moe_intermediate_size": None}, ("moe_intermediate_size",)),
        ("Qwen3MoeForCausalLM", {"num_key_value_heads": 3}, ("no multiple of 3",)),
        ("Qwen3MoeForCausalLM", {"moe_layer_freq": [1, 1]}, ("moe_layer_freq", "2 entries")),
        ("Qwen3NextForCausalLM", {}, ("full_attention_interval", "missing")),
        ("DeepseekV3ForCausalLM", {}, ("kv_lora_rank", "missing")),
        ("DeepseekV4ForCausalLM", {"q_lora_rank": 8}, ("compress_ratios", "missing")),
        ("KimiLinearForCausalLM", {}, ("linear_attn_config", "kda_layers")),
        ("MiMoV2FlashForCausalLM", {}, ("hybrid_layer_pattern", "missing")),
    ],
)
def test_what_is_missing_is_named(
    architecture: str, config: dict[str, Any], words: tuple[str, ...]
) -> None:
    with pytest.raises(ManifestError) as caught:
        shape_of(architecture, {**MOE, **config})
    message = str(caught.value)
    assert message.startswith(f"config.json of {architecture}: ")
    assert all(word in message for word in words), message


@pytest.mark.parametrize("architectures", [None, [], "Qwen3MoeForCausalLM"])
def test_a_config_without_its_class_is_refused(architectures: object) -> None:
    with pytest.raises(ManifestError, match="architectures is missing"):
        read_shape({**MOE, "architectures": architectures})


BROKEN = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-5, 5),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.one_of(st.integers(-5, 200), st.text(max_size=3), st.none()), max_size=100),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=3),
)


def paths(value: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    if not isinstance(value, dict):
        return [path]
    inner = [deeper for key, entry in value.items() for deeper in paths(entry, (*path, key))]
    return [path, *inner] if path else inner


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_a_spoilt_config_is_read_or_refused(data: st.DataObject) -> None:
    known = models()[data.draw(st.sampled_from(sorted(models())))]
    path = data.draw(st.sampled_from(paths(known.config)))
    spoilt: dict[str, Any] = dict(known.config)
    place = spoilt
    for key in path[:-1]:
        place[key] = dict(place[key])
        place = place[key]
    place[path[-1]] = data.draw(BROKEN)
    try:
        shape = read_shape(spoilt)
    except ManifestError as error:
        assert str(error)
    else:
        assert sum(kind.layers for kind in shape.attention) == shape.layers
        assert shape.dense_layers >= 0
