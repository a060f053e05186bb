"""Load manifests from YAML and check them against one another, before anything starts."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from expertmesh.core.domain.deployment import ModelDeployment
from expertmesh.core.domain.fleet import ExternalRoute
from expertmesh.core.domain.hardware import Pool
from expertmesh.core.domain.model_shape import ModelShape
from expertmesh.errors import ManifestError
from expertmesh.spec.deployment import DeploymentManifest, ParallelismManifest
from expertmesh.spec.manifest import explain, refuse
from expertmesh.spec.model_config import read_folder
from expertmesh.spec.platform import PlatformManifest, PoolManifest

_KINDS: dict[str, type[DeploymentManifest] | type[PlatformManifest]] = {
    "ModelDeployment": DeploymentManifest,
    "Platform": PlatformManifest,
}


@dataclass(frozen=True, slots=True)
class System:
    """One platform and the model deployments it serves, checked together."""

    platform: PlatformManifest
    platform_file: Path
    pools: tuple[Pool, ...]
    """Those with nodes; an external pool is only in the routes of the models that may use it."""
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
    platform_file, platform = platforms[0]
    problems += _name_clashes(deployments)
    models: list[ModelDeployment] = []
    for file, deployment in deployments:
        try:
            models.append(_check_deployment(file, deployment, platform.pools))
        except ManifestError as error:
            problems.append(str(error))
    if problems:
        raise ManifestError("\n".join(problems))
    return System(
        platform=platform,
        platform_file=platform_file,
        pools=tuple(pool.to_core() for pool in platform.pools if not pool.is_external),
        models=tuple(models),
    )


def load_platform(file: Path) -> PlatformManifest:
    """The one Platform manifest of the file, which may hold others. Raises ManifestError."""
    found = [m for m in read_manifests(file) if isinstance(m, PlatformManifest)]
    if len(found) != 1:
        raise ManifestError(
            f"{file}: kind: expected exactly one Platform manifest, found {len(found)}; "
            "name the platform file, for example deployments/local.yaml"
        )
    return found[0]


def _name_clashes(deployments: list[tuple[Path, DeploymentManifest]]) -> list[str]:
    """A client's word for a model must mean one model."""
    problems: list[str] = []
    taken: dict[str, str] = {}

    def take(file: Path, field: str, name: str, what: str) -> None:
        if name in taken:
            remedy = f"is also the {taken[name]}; rename one"
            problems.append(str(refuse(str(file), field, name, remedy)))
        else:
            taken[name] = f"{what} in {file}"

    for file, deployment in deployments:
        take(file, "name", deployment.name, "name of a model")
    for file, deployment in deployments:
        for index, alias in enumerate(deployment.aliases):
            take(file, f"aliases.{index}", alias, "alias of a model")
    return problems


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
    file: Path, deployment: DeploymentManifest, pools: tuple[PoolManifest, ...]
) -> ModelDeployment:
    name = str(file)
    known = {pool.name: pool.to_core() for pool in pools if not pool.is_external}
    providers = {pool.name: pool for pool in pools if pool.is_external}
    for index, pool_name in enumerate(deployment.pools):
        if pool_name in providers:
            raise refuse(
                name,
                f"pools.{index}",
                pool_name,
                "is an external pool, which holds no groups; put it under external",
            )
        if pool_name not in known:
            raise refuse(
                name,
                f"pools.{index}",
                pool_name,
                f"no such pool; the platform has {', '.join(known) or 'none with nodes'}",
            )
    routes = _external_routes(name, deployment, providers, known)
    local = deployment.local_source(file.parent)
    shape = None
    if local is not None:
        overrides = deployment.model.shape
        shape = read_folder(local, file=name, field="model.source", overrides=overrides)
        _check_experts(name, local, deployment.parallelism, shape)
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
    return deployment.to_core(file.parent, shape, routes)


def _check_experts(
    file: str, folder: Path, parallelism: ParallelismManifest, shape: ModelShape
) -> None:
    expert = parallelism.expert
    if shape.experts is None:
        if expert > 1:
            raise refuse(
                file,
                "model.source",
                str(folder / "config.json"),
                "describes no mixture of experts; choose a MoE model or write "
                "parallelism: {expert: 1}",
            )
        return
    count = shape.experts.count
    if count % expert:
        fitting = [n for n in range(1, count + 1) if count % n == 0]
        raise refuse(
            file,
            "parallelism.expert",
            expert,
            f"does not divide the model's {count} experts; "
            f"write one of {', '.join(map(str, fitting))}",
        )


def _external_routes(
    file: str,
    deployment: DeploymentManifest,
    providers: dict[str, PoolManifest],
    others: Collection[str],
) -> tuple[ExternalRoute, ...]:
    routes: list[ExternalRoute] = []
    for index, external in enumerate(deployment.external):
        field = f"external.{index}.pool"
        provider = providers.get(external.pool)
        if provider is None:
            remedy = (
                f"no such pool; the platform's external pools: {', '.join(providers) or 'none'}"
            )
            if external.pool in others:
                remedy = "is no external pool; put it under pools"
            raise refuse(file, field, external.pool, remedy)
        if any((known.pool, known.model) == (external.pool, external.model) for known in routes):
            remedy = f"is named twice for the model {external.model}; name it once"
            raise refuse(file, field, external.pool, remedy)
        routes.append(external.to_core(provider))
    return tuple(routes)
