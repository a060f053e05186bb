"""Counts of parameters, by hand for small shapes and against a real checkpoint."""

import json
import struct
from collections import Counter
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertmesh.core.domain.model_shape import (
    Dtype,
    Experts,
    FullAttention,
    LatentAttention,
    LinearAttention,
    ModelShape,
    Quantisation,
)
from expertmesh.core.perf.parameters import (
    attention_layer,
    checkpoint_bytes,
    parameters,
    prediction_bytes,
    prediction_parameters,
)
from expertmesh.spec.model_config import load_shape

TINY = Path(__file__).parents[3] / "models/tiny-qwen3-moe"

GROUPED = FullAttention(layers=2, heads=4, kv_heads=2, head_dim=8)
EXPERTS = Experts(layers=2, count=8, per_token=2, width=16)
SHAPE = ModelShape(
    architecture="Small",
    layers=2,
    hidden=32,
    vocab=100,
    max_position_embeddings=64,
    attention=(GROUPED,),
    experts=EXPERTS,
    dense_width=0,
)


def stored_elements(path: Path) -> Counter[str]:
    """Elements in a safetensors file, by kind, read from its header."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    found: Counter[str] = Counter()
    for name, tensor in header.items():
        if name == "__metadata__":
            continue
        if ".experts." in name:
            kind = "experts"
        elif ".self_attn." in name:
            kind = "attention"
        elif "embed_tokens" in name or "lm_head" in name:
            kind = "embeddings"
        else:
            kind = "other"
        found[kind] += prod(tensor["shape"])
    return found


def test_the_tiny_model_counts_exactly_as_its_weights() -> None:
    stored = stored_elements(TINY / "model.safetensors")
    shape = load_shape(str(TINY)).shape
    count = parameters(shape)
    assert {
        "attention": count.attention,
        "experts": count.experts,
        "embeddings": count.embeddings,
        "other": count.other,
    } == dict(stored)
    assert count.dense == count.shared == count.towers == 0
    assert count.total == sum(stored.values())
    assert checkpoint_bytes(shape) == 2 * count.total


def test_a_small_model_by_hand() -> None:
    count = parameters(replace(SHAPE, norms=5 * 32))
    projections = 32 * 32 + 2 * 32 * 16 + 32 * 32
    assert count.attention == 2 * projections
    assert count.experts == 2 * 8 * 3 * 32 * 16
    assert count.active_experts == 2 * 2 * 3 * 32 * 16
    assert count.embeddings == 2 * 100 * 32
    assert count.input_embeddings == 100 * 32
    assert count.other == 2 * 8 * 32 + 5 * 32
    assert count.active == count.total - 2 * 6 * 3 * 32 * 16


def test_a_tied_table_counts_once_and_is_multiplied() -> None:
    count = parameters(replace(SHAPE, tied_embeddings=True))
    assert (count.embeddings, count.input_embeddings) == (100 * 32, 0)


def test_towers_are_no_part_of_a_token() -> None:
    plain, tower = parameters(SHAPE), parameters(replace(SHAPE, other_parameters=1000))
    assert tower.total == plain.total + 1000
    assert tower.active == plain.active


def test_dense_layers_lie_beside_those_with_experts() -> None:
    mixed = replace(SHAPE, experts=replace(EXPERTS, layers=1), dense_width=64)
    assert parameters(mixed).dense == 3 * 32 * 64
    assert parameters(mixed).experts == parameters(SHAPE).experts // 2
    dense = parameters(replace(SHAPE, experts=None, dense_width=64))
    assert dense.dense == 2 * 3 * 32 * 64
    assert dense.experts == dense.shared == 0 and dense.active == dense.total


def test_experts_in_a_latent_width_share_the_way_in_and_out() -> None:
    count = parameters(replace(SHAPE, experts=replace(EXPERTS, latent=8, shared_width=16)))
    assert count.experts == 2 * 8 * 3 * 8 * 16
    assert count.shared == 2 * (3 * 32 * 16 + 2 * 32 * 8)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        pytest.param(
            replace(GROUPED, gated=True, extras=7),
            32 * (32 + 32 + 2 * 16) + 32 * 32 + 7,
            id="a gate as wide as the heads",
        ),
        pytest.param(
            replace(GROUPED, v_head_dim=4),
            32 * (32 + 16 + 8) + 16 * 32,
            id="values narrower than keys",
        ),
        pytest.param(
            replace(GROUPED, kv_heads=1, values_are_keys=True, q_lora_rank=6, o_lora_rank=5,
                    o_groups=2),
            6 * (32 + 32) + 32 * 8 + 5 * (32 + 2 * 32),
            id="factored projections and one shared vector",
        ),
        pytest.param(
            LatentAttention(
                layers=1, heads=4, q_lora_rank=6, kv_lora_rank=10, nope_head_dim=8,
                rope_head_dim=2, v_head_dim=8,
            ),
            6 * (32 + 40) + 32 * 12 + 10 * 4 * 16 + 32 * 32,
            id="latent",
        ),
        pytest.param(
            LatentAttention(
                layers=1, heads=4, q_lora_rank=0, kv_lora_rank=10, nope_head_dim=8,
                rope_head_dim=2, v_head_dim=8, gated=True,
            ),
            32 * 40 + 32 * 12 + 10 * 4 * 16 + 2 * 32 * 32,
            id="latent with a plain query and a gate",
        ),
        pytest.param(
            LinearAttention(
                layers=1, key_heads=2, value_heads=4, key_head_dim=8, value_head_dim=4, extras=3
            ),
            32 * (2 * 16 + 2 * 16) + 16 * 32 + 3,
            id="linear with its gate",
        ),
        pytest.param(
            LinearAttention(
                layers=1, key_heads=2, value_heads=4, key_head_dim=8, value_head_dim=4, gated=False
            ),
            32 * (2 * 16 + 16) + 16 * 32,
            id="linear without a gate",
        ),
    ],
)  # fmt: skip
def test_attention_by_hand(
    kind: FullAttention | LatentAttention | LinearAttention, expected: int
) -> None:
    assert attention_layer(32, kind) == expected


def test_a_linear_layer_keeps_a_state_and_no_cache() -> None:
    linear = LinearAttention(
        layers=3, key_heads=2, value_heads=4, key_head_dim=8, value_head_dim=16, conv_kernel=4
    )
    assert linear.recurrent_elements == 4 * 8 * 16
    assert linear.conv_elements == 3 * (2 * 16 + 64)
    shape = replace(SHAPE, layers=5, attention=(GROUPED, linear))
    assert shape.kv_elements_per_token == 2 * 2 * 2 * 8
    assert shape.state_bytes_per_sequence == 3 * (4 * 512 + 2 * 288)
    halved = replace(linear, state_dtype=Dtype.BF16)
    assert halved.state_bytes_per_sequence == 2 * 512 + 2 * 288


def test_the_bytes_follow_the_formats_and_the_rest_stays_in_bf16() -> None:
    count = parameters(SHAPE)
    quantised = replace(
        SHAPE,
        quantisation=Quantisation(
            experts=Dtype.FP4,
            others=Dtype.FP8,
            expert_scale_bytes_per_element=1 / 32,
            other_scale_bytes_per_element=0.25,
        ),
    )
    assert checkpoint_bytes(SHAPE) == 2 * count.total
    assert checkpoint_bytes(quantised) == pytest.approx(
        count.experts * (0.5 + 1 / 32)
        + count.attention * 1.25
        + 2 * (count.embeddings + count.other)
    )
    single = replace(SHAPE, quantisation=Quantisation(experts=Dtype.FP32, others=Dtype.FP32))
    assert checkpoint_bytes(single) == 4 * count.total


def test_prediction_layers_are_counted_apart() -> None:
    predicting = replace(SHAPE, prediction_layers=2)
    assert parameters(predicting) == parameters(SHAPE)
    assert prediction_parameters(SHAPE) == 0 and prediction_bytes(SHAPE) == 0
    layer = attention_layer(32, GROUPED) + 8 * 3 * 32 * 16 + 2 * 32 * 32
    assert prediction_parameters(predicting) == 2 * layer
    assert prediction_bytes(predicting) == 2 * (2 * layer + 2 * 100 * 32)


@given(
    layers=st.integers(1, 8),
    count=st.integers(1, 64),
    per_token=st.integers(1, 64),
    shared=st.integers(0, 64),
)
def test_a_token_uses_no_more_than_there_is(
    layers: int, count: int, per_token: int, shared: int
) -> None:
    experts = replace(
        EXPERTS,
        layers=layers,
        count=count,
        per_token=min(count, per_token),
        shared_width=shared,
    )
    shape = replace(
        SHAPE, layers=layers, attention=(replace(GROUPED, layers=layers),), experts=experts
    )
    result = parameters(shape)
    assert 0 < result.active <= result.total
    assert (result.active == result.total) == (per_token >= count)
    assert result.total == (
        result.attention
        + result.dense
        + result.experts
        + result.shared
        + result.embeddings
        + result.other
    )
