"""How the formats of checkpoints are read."""

from typing import Any

import pytest

from expertmesh.core.domain.model_shape import Dtype
from expertmesh.errors import ManifestError
from expertmesh.spec.quantisation import read_quantisation

TEXT = {"num_hidden_layers": 12}


def group(**weights: object) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": {"weights": weights}},
    }


@pytest.mark.parametrize(
    ("settings", "dtype", "scale"),
    [
        ({"quant_method": "fp8"}, Dtype.FP8, 0),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, Dtype.FP8, 4 / 16384),
        ({"quant_method": "mxfp4"}, Dtype.FP4, 1 / 32),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, Dtype.INT4, 2 / 128),
        ({"quant_method": "awq", "bits": 4, "group_size": 64}, Dtype.INT4, 2 / 64),
        ({"quant_method": "gptq", "bits": 4, "group_size": -1}, Dtype.INT4, 0),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, Dtype.FP4, 1 / 16),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, Dtype.FP8, 0),
        ({"quantization": {"quant_algo": "NVFP4", "group_size": 16}}, Dtype.FP4, 1 / 16),
        (group(num_bits=4, type="int", group_size=32), Dtype.INT4, 2 / 32),
        (group(num_bits=4, type="float", group_size=16), Dtype.FP4, 1 / 16),
        (group(num_bits=4, type="float", group_size=32), Dtype.FP4, 1 / 32),
        (group(num_bits=8, type="float", strategy="channel"), Dtype.FP8, 0),
        (group(num_bits=8, type="float", strategy="block"), Dtype.FP8, 4 / 16384),
    ],
)
def test_one_format_for_all(settings: dict[str, Any], dtype: Dtype, scale: float) -> None:
    read = read_quantisation({"quantization_config": settings}, TEXT)
    assert (read.experts, read.others) == (dtype, dtype)
    assert read.expert_scale_bytes_per_element == scale
    assert read.other_scale_bytes_per_element == scale


@pytest.mark.parametrize(
    "pattern",
    [
        "model.layers.8.self_attn.q_proj",
        "model.layers.8.self_attn",
        "model.layers.8",
        "model.layers.*.self_attn",
        "*.self_attn*",
        "re:.*self_attn.*",
        "self_attn",
        "language_model.model.layers.8.self_attn*",
    ],
)
@pytest.mark.parametrize("key", ["ignore", "exclude_modules", "modules_to_not_convert"])
def test_layers_that_are_left_out(pattern: str, key: str) -> None:
    settings = {"quant_method": "fp8", key: [pattern]}
    read = read_quantisation({"quantization_config": settings}, TEXT)
    whole_layer = pattern == "model.layers.8"
    assert read.others is Dtype.BF16
    assert read.experts is (Dtype.BF16 if whole_layer else Dtype.FP8)


@pytest.mark.parametrize("pattern", ["lm_head", "gate", "model.layers.0*", "re:.*mlp.gate$"])
def test_routers_and_heads_that_are_left_out_change_nothing(pattern: str) -> None:
    settings = {"quant_method": "fp8", "modules_to_not_convert": [pattern]}
    read = read_quantisation({"quantization_config": settings}, TEXT)
    assert (read.experts, read.others) == (Dtype.FP8, Dtype.FP8)


def test_experts_quantised_further_than_the_rest() -> None:
    layers = {"layers.8.ffn.experts": {"quant_algo": "NVFP4"}}
    base = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    settings = {**base, "quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    settings["ignore"] = ["*.attn.*"]
    read = read_quantisation({"quantization_config": settings}, TEXT)
    assert (read.experts, read.others) == (Dtype.FP4, Dtype.FP8)


def test_the_dtype_of_experts_named_apart() -> None:
    settings = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    read = read_quantisation({"quantization_config": settings, "expert_dtype": "fp4"}, TEXT)
    assert (read.experts, read.others) == (Dtype.FP4, Dtype.FP8)
    text = {**TEXT, "expert_dtype": "fp4"}
    assert read_quantisation({"quantization_config": settings}, text) == read


def test_settings_inside_the_text_part() -> None:
    text = {**TEXT, "quantization_config": {"quant_method": "fp8"}}
    assert read_quantisation({}, text).experts is Dtype.FP8


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("bfloat16", Dtype.BF16),
        ("float16", Dtype.BF16),
        ("float32", Dtype.FP32),
        (None, Dtype.BF16),
    ],
)
def test_weights_that_are_not_quantised(name: str | None, dtype: Dtype) -> None:
    for key in ("dtype", "torch_dtype"):
        read = read_quantisation({}, {**TEXT, key: name})
        assert (read.experts, read.others) == (dtype, dtype)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"quant_method": "bitsandbytes"}, ("quant_method", "'bitsandbytes'", "known are fp8")),
        ({"quant_method": "gptq", "bits": 3}, ("'gptq'", "3", "4 bits")),
        ({"quant_method": "modelopt", "quant_algo": "INT2"}, ("quant_algo", "'INT2'", "NVFP4")),
        (group(num_bits=2, type="int"), ("config_groups", "2 bits", "4 and 8")),
        ({"quant_method": "compressed-tensors"}, ("config_groups", "no weights")),
    ],
)
def test_a_format_that_is_not_known_is_refused(
    settings: dict[str, Any], words: tuple[str, ...]
) -> None:
    with pytest.raises(ManifestError) as caught:
        read_quantisation({"quantization_config": settings}, TEXT)
    assert all(word in str(caught.value) for word in words), str(caught.value)
