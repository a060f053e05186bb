"""The models that ship with the package: their counts and caches, row by row."""

import pytest

from expertmesh.core.domain.model_shape import (
    Dtype,
    FullAttention,
    LatentAttention,
    LinearAttention,
)
from expertmesh.core.perf.parameters import checkpoint_bytes, parameters
from expertmesh.spec.catalog import KnownModel, models

KNOWN = list(models().values())
VERIFIED = [known for known in KNOWN if known.verified]

# Elements of the KV cache per token over all layers, worked out apart from this code.
KV_ELEMENTS = {
    "Qwen/Qwen2.5-72B-Instruct": 163_840,
    "Qwen/Qwen3-30B-A3B": 49_152,
    "Qwen/Qwen3-235B-A22B-Instruct-2507-FP8": 96_256,
    "Qwen/Qwen3-Coder-480B-A35B-Instruct": 126_976,
    "Qwen/Qwen3-Next-80B-A3B-Instruct": 12_288,
    "Qwen/Qwen3-VL-30B-A3B-Instruct": 49_152,
    "Qwen/Qwen3-VL-235B-A22B-Instruct": 96_256,
    "Qwen/Qwen3.5-35B-A3B": 10_240,
    "Qwen/Qwen3.5-122B-A10B": 12_288,
    "Qwen/Qwen3.5-397B-A17B": 15_360,
    "Qwen/Qwen3.8-2.4T-A95B": 47_104,
    "deepseek-ai/DeepSeek-V3": 35_136,
    "deepseek-ai/DeepSeek-V3.2": 35_136,
    "moonshotai/Kimi-K2-Instruct": 35_136,
    "moonshotai/Kimi-K2.5": 35_136,
    "moonshotai/Kimi-K3": 13_824,
    "zai-org/GLM-4.7": 188_416,
    "zai-org/GLM-4.5-Air": 94_208,
    "zai-org/GLM-4.7-Flash": 27_072,
    "zai-org/GLM-5": 44_928,
    "zai-org/GLM-5.3": 44_928,
    "openai/gpt-oss-120b": 36_864,
    "openai/gpt-oss-20b": 24_576,
    "MiniMaxAI/MiniMax-M2.5": 126_976,
    "MiniMaxAI/MiniMax-M3": 61_440,
    "meta-llama/Llama-4-Scout-17B-16E-Instruct": 98_304,
    "meta-llama/Llama-4-Maverick-17B-128E-Instruct": 98_304,
    "mistralai/Mixtral-8x7B-v0.1": 65_536,
    "mistralai/Mixtral-8x22B-v0.1": 114_688,
}

# Parameters that transformers 5.23 creates for the same configs. It keeps the routers' learned
# biases as buffers, so the counts here may be above by one element for each expert and layer.
TRANSFORMERS = {
    "Qwen/Qwen3-30B-A3B": 30_532_122_624,
    "openai/gpt-oss-20b": 20_914_757_184,
    "openai/gpt-oss-120b": 116_829_156_672,
    "mistralai/Mixtral-8x7B-v0.1": 46_702_792_704,
    "MiniMaxAI/MiniMax-M2.5": 228_689_748_992,
    "MiniMaxAI/MiniMax-M3": 426_174_565_632,
    "deepseek-ai/DeepSeek-V3": 671_026_404_352,
    "deepseek-ai/DeepSeek-V3.2": 671_877_929_216,
    "deepseek-ai/DeepSeek-V4-Flash": 284_332_230_231,
    "zai-org/GLM-5": 743_911_199_232,
    "zai-org/GLM-5.3": 743_377_000_704,
    "XiaomiMiMo/MiMo-V2-Flash": 308_778_768_832,
}


def by_id(known: KnownModel) -> str:
    return known.id


@pytest.mark.parametrize("known", VERIFIED, ids=by_id)
def test_total_parameters_are_as_published(known: KnownModel) -> None:
    assert parameters(known.shape).total == pytest.approx(known.published_total, rel=0.02)


@pytest.mark.parametrize(
    "known", [known for known in VERIFIED if known.published_active is not None], ids=by_id
)
def test_active_parameters_are_as_published(known: KnownModel) -> None:
    count = parameters(known.shape)
    lookup = 0 if known.active_counts_lookup else count.input_embeddings
    assert count.active - lookup == pytest.approx(known.published_active, rel=0.02)


@pytest.mark.parametrize(("identifier", "elements"), KV_ELEMENTS.items())
def test_the_cache_per_token(identifier: str, elements: int) -> None:
    assert models()[identifier].shape.kv_elements_per_token == elements


@pytest.mark.parametrize(("identifier", "total"), TRANSFORMERS.items())
def test_every_element_is_counted(identifier: str, total: int) -> None:
    shape = models()[identifier].shape
    assert shape.experts is not None
    biases = shape.experts.layers * shape.experts.count
    # gpt-oss and Mixtral have no such buffer, so their counts must agree exactly.
    assert parameters(shape).total - total in (0, biases, biases - 3 * shape.experts.count)


@pytest.mark.parametrize("known", KNOWN, ids=by_id)
def test_the_layers_add_up(known: KnownModel) -> None:
    shape = known.shape
    assert sum(kind.layers for kind in shape.attention) == shape.layers
    assert shape.max_position_embeddings >= 32768
    assert shape.experts is None or 0 < shape.experts.layers <= shape.layers
    assert bool(shape.dense_width) == bool(shape.dense_layers)
    assert known.source and known.id.count("/") == 1


def test_second_hand_rows_say_so() -> None:
    assert {known.name for known in KNOWN if not known.verified} == {
        "Qwen2.5-72B",
        "Qwen3-Omni-30B-A3B",
        "Qwen3.8-2.4T-A95B",
        "GLM-4.5-Air",
    }


def test_the_routed_part_of_kimi_k3() -> None:
    count = parameters(models()["moonshotai/Kimi-K3"].shape)
    assert count.experts == pytest.approx(2722.7e9, rel=0.001)
    assert count.active_experts == pytest.approx(48.6e9, rel=0.001)


def test_kimi_k3_mixes_latent_and_linear_layers() -> None:
    shape = models()["moonshotai/Kimi-K3"].shape
    latent, linear = shape.attention
    assert isinstance(latent, LatentAttention) and isinstance(linear, LinearAttention)
    assert (latent.layers, linear.layers) == (24, 69)
    # A matrix of 128 by 128 in FP32 for each head, and the last 3 inputs of the convolution.
    layer = 96 * 128 * 128 * 4 + 3 * 3 * 96 * 128 * 2
    assert shape.state_bytes_per_sequence == 69 * layer
    assert shape.experts is not None and shape.experts.latent == 3584


def test_a_sequence_of_a_million_tokens_of_deepseek_v4_pro() -> None:
    """9.62 GiB in BF16, as vLLM's report of 2026-04-24 says."""
    shape = models()["deepseek-ai/DeepSeek-V4-Pro"].shape
    assert shape.kv_bytes_per_token_layer is not None
    sequence = shape.kv_bytes_per_token_layer * shape.layers * 2**20
    assert sequence / 2**30 == pytest.approx(9.62, abs=0.01)
    layers = {
        kind.compression: kind.layers for kind in shape.attention if isinstance(kind, FullAttention)
    }
    assert layers == {4: 30, 128: 31}
    assert shape.experts is not None and shape.experts.hash_layers == 3


def test_half_of_gpt_oss_has_a_window() -> None:
    windows = {
        kind.window: kind.layers
        for kind in models()["openai/gpt-oss-120b"].shape.attention
        if isinstance(kind, FullAttention)
    }
    assert windows == {None: 18, 128: 18}


def test_glm_5_3_shares_most_of_its_indexers() -> None:
    def indexed(identifier: str) -> int:
        attention = models()[identifier].shape.attention
        return sum(kind.layers for kind in attention if kind.index_elements_per_token)

    assert (indexed("zai-org/GLM-5"), indexed("zai-org/GLM-5.3")) == (78, 21)


@pytest.mark.parametrize(
    ("identifier", "experts", "others", "gigabytes"),
    [
        ("Qwen/Qwen3-30B-A3B", Dtype.BF16, Dtype.BF16, 61.06),
        ("Qwen/Qwen3-30B-A3B-FP8", Dtype.FP8, Dtype.FP8, 31.2),
        ("deepseek-ai/DeepSeek-V3", Dtype.FP8, Dtype.FP8, 673.2),
        ("deepseek-ai/DeepSeek-V4-Pro", Dtype.FP4, Dtype.FP8, 849.8),
        ("sgl-project/DeepSeek-V4-Pro-FP8", Dtype.FP8, Dtype.FP8, 1575.5),
        ("moonshotai/Kimi-K2.5", Dtype.INT4, Dtype.BF16, 595.1),
        ("moonshotai/Kimi-K2-Thinking", Dtype.INT4, Dtype.BF16, 594.2),
        ("moonshotai/Kimi-K3", Dtype.FP4, Dtype.BF16, 1560.7),
        ("nvidia/Kimi-K2.6-NVFP4", Dtype.FP4, Dtype.BF16, 595.1),
        ("nvidia/Qwen3-235B-A22B-NVFP4", Dtype.FP4, Dtype.FP4, 134.1),
        ("nvidia/DeepSeek-R1-0528-FP4", Dtype.FP4, Dtype.BF16, 402.1),
        ("nvidia/MiniMax-M3-NVFP4", Dtype.FP4, Dtype.FP8, 248.3),
        ("openai/gpt-oss-120b", Dtype.FP4, Dtype.BF16, 65.2),
        ("MiniMaxAI/MiniMax-M2.5", Dtype.FP8, Dtype.FP8, 230.0),
    ],
)
def test_formats_of_the_checkpoints(
    identifier: str, experts: Dtype, others: Dtype, gigabytes: float
) -> None:
    shape = models()[identifier].shape
    assert (shape.quantisation.experts, shape.quantisation.others) == (experts, others)
    assert checkpoint_bytes(shape) / 1e9 == pytest.approx(gigabytes, rel=0.001)


def test_families_without_load_balancing() -> None:
    """vLLM 0.29 has no `MixtureOfExperts` for them, so it cannot move their experts."""
    fixed = {
        known.name
        for known in KNOWN
        if known.shape.experts is not None and not known.shape.experts.balanceable
    }
    assert fixed == {"gpt-oss-120b", "gpt-oss-20b", "MiniMax-M2", "MiniMax-M3"}


def test_the_catalog_is_read_once() -> None:
    assert models() is models()
