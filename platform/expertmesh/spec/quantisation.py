"""Read how a checkpoint's weights are stored from its quantization_config."""

import fnmatch
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from expertmesh.core.domain.model_shape import Dtype, Quantisation
from expertmesh.errors import ManifestError


@dataclass(frozen=True, slots=True)
class _Format:
    dtype: Dtype
    scale_bytes_per_element: float = 0.0


_PLAIN = _Format(Dtype.BF16)
_FP8 = _Format(Dtype.FP8)
_FP8_BLOCKS = _Format(Dtype.FP8, 4 / 128**2)
_MXFP8 = _Format(Dtype.FP8, 1 / 32)
_MXFP4 = _Format(Dtype.FP4, 1 / 32)
_NVFP4 = _Format(Dtype.FP4, 1 / 16)

# Linear layers whose format stands for their kind. The attention's stands for dense layers and
# shared experts too: where they differ, attention is by far the larger part.
_ATTENTION = (
    "self_attn.q_proj", "self_attn.o_proj", "self_attn.q_a_proj", "self_attn.q_b_proj",
    "attn.wq_b", "linear_attn.in_proj_qkv", "linear_attn.out_proj",
)  # fmt: skip
_EXPERTS = (
    "mlp.experts.0.up_proj", "mlp.experts.0.down_proj", "block_sparse_moe.experts.0.w1",
    "ffn.experts.0.w1", "feed_forward.experts.0.up_proj",
)  # fmt: skip
_PREFIXES = (
    "model.layers", "layers", "language_model.model.layers", "model.language_model.layers",
    "language_model.layers",
)  # fmt: skip


_LEFT_OUT = ("ignore", "exclude_modules", "modules_to_not_convert", "ignored_layers")


def read_quantisation(config: Mapping[str, Any], text: Mapping[str, Any]) -> Quantisation:
    """`config` is the whole config.json, `text` its text part.

    Raises ManifestError for a format that is not known.
    """
    plain = _plain_format(text.get("dtype") or text.get("torch_dtype") or config.get("torch_dtype"))
    settings = config.get("quantization_config") or text.get("quantization_config")
    if not settings:
        return Quantisation(experts=plain.dtype, others=plain.dtype)
    settings = _flatten(_mapping(settings, "quantization_config"))
    layer = int(text.get("num_hidden_layers", 1)) * 2 // 3
    experts = _format_of(settings, _EXPERTS, layer, plain)
    others = _format_of(settings, _ATTENTION, layer, plain)
    # DeepSeek V4 names the dtype of its experts apart from the FP8 of the rest.
    named = text.get("expert_dtype") or config.get("expert_dtype")
    if named == "fp4" and experts.dtype is not Dtype.FP4:
        experts = _MXFP4
    return Quantisation(
        experts=experts.dtype,
        others=others.dtype,
        expert_scale_bytes_per_element=experts.scale_bytes_per_element,
        other_scale_bytes_per_element=others.scale_bytes_per_element,
    )


def _plain_format(name: object) -> _Format:
    return _Format(Dtype.FP32) if str(name).removeprefix("torch.") == "float32" else _PLAIN


def _flatten(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """modelopt keeps its settings one level deeper, in hf_quant_config.json."""
    inner = settings.get("quantization")
    if isinstance(inner, Mapping):
        return {"quant_method": "modelopt", **settings, **inner}
    return settings


def _format_of(
    settings: Mapping[str, Any], modules: Iterable[str], layer: int, plain: _Format
) -> _Format:
    """The plain format when any of the modules is left out."""
    named = settings.get("quantized_layers")
    if isinstance(named, Mapping):
        for module in _spellings(modules, layer):
            for pattern, entry in named.items():
                if _matches(module, pattern):
                    algorithm = _mapping(entry, "quantization_config.quantized_layers")
                    return _algorithm(str(algorithm.get("quant_algo")))
        # What is not named keeps the format of the checkpoint that was quantised further.
        return _whole_format(settings) if settings.get("quant_method") == "fp8" else plain
    left_out = [pattern for key in _LEFT_OUT for pattern in _patterns(settings, key)]
    for module in _spellings(modules, layer):
        if any(_matches(module, pattern) for pattern in left_out):
            return plain
    return _whole_format(settings)


def _spellings(modules: Iterable[str], layer: int) -> list[str]:
    return [f"{prefix}.{layer}.{module}" for module in modules for prefix in _PREFIXES]


def _whole_format(settings: Mapping[str, Any]) -> _Format:
    method = str(settings.get("quant_method", ""))
    if method == "fp8":
        return _FP8_BLOCKS if settings.get("weight_block_size") else _FP8
    if method == "mxfp4":
        return _MXFP4
    if method in ("gptq", "awq", "auto-round"):
        if settings.get("bits", 4) == 4:
            return _int4(settings.get("group_size"))
    elif method == "modelopt" or "quant_algo" in settings:
        return _algorithm(str(settings.get("quant_algo")))
    elif method == "compressed-tensors":
        return _compressed_tensors(settings)
    raise ManifestError(
        f"quantization_config.quant_method: {method!r} with "
        f"{settings.get('bits', settings.get('quant_algo', 'its settings'))!r} is not known; "
        "known are fp8, mxfp4, gptq and awq with 4 bits, modelopt, compressed-tensors"
    )


def _algorithm(name: str) -> _Format:
    formats = {
        "NVFP4": _NVFP4, "W4A16_NVFP4": _NVFP4, "NVFP4_AWQ": _NVFP4, "MXFP4": _MXFP4,
        "FP8": _FP8, "FP8_PER_CHANNEL_PER_TOKEN": _FP8, "FP8_PB_WO": _FP8_BLOCKS,
        "MXFP8": _MXFP8, "W4A16": _int4(128), "W4A16_AWQ": _int4(128),
    }  # fmt: skip
    if name not in formats:
        raise ManifestError(
            f"quantization_config.quant_algo: {name!r} is not known; known are {', '.join(formats)}"
        )
    return formats[name]


def _compressed_tensors(settings: Mapping[str, Any]) -> _Format:
    name = "quantization_config.config_groups"
    groups = _mapping(settings.get("config_groups") or {}, name)
    stored = [_mapping(group, name).get("weights") for group in groups.values()]
    weights = next((_mapping(entry, name) for entry in stored if entry), None)
    if weights is None:
        raise ManifestError(f"{name}: has no weights; a group must say their num_bits")
    bits, kind = weights.get("num_bits"), weights.get("type")
    group_size = weights.get("group_size")
    if bits == 8:
        return _FP8_BLOCKS if weights.get("strategy") == "block" else _FP8
    if bits == 4 and kind == "float":
        return _NVFP4 if group_size == 16 else _MXFP4
    if bits == 4:
        return _int4(group_size)
    raise ManifestError(f"{name}: weights of {bits!r} bits are not known; known are 4 and 8")


def _int4(group_size: object) -> _Format:
    """With a scale of two bytes for each group; no group size means one per channel."""
    if isinstance(group_size, int) and group_size > 0:
        return _Format(Dtype.INT4, 2 / group_size)
    return _Format(Dtype.INT4)


def _mapping(value: object, name: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ManifestError(f"{name}: {value!r} is no mapping; fetch the config again")
    return value


def _patterns(settings: Mapping[str, Any], key: str) -> list[str]:
    value = settings.get(key) or []
    if not isinstance(value, list):
        raise ManifestError(f"quantization_config.{key}: {value!r} is no list of layers")
    return [str(pattern) for pattern in value]


def _matches(module: str, pattern: str) -> bool:
    """As vLLM and transformers read such lists: a name, its parent, a glob or a regex."""
    if pattern.startswith("re:"):
        try:
            return re.match(pattern.removeprefix("re:"), module) is not None
        except re.error as error:
            raise ManifestError(f"quantization_config: {pattern!r} is no regex: {error}") from None
    if module == pattern or module.startswith(pattern + "."):
        return True
    if "*" in pattern:
        return fnmatch.fnmatch(module, pattern) or fnmatch.fnmatch(module, pattern + ".*")
    return "." not in pattern and pattern in module.split(".")
