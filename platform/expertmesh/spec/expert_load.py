"""Measured loads of experts: answers of ranks to `GET /em/experts`, or files of them."""

from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, TypeAdapter, ValidationError

from expertmesh.core.planner.balance import ExpertLoad
from expertmesh.core.planner.expert_load import measured_by_layer
from expertmesh.errors import ManifestError
from expertmesh.spec.manifest import ManifestModel


class _Layer(ManifestModel):
    layer: int
    tokens: dict[str, int]


class _Answer(ManifestModel):
    group: str = ""
    rank: int = 0
    layers: list[_Layer] = Field(default_factory=list)


_ANSWERS: TypeAdapter[list[_Answer]] = TypeAdapter(list[_Answer])


def read_file(file: Path) -> Any:
    """JSON, as a rank answers, or a list of such answers. Raises ManifestError."""
    try:
        return yaml.safe_load(file.read_text())
    except FileNotFoundError:
        raise ManifestError(f"--expert-load: {file}: no such file; check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ManifestError(f"--expert-load: {file}: cannot be read: {error}") from None
    except yaml.YAMLError:
        raise ManifestError(
            f"--expert-load: {file}: is no JSON; write what GET /em/experts answers"
        ) from None


def expert_load(source: str, documents: list[Any], experts: int) -> ExpertLoad:
    """Of all ranks together. Raises ManifestError, naming `source`."""
    flat: list[Any] = []
    for document in documents:
        flat += document if isinstance(document, list) else [document]
    try:
        answers = _ANSWERS.validate_python(flat)
        shares = [{layer.layer: layer.tokens for layer in answer.layers} for answer in answers]
        layers = measured_by_layer(shares, experts)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ManifestError(
            f"--expert-load: {source}: {where}: {first['msg']}; write what GET /em/experts answers"
        ) from None
    except ValueError as error:
        raise ManifestError(f"--expert-load: {source}: {error}") from None
    if not any(any(layer) for layer in layers):
        raise ManifestError(f"--expert-load: {source}: no expert has been asked yet; send traffic")
    return ExpertLoad(source, tuple(tuple(layer) for layer in layers))
