"""Parameters of the towers that turn images into tokens, from their part of the config."""

from collections.abc import Mapping
from typing import Any


def tower_parameters(config: Mapping[str, Any]) -> int:
    """About: blocks of attention and a two-layer MLP, the patches, and the way out; 0 for none.

    A tower of one model is much like that of another, and small beside the text part.
    """
    thinker = config.get("thinker_config")
    vision = (thinker if isinstance(thinker, Mapping) else config).get("vision_config")
    if not isinstance(vision, Mapping):
        return 0
    width = _number(vision, "hidden_size", "vt_hidden_size")
    depth = _number(vision, "depth", "num_hidden_layers", "vt_num_hidden_layers")
    inner = _number(vision, "intermediate_size", "vt_intermediate_size")
    blocks = depth * (4 * width * width + 2 * width * inner)
    patch = _number(vision, "patch_size") ** 2 * 3 * (_number(vision, "temporal_patch_size") or 1)
    merge = _number(vision, "spatial_merge_size") or 2
    merged = width * merge * merge
    out = _number(vision, "out_hidden_size", "text_hidden_size") or width
    deeper = vision.get("deepstack_visual_indexes")
    mergers = 1 + (len(deeper) if isinstance(deeper, list) else 0)
    return blocks + patch * width + mergers * merged * (merged + out)


def _number(config: Mapping[str, Any], *keys: str) -> int:
    for key in keys:
        value = config.get(key)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return 0
