"""Find a model's config.json, in a folder, on the hub or in the catalog, and read its shape."""

import difflib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from expertmesh.core.domain.model_shape import ModelShape
from expertmesh.core.perf.parameters import checkpoint_bytes, prediction_bytes
from expertmesh.errors import ManifestError, UpstreamUnavailable
from expertmesh.spec.catalog import models
from expertmesh.spec.manifest import refuse
from expertmesh.spec.model_shape import read_shape

__all__ = ["Fetch", "LoadedShape", "Origin", "load_shape", "read_folder", "read_shape"]

Fetch = Callable[[str, str, str], Path | None]
"""Takes a Hugging Face id, a revision and a file's name; None when there is no such file.

Raises UpstreamUnavailable when the hub cannot be asked.
"""

INDEX_TOLERANCE = 0.03
"""Share by which the computed bytes of the weights may differ from the index."""

_CONFIG = "config.json"
_INDEX = "model.safetensors.index.json"
_MODELOPT = "hf_quant_config.json"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


class Origin(StrEnum):
    FOLDER = "folder"
    HUB = "hub"
    CATALOG = "catalog"


@dataclass(frozen=True, slots=True)
class LoadedShape:
    shape: ModelShape
    origin: Origin
    warning: str | None = None
    """What a person should know before they rely on the shape."""


def load_shape(
    source: str,
    *,
    revision: str = "main",
    fetch: Fetch | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> LoadedShape:
    """`source`: a local folder or a Hugging Face id; no weights are read.

    Without `fetch`, and while the hub cannot be asked, known models come from the catalog.
    Raises ManifestError for a model that cannot be found or read, and UpstreamUnavailable when
    only the hub could tell.
    """
    if source.startswith((".", "/")):
        folder = Path(source)
        if not folder.is_dir():
            raise ManifestError(f"{source}: no such folder; write the path of the model's folder")
        return _load(source, lambda name: _in_folder(folder, name), Origin.FOLDER, overrides)
    if not _HUB_ID.fullmatch(source):
        raise ManifestError(
            f"{source}: is no folder and no Hugging Face id; write ./<folder> or <maker>/<model>"
        )
    reason = "was not asked"
    if fetch is not None:
        ask = fetch
        try:
            return _load(source, lambda name: ask(source, revision, name), Origin.HUB, overrides)
        except UpstreamUnavailable as error:
            reason = f"cannot be asked ({error})"
    known = models().get(source)
    if known is None:
        close = difflib.get_close_matches(source, models(), n=3)
        hint = f"; the catalog has {', '.join(close)}" if close else ""
        text = (
            f"{source}: the hub {reason} and the catalog has no such model; "
            f"connect, or give a folder with its config.json{hint}"
        )
        raise ManifestError(text) if fetch is None else UpstreamUnavailable(text)
    shape = read_shape(known.config, overrides) if overrides else known.shape
    warning = None
    if not known.verified:
        warning = f"{source}: its config could not be read; the catalog's numbers are second-hand"
    return LoadedShape(shape, Origin.CATALOG, warning)


def read_folder(
    folder: Path, *, file: str, field: str, overrides: Mapping[str, Any] | None = None
) -> ModelShape:
    """Of a model that can be served from its folder, so with weights.

    `file` and `field` say where the manifest names the folder, for the error text.
    """
    if not folder.is_dir():
        raise refuse(
            file, field, str(folder), "no such folder; write the path of the model's folder"
        )
    path = folder / _CONFIG
    if not path.is_file():
        raise refuse(file, field, str(folder), "holds no config.json; write a model's folder")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise refuse(
            file, field, str(path), f"is no JSON ({error}); fetch the model again"
        ) from None
    try:
        shape = read_shape(config, overrides)
    except ManifestError as error:
        raise refuse(file, field, str(path), str(error)) from None
    if not any(folder.glob("*.safetensors")):
        raise refuse(file, field, str(folder), "holds no *.safetensors weights; fetch them")
    return shape


def _in_folder(folder: Path, name: str) -> Path | None:
    path = folder / name
    return path if path.is_file() else None


def _load(
    source: str,
    find: Callable[[str], Path | None],
    origin: Origin,
    overrides: Mapping[str, Any] | None,
) -> LoadedShape:
    config = _read_json(source, find(_CONFIG))
    if config is None:
        raise ManifestError(f"{source}: holds no config.json; write a model's folder or id")
    if not config.get("quantization_config"):
        modelopt = _read_json(source, find(_MODELOPT))
        if modelopt is not None:
            config["quantization_config"] = modelopt
    try:
        shape = read_shape(config, overrides)
    except ManifestError as error:
        raise ManifestError(f"{source}: {error}") from None
    index = _read_json(source, find(_INDEX))
    return LoadedShape(shape, origin, _index_warning(source, shape, index))


def _read_json(source: str, path: Path | None) -> dict[str, Any] | None:
    if path is None:
        return None
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ManifestError(
            f"{source}: {path.name} is no JSON ({error}); fetch the model again"
        ) from None
    if not isinstance(content, dict):
        raise ManifestError(f"{source}: {path.name} holds no mapping; fetch the model again")
    return content


def _index_warning(source: str, shape: ModelShape, index: Mapping[str, Any] | None) -> str | None:
    """Checkpoints may or may not hold the layers of multi-token prediction: both are right."""
    stored = ((index or {}).get("metadata") or {}).get("total_size")
    if not isinstance(stored, int | float) or stored <= 0:
        return None
    plain = checkpoint_bytes(shape)
    expected = min(plain, plain + prediction_bytes(shape), key=lambda size: abs(size - stored))
    difference = (stored - expected) / stored
    if abs(difference) <= INDEX_TOLERANCE:
        return None
    return (
        f"{source}: its weights take {stored / 1e9:.2f} GB by {_INDEX}, "
        f"but {expected / 1e9:.2f} GB by its config ({-difference:+.1%}); "
        "check memory against the real engine"
    )
