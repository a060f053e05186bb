"""Read the shape of a mixture-of-experts model from its config.json."""

import json
from pathlib import Path
from typing import Any

from expertmesh.core.domain.moe import MoeShape
from expertmesh.spec.manifest import refuse

# The same number under the names that the model families use.
_EXPERT_KEYS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")
_TOP_K_KEYS = ("num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_k")


def read_moe_shape(folder: Path, *, file: str, field: str) -> MoeShape:
    """`file` and `field` say where the manifest names the folder, for the error text."""
    if not folder.is_dir():
        raise refuse(
            file, field, str(folder), "no such folder; write the path of the model's folder"
        )
    path = folder / "config.json"
    if not path.is_file():
        raise refuse(file, field, str(folder), "holds no config.json; write a model's folder")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise refuse(
            file, field, str(path), f"is no JSON ({error}); fetch the model again"
        ) from None
    text: dict[str, Any] = config.get("text_config", config)
    experts = _first(text, _EXPERT_KEYS)
    top_k = _first(text, _TOP_K_KEYS)
    if not experts or not top_k:
        raise refuse(
            file,
            field,
            str(path),
            "describes no mixture of experts (none of "
            f"{', '.join(_EXPERT_KEYS)}); choose a MoE model",
        )
    if not any(folder.glob("*.safetensors")):
        raise refuse(file, field, str(folder), "holds no *.safetensors weights; fetch them")
    return MoeShape(
        architecture=str(config.get("architectures", ["unknown"])[0]),
        experts=experts,
        experts_per_token=top_k,
        layers=int(text.get("num_hidden_layers", 0)),
        max_position_embeddings=int(text.get("max_position_embeddings", 0)),
    )


def _first(config: dict[str, Any], keys: tuple[str, ...]) -> int | None:
    for key in keys:
        if isinstance(config.get(key), int):
            return int(config[key])
    return None
