"""Known models, which ship with the package so that planning works without a network."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from types import MappingProxyType
from typing import Any

import yaml

from expertmesh.core.domain.model_shape import ModelShape
from expertmesh.spec.model_shape import read_shape


@dataclass(frozen=True, slots=True)
class KnownModel:
    """One checkpoint, as its maker published it."""

    id: str
    """On Hugging Face."""
    name: str
    """Of the model, which may have checkpoints in several formats."""
    shape: ModelShape
    config: Mapping[str, Any]
    """The keys of config.json that the shape follows from."""
    source: str
    """Where the config was read."""
    published_total: float
    """Parameters, as stated beside the model; without multi-token prediction."""
    published_active: float | None
    """For one token; None when nobody has stated it."""
    active_counts_lookup: bool
    """The stated active parameters count the input embedding, which is only looked up."""
    verified: bool
    """The config itself was read; otherwise the numbers are second-hand."""


@cache
def models() -> Mapping[str, KnownModel]:
    """By Hugging Face id."""
    text = resources.files("expertmesh").joinpath("catalog/models.yaml").read_text("utf-8")
    known: dict[str, KnownModel] = {}
    for entry in yaml.load(text, Loader=_LOADER):
        for checkpoint in _checkpoints(entry):
            known[checkpoint.id] = checkpoint
    return MappingProxyType(known)


# The C loader reads the file several times faster; builds without libyaml have none.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def _checkpoints(entry: Mapping[str, Any]) -> Iterable[KnownModel]:
    published = entry["published"]
    active = published.get("active_b")
    shared = _expand(entry["config"])
    for identifier, differences in entry["checkpoints"].items():
        config = _merged(shared, differences or {})
        yield KnownModel(
            id=identifier,
            name=entry["name"],
            shape=read_shape(config),
            config=config,
            source=entry["source"],
            published_total=published["total_b"] * 1e9,
            published_active=None if active is None else active * 1e9,
            active_counts_lookup=published.get("active_counts_lookup", True),
            verified=entry.get("verified", True),
        )


def _merged(config: Mapping[str, Any], differences: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(config)
    for key, value in differences.items():
        inner = merged.get(key)
        if isinstance(inner, Mapping) and isinstance(value, Mapping):
            merged[key] = _merged(inner, value)
        else:
            merged[key] = value
    return merged


def _expand(value: Any) -> Any:
    """A list by layer is written as {start: […], cycle: […], count: n}."""
    if not isinstance(value, Mapping):
        return value
    if "cycle" not in value:
        return {key: _expand(inner) for key, inner in value.items()}
    layers = list(value.get("start", ()))
    cycle = value["cycle"]
    while len(layers) < value["count"]:
        layers += cycle
    return layers[: value["count"]]
