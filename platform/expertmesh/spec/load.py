"""Load manifests from YAML and check them against one another, before anything starts."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from expertmesh.core.domain.deployment import ModelDeployment
from expertmesh.core.domain.fleet import ExternalRoute
from expertmesh.core.domain.hardware import Pool
from expertmesh.core.domain.model_shape import ModelShape
from expertmesh.core.planner.candidates import movable_experts
from expertmesh.core.planner.engine_rules import broken_rules
from expertmesh.errors import ManifestError
from expertmesh.spec.auto_parallelism import choose
from expertmesh.spec.catalog import models as known_models
from expertmesh.spec.deployment import DeploymentManifest, ParallelismManifest
from expertmesh.spec.given_parallelism import given
from expertmesh.spec.group_options import Chosen, Wanted, engine_of
from expertmesh.spec.manifest import explain, refuse
from expertmesh.spec.model_config import read_folder
from expertmesh.spec.model_shape import read_shape
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
    chosen: Mapping[str, Chosen] = field(default_factory=dict)
    """By model with groups: what its `parallelism` came to."""

    @property
    def usd_per_hour_budget(self) -> float | None:
        """Of all models together."""
        budget = self.platform.budget
        return budget.usd_per_hour if budget else None


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
    chosen: dict[str, Chosen] = {}
    for file, deployment in deployments:
        try:
            model, choice = _check_deployment(file, deployment, platform.pools)
            models.append(model)
            if deployment.pools:
                chosen[model.name] = choice
        except ManifestError as error:
            problems.append(str(error))
    if problems:
        raise ManifestError("\n".join(problems))
    return System(
        platform=platform,
        platform_file=platform_file,
        pools=tuple(pool.to_core() for pool in platform.pools if not pool.is_external),
        models=tuple(models),
        chosen=chosen,
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
        raise ManifestError(f"{file}: no such file; check the path") from None
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
) -> tuple[ModelDeployment, Chosen]:
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
        for key, size in _named_sizes(deployment):
            _check_experts(name, key, local, size, shape)
        longest = shape.max_position_embeddings
        if longest and deployment.model.max_model_len > longest:
            raise refuse(
                name,
                "model.max_model_len",
                deployment.model.max_model_len,
                f"is above the model's own limit; write at most {longest}",
            )
    pools_used = tuple(known[pool] for pool in deployment.pools)
    if not deployment.pools:
        chosen = Chosen(())
    elif deployment.parallelism == "auto":
        chosen = _choose(file, deployment, shape, pools_used)
    else:
        _check_room(name, deployment, pools_used)
        layouts = [size.to_core() for size in deployment.sizes]
        known_shape = shape or _catalog_shape(deployment)
        chosen = given(_wanted(file, deployment), known_shape, pools_used, layouts)
    for plan in chosen.plans:
        layout, engine = plan.serving_group.layout, engine_of(plan, deployment.engine)
        for argument, value, remedy in broken_rules(
            engine, plan.checkpoint.shape, layout, plan.pool
        ):
            raise refuse(name, f"engine.{argument}", value, f"pool {plan.pool.name}: {remedy}")
    return deployment.to_core(file.parent, shape, chosen, routes), chosen


def _named_sizes(deployment: DeploymentManifest) -> list[tuple[str, ParallelismManifest]]:
    """With the field of each."""
    if isinstance(deployment.parallelism, ParallelismManifest):
        return [("parallelism", deployment.parallelism)]
    return [(f"parallelism.{index}", size) for index, size in enumerate(deployment.sizes)]


def _check_room(file: str, deployment: DeploymentManifest, pools: tuple[Pool, ...]) -> None:
    """Each pool has room for one of the sizes, and each size fits in one of the pools."""
    rooms = [pool.workers_per_node * pool.max_nodes for pool in pools]
    workers = {key: size.to_core().world_size for key, size in _named_sizes(deployment)}
    least = min(workers.values())
    for index, (pool, room) in enumerate(zip(pools, rooms, strict=True)):
        if least > room:
            raise refuse(
                file,
                f"pools.{index}",
                pool.name,
                f"holds at most {room} workers, a group needs {least}; "
                "raise the pool's nodes.max or lower parallelism.expert",
            )
    for key, needed in workers.items():
        if needed > max(rooms):
            raise refuse(
                file,
                key,
                needed,
                f"workers of a group, and the largest of its pools holds {max(rooms)}; "
                "raise a pool's nodes.max or remove this size",
            )


def _wanted(file: Path, deployment: DeploymentManifest) -> Wanted:
    budget = deployment.scaling.budget
    usd_per_hour = budget.usd_per_hour if budget else None
    return Wanted(
        source=deployment.model.source or "",
        max_model_len=deployment.model.max_model_len,
        slo=deployment.slo(),
        engine=deployment.engine_arguments(file.parent),
        usd_per_hour=inf if usd_per_hour is None else usd_per_hour,
        in_flight=deployment.scaling.target_in_flight_per_group,
    )


def _catalog_shape(deployment: DeploymentManifest) -> ModelShape | None:
    known = known_models().get(deployment.model.source or "")
    if known is None:
        return None
    overrides = deployment.model.shape
    return read_shape(known.config, overrides) if overrides else known.shape


def _choose(
    file: Path, deployment: DeploymentManifest, shape: ModelShape | None, pools: tuple[Pool, ...]
) -> Chosen:
    shape = shape or _catalog_shape(deployment)
    if shape is None:
        raise refuse(
            str(file),
            "parallelism",
            "auto",
            f"the catalogue has no {deployment.model.source}, so its shape is not known; use a "
            "local folder, or ask `expertmesh plan` and write what it says",
        )
    try:
        return choose(_wanted(file, deployment), shape, pools)
    except ManifestError as error:
        raise refuse(str(file), "parallelism", "auto", str(error)) from None


def _check_experts(
    file: str, field: str, folder: Path, parallelism: ParallelismManifest, shape: ModelShape
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
    count, redundant = shape.experts.count, parallelism.redundant_experts
    if redundant and (not movable_experts(shape) or (count + redundant) % expert):
        raise refuse(
            file,
            f"{field}.redundant_experts",
            redundant,
            f"{count} + {redundant} experts do not divide over {expert} workers; "
            f"write {redundant + -(count + redundant) % expert}"
            if movable_experts(shape)
            else "vLLM cannot copy experts of this model; remove the key",
        )
    if not redundant and count % expert:
        fitting = [n for n in range(1, count + 1) if count % n == 0]
        raise refuse(
            file,
            f"{field}.expert",
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
