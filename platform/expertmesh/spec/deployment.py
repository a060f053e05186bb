"""The manifest of one model deployment."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from expertmesh.core.domain.deployment import ModelDeployment, ScalingRules, Tariff
from expertmesh.core.domain.fleet import ExternalRoute, ExternalUse, Parallelism
from expertmesh.core.domain.model_shape import ModelShape
from expertmesh.core.domain.slo import Slo
from expertmesh.spec.manifest import ManifestModel
from expertmesh.spec.platform import Name, PoolManifest

Alias = Annotated[
    str, Field(pattern=r"^[A-Za-z0-9]([A-Za-z0-9._:/@-]*[A-Za-z0-9])?$", max_length=120)
]
Usd = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class ModelSource(ManifestModel):
    source: Annotated[str, Field(min_length=1)]
    """A folder (absolute, or relative to the manifest when it starts with a dot) or an HF id."""
    revision: str = "main"
    max_model_len: Annotated[int, Field(ge=16)]
    shape: Annotated[dict[str, Any], Field(default_factory=dict)]
    """Keys of config.json to read otherwise, and `read_as: <architecture>` for one not known."""


class ParallelismManifest(ManifestModel):
    expert: Annotated[int, Field(ge=1)]
    """Workers that share the experts of one group; the group has expert / tensor ranks."""
    tensor: Annotated[int, Field(ge=1)] = 1

    @model_validator(mode="after")
    def _whole_ranks(self) -> "ParallelismManifest":
        if self.expert % self.tensor:
            raise ValueError(
                f"expert {self.expert} is no multiple of tensor {self.tensor}; "
                "a rank needs `tensor` workers"
            )
        return self

    def to_core(self) -> Parallelism:
        return Parallelism(tensor=self.tensor, data=self.expert // self.tensor, expert=self.expert)


class GroupBounds(ManifestModel):
    min: Annotated[int, Field(ge=0)] = 0
    max: Annotated[int, Field(ge=1)] = 1

    @model_validator(mode="after")
    def _ordered(self) -> "GroupBounds":
        if self.min > self.max:
            raise ValueError(f"min {self.min} is above max {self.max}")
        return self


class SloManifest(ManifestModel):
    ttft_s: Annotated[float, Field(gt=0)] = 2.0
    tpot_s: Annotated[float, Field(gt=0)] = 0.05
    attainment: Annotated[float, Field(gt=0, le=1)] = 0.99


class Budget(ManifestModel):
    usd_per_hour: Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Scaling(ManifestModel):
    groups: GroupBounds = GroupBounds()
    slo: SloManifest = SloManifest()
    max_wait_s: Seconds = 30.0
    """Longest time a request may wait for a group."""
    budget: Budget | None = None
    target_in_flight_per_group: Annotated[float, Field(gt=0)] = 16.0
    up_delay_s: Seconds = 5.0
    down_delay_s: Seconds = 60.0
    drain_deadline_s: Seconds = 120.0


class TariffManifest(ManifestModel):
    usd_per_mtok_in: Usd = 0.0
    usd_per_mtok_cached: Usd = 0.0
    usd_per_mtok_out: Usd = 0.0


class ExternalTariff(ManifestModel):
    """What the provider takes."""

    usd_per_mtok_in: Usd
    usd_per_mtok_cached: Usd
    """As `usd_per_mtok_in` where the provider has no price of its own for cached tokens."""
    usd_per_mtok_out: Usd


class ExternalManifest(ManifestModel):
    pool: Name
    """A pool with `market: external`."""
    model: Annotated[str, Field(min_length=1, max_length=200)]
    """The provider's name for the model."""
    when: ExternalUse = ExternalUse.FALLBACK
    overflow_wait_s: Annotated[Seconds | None, Field(validate_default=True)] = None
    """Expected wait for a group from which requests go to the provider."""
    tariff: ExternalTariff

    @field_validator("overflow_wait_s")
    @classmethod
    def _for_overflow(cls, wait_s: float | None, info: ValidationInfo) -> float | None:
        if wait_s is not None and info.data.get("when") is ExternalUse.FALLBACK:
            raise ValueError("is for when: overflow; write that, or remove this key")
        return wait_s

    def to_core(self, pool: PoolManifest) -> ExternalRoute:
        assert pool.base_url and pool.key_variable, f"pool {pool.name} is not external"
        route = ExternalRoute(
            pool=self.pool,
            base_url=pool.base_url,
            model=self.model,
            key_variable=pool.key_variable,
            usd_per_mtok_in=self.tariff.usd_per_mtok_in,
            usd_per_mtok_cached=self.tariff.usd_per_mtok_cached,
            usd_per_mtok_out=self.tariff.usd_per_mtok_out,
            use=self.when,
        )
        if self.overflow_wait_s is None:
            return route
        return replace(route, overflow_wait_s=self.overflow_wait_s)


class DeploymentManifest(ManifestModel):
    kind: Literal["ModelDeployment"]
    name: Name
    model: ModelSource
    parallelism: ParallelismManifest
    pools: Annotated[tuple[Name, ...], Field(min_length=1)]
    scaling: Scaling = Scaling()
    engine: Annotated[dict[str, Any], Field(default_factory=dict)]
    """Passed to vLLM as engine arguments."""
    tariff: TariffManifest = TariffManifest()
    aliases: tuple[Alias, ...] = ()
    """Other names that clients may use for the model."""
    external: tuple[ExternalManifest, ...] = ()
    """Providers that may serve it too, in the order in which they are asked."""

    @model_validator(mode="after")
    def _pools_once(self) -> "DeploymentManifest":
        if len(set(self.pools)) < len(self.pools):
            raise ValueError("pools: a pool is named twice; name each once")
        return self

    def local_source(self, folder: Path) -> Path | None:
        """The model's folder, or None when the source is a Hugging Face id."""
        source = self.model.source
        if source.startswith("."):
            return (folder / source).resolve()
        return Path(source) if source.startswith("/") else None

    def to_core(
        self, folder: Path, shape: ModelShape | None, external: tuple[ExternalRoute, ...] = ()
    ) -> ModelDeployment:
        local = self.local_source(folder)
        scaling = self.scaling
        return ModelDeployment(
            name=self.name,
            source=str(local) if local else self.model.source,
            revision=self.model.revision,
            shape=shape,
            max_model_len=self.model.max_model_len,
            parallelism=self.parallelism.to_core(),
            pools=self.pools,
            scaling=ScalingRules(
                min_groups=scaling.groups.min,
                max_groups=scaling.groups.max,
                target_in_flight_per_group=scaling.target_in_flight_per_group,
                up_delay_s=scaling.up_delay_s,
                down_delay_s=scaling.down_delay_s,
                drain_deadline_s=scaling.drain_deadline_s,
                usd_per_hour_budget=scaling.budget.usd_per_hour if scaling.budget else None,
            ),
            slo=Slo(
                ttft_s=scaling.slo.ttft_s,
                tpot_s=scaling.slo.tpot_s,
                attainment=scaling.slo.attainment,
            ),
            max_wait_s=scaling.max_wait_s,
            tariff=Tariff(
                usd_per_mtok_in=self.tariff.usd_per_mtok_in,
                usd_per_mtok_cached=self.tariff.usd_per_mtok_cached,
                usd_per_mtok_out=self.tariff.usd_per_mtok_out,
            ),
            engine=dict(self.engine),
            aliases=self.aliases,
            external=external,
        )
