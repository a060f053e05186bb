"""Load manifests from YAML and check them against one another, before anything starts."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from expertmesh.core.domain.deployment import ModelDeployment
from expertmesh.core.domain.hardware import Pool
from expertmesh.errors import ManifestError
from expertmesh.spec.deployment import DeploymentManifest
from expertmesh.spec.manifest import explain, refuse
from expertmesh.spec.model_config import read_moe_shape
from expertmesh.spec.platform import PlatformManifest

_KINDS: dict[str, type[DeploymentManifest] | type[PlatformManifest]] = {
    "ModelDeployment": DeploymentManifest,
    "Platform": PlatformManifest,
}


@dataclass(frozen=True, slots=True)
class System:
    """One platform and the model deployments it serves, checked together."""

    platform: PlatformManifest
    pools: tuple[Pool, ...]
    models: tuple[ModelDeployment, ...]


def load_system(files: list[Path]) -> System:
    """Raises ManifestError, with one line per problem, when anything does not fit."""
    platforms: list[tuple[Path, PlatformManifest]] = []
    deployments: list[tuple[Path, DeploymentManifest]] = []
    problems: list[str] = []
    for file in files:
        try:
            for manifest in read_manifests(file):
                if isinstance(manifest, PlatformManifest):
                    platforms.append((file, manifest))
                else:
                    deployments.append((file, manifest))
        except ManifestError as error:
            problems.append(str(error))
    if problems:
        raise ManifestError("\n".join(problems))
    if len(platforms) != 1:
        names = ", ".join(str(file) for file in files)
        raise ManifestError(
            f"{names}: kind: expected exactly one Platform manifest, found {len(platforms)}; "
            "pass one, for example deployments/local.yaml"
        )
    if not deployments:
        raise ManifestError(
            f"{platforms[0][0]}: kind: no ModelDeployment manifest was given; "
            "add one with -f, for example deployments/tiny-moe.yaml"
        )
    platform = platforms[0][1]
    pools = tuple(pool.to_core() for pool in platform.pools)
    seen: dict[str, Path] = {}
    models: list[ModelDeployment] = []
    for file, deployment in deployments:
        try:
            if deployment.name in seen:
                raise refuse(
                    str(file),
                    "name",
                    deployment.name,
                    f"is also the name of a model in {seen[deployment.name]}; rename one",
                )
            seen[deployment.name] = file
            models.append(_check_deployment(file, deployment, pools))
        except ManifestError as error:
            problems.append(str(error))
    if problems:
        raise ManifestError("\n".join(problems))
    return System(platform=platform, pools=pools, models=tuple(models))


def read_manifests(file: Path) -> list[DeploymentManifest | PlatformManifest]:
    """Every YAML document of the file, validated by its `kind`."""
    try:
        documents = list(yaml.safe_load_all(file.read_text()))
    except FileNotFoundError:
        raise ManifestError(f"{file}: no such file; check the path after -f") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ManifestError(f"{file}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ManifestError(f"{file}: is no YAML: {' '.join(str(error).split())}") from None
    documents = [document for document in documents if document is not None]
    if not documents:
        raise ManifestError(f"{file}: is empty; write a manifest with kind: ModelDeployment")
    return [_validate(str(file), document) for document in documents]


def _validate(file: str, document: Any) -> DeploymentManifest | PlatformManifest:
    if not isinstance(document, dict):
        raise ManifestError(
            f"{file}: holds a {type(document).__name__}; write a mapping with kind:"
        )
    kind = document.get("kind")
    model = _KINDS.get(kind) if isinstance(kind, str) else None
    if model is None:
        raise refuse(file, "kind", kind, f"unknown; write one of {', '.join(_KINDS)}")
    try:
        return model.model_validate(document)
    except ValidationError as error:
        raise explain(file, model, error) from None


def _check_deployment(
    file: Path, deployment: DeploymentManifest, pools: tuple[Pool, ...]
) -> ModelDeployment:
    name = str(file)
    known = {pool.name: pool for pool in pools}
    for index, pool_name in enumerate(deployment.pools):
        if pool_name not in known:
            raise refuse(
                name,
                f"pools.{index}",
                pool_name,
                f"no such pool; the platform has {', '.join(known)}",
            )
    local = deployment.local_source(file.parent)
    shape = None
    if local is not None:
        shape = read_moe_shape(local, file=name, field="model.source")
        expert = deployment.parallelism.expert
        if shape.experts % expert:
            fitting = [n for n in range(1, shape.experts + 1) if shape.experts % n == 0]
            raise refuse(
                name,
                "parallelism.expert",
                expert,
                f"does not divide the model's {shape.experts} experts; "
                f"write one of {', '.join(map(str, fitting))}",
            )
        longest = shape.max_position_embeddings
        if longest and deployment.model.max_model_len > longest:
            raise refuse(
                name,
                "model.max_model_len",
                deployment.model.max_model_len,
                f"is above the model's own limit; write at most {longest}",
            )
    workers = deployment.parallelism.expert
    for index, pool_name in enumerate(deployment.pools):
        pool = known[pool_name]
        room = pool.workers_per_node * pool.max_nodes
        if workers > room:
            raise refuse(
                name,
                f"pools.{index}",
                pool_name,
                f"holds at most {room} workers, a group needs {workers}; "
                "raise the pool's nodes.max or lower parallelism.expert",
            )
    return deployment.to_core(file.parent, shape)
