"""Builders of tiny mixture-of-experts checkpoints with random weights, one for each architecture.

The weights are scaled so that activations keep their size from layer to layer, the router has clear
preferences and the next token has a clear favourite: greedy decoding must not hang on rounding.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

VOCABULARY = 512
COMMON: dict[str, Any] = dict(
    vocab_size=VOCABULARY,
    hidden_size=128,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    tie_word_embeddings=False,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)


def qwen3_moe() -> transformers.PreTrainedConfig:
    return transformers.Qwen3MoeConfig(
        **COMMON,
        head_dim=32,
        intermediate_size=256,
        moe_intermediate_size=64,
        num_experts=16,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
    )


def qwen2_moe() -> transformers.PreTrainedConfig:
    return transformers.Qwen2MoeConfig(
        **COMMON,
        intermediate_size=256,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=128,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=False,
    )


def qwen3_next() -> transformers.PreTrainedConfig:
    """Linear-attention head dims of 128: vLLM's CPU kernel has no others."""
    return transformers.Qwen3NextConfig(
        **COMMON,
        head_dim=32,
        intermediate_size=256,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
        num_experts=16,
        num_experts_per_tok=4,
        norm_topk_prob=True,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
    )


def deepseek_v3() -> transformers.PreTrainedConfig:
    """MLA dims that vLLM's CPU kernel has; grouped routing with a correction bias (noaux_tc)."""
    return transformers.DeepseekV3Config(
        **{**COMMON, "num_key_value_heads": 4},
        intermediate_size=256,
        moe_intermediate_size=64,
        n_routed_experts=16,
        num_experts_per_tok=4,
        n_shared_experts=1,
        n_group=4,
        topk_group=2,
        first_k_dense_replace=1,
        routed_scaling_factor=1.5,
        norm_topk_prob=True,
        scoring_func="sigmoid",
        topk_method="noaux_tc",
        q_lora_rank=64,
        kv_lora_rank=512,
        qk_rope_head_dim=64,
        qk_nope_head_dim=64,
        v_head_dim=64,
    )


def glm4_moe() -> transformers.PreTrainedConfig:
    return transformers.Glm4MoeConfig(
        **COMMON,
        head_dim=32,
        intermediate_size=256,
        moe_intermediate_size=64,
        n_routed_experts=16,
        num_experts_per_tok=4,
        n_shared_experts=1,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        routed_scaling_factor=1.5,
        norm_topk_prob=True,
        use_qk_norm=True,
    )


def mixtral() -> transformers.PreTrainedConfig:
    return transformers.MixtralConfig(
        **COMMON, intermediate_size=128, num_local_experts=8, num_experts_per_tok=2
    )


def gpt_oss() -> transformers.PreTrainedConfig:
    """Experts with biases and the clamped swiglu; sliding windows and attention sinks, these of
    bfloat16 values, as vLLM's CPU kernel reads them."""
    return transformers.GptOssConfig(
        **COMMON,
        head_dim=32,
        intermediate_size=128,
        num_local_experts=8,
        num_experts_per_tok=2,
        sliding_window=64,
        layer_types=["sliding_attention", "full_attention"] * 2,
        rope_parameters={
            "rope_type": "yarn",
            "factor": 4.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 128,
            "rope_theta": 150000.0,
        },
    )


ARCHITECTURES: dict[str, Callable[[], transformers.PreTrainedConfig]] = {
    "qwen2-moe": qwen2_moe,
    "qwen3-moe": qwen3_moe,
    "qwen3-next": qwen3_next,
    "deepseek-v3": deepseek_v3,
    "glm4-moe": glm4_moe,
    "mixtral": mixtral,
    "gpt-oss": gpt_oss,
}


def save_tiny_model(architecture: str, directory: Path, seed: int = 7) -> Path:
    """Writes config.json and float32 safetensors; no tokenizer."""
    model = transformers.AutoModelForCausalLM.from_config(
        ARCHITECTURES[architecture](), dtype=torch.float32
    )
    _randomise(model, torch.Generator().manual_seed(seed))
    model.save_pretrained(directory)
    return directory


def _randomise(model: torch.nn.Module, generator: torch.Generator) -> None:
    with torch.no_grad():
        for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
            spread = _spread(name, parameter)
            if spread is not None:
                parameter.normal_(0.0, spread, generator=generator)
            if name.endswith("sinks"):
                parameter.copy_(parameter.bfloat16())


def _spread(name: str, parameter: torch.Tensor) -> float | None:
    """Standard deviation for a parameter; None leaves it as the architecture initialised it."""
    if "norm" in name or not parameter.is_floating_point() or "inv_freq" in name:
        return None
    if "embed_tokens" in name:
        return 1.0
    if name.endswith("e_score_correction_bias"):
        return 0.1
    if parameter.dim() == 1:
        return 0.2 if name.endswith("bias") else None
    gain = (
        4.0
        if "lm_head" in name
        else 2.0
        if name.endswith(("gate.weight", "router.weight"))
        else 1.0
    )
    return gain / math.sqrt(parameter.shape[-1])
