"""The manifest of one model deployment."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    TypeAdapter,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
    model_validator,
)

from expertmesh.core.domain.deployment import (
    ModelDeployment,
    ScalingMode,
    ScalingRules,
    Tariff,
)
from expertmesh.core.domain.fleet import ExternalRoute, ExternalUse, Parallelism
from expertmesh.core.domain.model_shape import ModelShape
from expertmesh.core.domain.slo import Slo
from expertmesh.core.perf.layout import Layout
from expertmesh.spec.group_options import IN_FLIGHT, Chosen
from expertmesh.spec.manifest import ManifestModel
from expertmesh.spec.platform import Name, PoolManifest

Alias = Annotated[
    str, Field(pattern=r"^[A-Za-z0-9]([A-Za-z0-9._:/@-]*[A-Za-z0-9])?$", max_length=120)
]
Usd = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]

_NO_GROUPS = Parallelism(tensor=1, data=1, expert=1)


class ModelSource(ManifestModel):
    source: Annotated[str, Field(min_length=1)] | None = None
    """A folder (absolute, or relative to the manifest when it starts with a dot) or an HF id; left
    out only for a model that others serve."""
    revision: str = "main"
    max_model_len: Annotated[int, Field(ge=16)]
    shape: Annotated[dict[str, Any], Field(default_factory=dict)]
    """Keys of config.json to read otherwise, and `read_as: <architecture>` for one not known."""


class ParallelismManifest(ManifestModel):
    expert: Annotated[int, Field(ge=1)]
    """Workers that share the experts of one group; 1 when each rank has them all, or a share cut
    out of each of them."""
    tensor: Annotated[int, Field(ge=1)] = 1
    """Workers of one rank."""
    data: Annotated[int | None, Field(ge=1)] = None
    """Ranks of a group; by default expert / tensor, or 1 with expert: 1."""
    redundant_experts: Annotated[int, Field(ge=0)] = 0
    """Copies of busy experts, over all workers of a group."""

    @model_validator(mode="after")
    def _whole_ranks(self) -> "ParallelismManifest":
        if self.expert > 1 and self.expert % self.tensor:
            raise ValueError(
                f"expert {self.expert} is no multiple of tensor {self.tensor}; "
                "a rank needs `tensor` workers"
            )
        if self.expert > 1 and self.data not in (None, self.expert // self.tensor):
            raise ValueError(
                f"expert {self.expert} is not tensor {self.tensor} x data {self.data}; "
                "experts lie over all workers of a group, so leave data out"
            )
        if self.expert == 1 and self.redundant_experts:
            raise ValueError("redundant_experts need expert above 1; remove them")
        return self

    def to_core(self) -> Layout:
        if self.expert == 1:
            return Layout(tensor=self.tensor, data=self.data or 1)
        data = self.expert // self.tensor
        return Layout(self.tensor, data, self.expert, self.redundant_experts)


Sizes = Annotated[tuple[ParallelismManifest, ...], Field(min_length=1, max_length=6)]
_SIZES: TypeAdapter[tuple[ParallelismManifest, ...]] = TypeAdapter(Sizes)


def _sizes_or_auto(value: Any, _: ValidatorFunctionWrapHandler) -> Any:
    """A union would name each mistake twice, once for each of its kinds."""
    if value == "auto" or isinstance(value, ParallelismManifest):
        return value
    if isinstance(value, list | tuple):
        sizes = _SIZES.validate_python(value)
        layouts = [(size.expert, size.tensor, size.data) for size in sizes]
        if len(set(layouts)) < len(layouts):
            raise ValueError("a size is there twice; write each once")
        return sizes
    if not isinstance(value, dict):
        raise ValueError("write auto, sizes as in {expert: 16, tensor: 1}, or a list of such sizes")
    return ParallelismManifest.model_validate(value)


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
    """One of both bounds at least."""

    usd_per_hour: Annotated[float | None, Field(gt=0, allow_inf_nan=False)] = None
    """Most that all groups of the model may cost together."""
    usd_per_day: Annotated[float | None, Field(gt=0, allow_inf_nan=False)] = None
    """The same from one midnight (UTC) to the next."""

    @model_validator(mode="after")
    def _bounds_something(self) -> "Budget":
        if self.usd_per_hour is None and self.usd_per_day is None:
            raise ValueError("write usd_per_hour, usd_per_day or both, or remove budget")
        return self


class Scaling(ManifestModel):
    groups: GroupBounds = GroupBounds()
    slo: SloManifest = SloManifest()
    max_wait_s: Seconds = 30.0
    """Longest time a request may wait for a group."""
    budget: Budget | None = None
    target_in_flight_per_group: Annotated[float | None, Field(gt=0)] = None
    """Requests that one group should carry; by default the users of the plan, or 16 without one."""
    up_delay_s: Seconds = 5.0
    down_delay_s: Seconds | None = None
    """By default as long as starting the group again would take."""
    drain_deadline_s: Seconds = 120.0
    start_deadline_s: Annotated[float | None, Field(gt=0, allow_inf_nan=False)] = None
    """A group that is not ready by then is given up and started anew, elsewhere if it can be; by
    default 15 minutes, or four times as long as planned where that is more."""
    mode: ScalingMode = ScalingMode.ACT
    priority: Annotated[int, Field(ge=-1000, le=1000)] = 0
    """Where models compete for a pool or a budget, the higher one is served first."""


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
    parallelism: Annotated[
        ParallelismManifest | Sizes | Literal["auto"], WrapValidator(_sizes_or_auto)
    ] = "auto"
    """`auto`: what the planner finds for each pool; without GPUs, up to two ranks. Of several sizes
    the controller chooses."""
    pools: tuple[Name, ...] = ()
    """Where groups of the model may run; none for a model that only external providers serve."""
    scaling: Scaling = Scaling()
    engine: Annotated[dict[str, Any], Field(default_factory=dict)]
    """Passed to vLLM as engine arguments."""
    tariff: TariffManifest = TariffManifest()
    aliases: tuple[Alias, ...] = ()
    """Other names that clients may use for the model."""
    external: tuple[ExternalManifest, ...] = ()
    """Providers that may serve it too; of several the cheapest is asked."""

    @model_validator(mode="after")
    def _pools_once(self) -> "DeploymentManifest":
        if len(set(self.pools)) < len(self.pools):
            raise ValueError("pools: a pool is named twice; name each once")
        return self

    @model_validator(mode="after")
    def _served_by_somebody(self) -> "DeploymentManifest":
        if self.pools and self.model.source is None:
            raise ValueError("model.source: missing; name the model's folder or Hugging Face id")
        if self.pools:
            return self
        if not self.external:
            raise ValueError("pools: none; name a pool, or a provider under external")
        ours = {"parallelism", "engine"} & self.model_fields_set
        if self.model.source is not None or ours or "groups" in self.scaling.model_fields_set:
            raise ValueError(
                "pools: none, so no group of this model runs here; remove model.source, "
                "parallelism, engine and scaling.groups, or name a pool"
            )
        return self

    def local_source(self, folder: Path) -> Path | None:
        """The model's folder, or None when the source is a Hugging Face id."""
        source = self.model.source or ""
        if source.startswith("."):
            return (folder / source).resolve()
        return Path(source) if source.startswith("/") else None

    @property
    def sizes(self) -> tuple[ParallelismManifest, ...]:
        """Those that it gives; none with `auto`."""
        if isinstance(self.parallelism, ParallelismManifest):
            return (self.parallelism,)
        return self.parallelism if isinstance(self.parallelism, tuple) else ()

    def engine_arguments(self, folder: Path) -> dict[str, Any]:
        engine = dict(self.engine)
        if self.local_source(folder) is None and self.model.revision != "main":
            # Weights, tokenizer and code of one commit.
            for part in ("revision", "tokenizer_revision", "code_revision"):
                engine.setdefault(part, self.model.revision)
        return engine

    def slo(self) -> Slo:
        slo = self.scaling.slo
        return Slo(ttft_s=slo.ttft_s, tpot_s=slo.tpot_s, attainment=slo.attainment)

    def to_core(
        self,
        folder: Path,
        shape: ModelShape | None,
        chosen: Chosen,
        external: tuple[ExternalRoute, ...] = (),
    ) -> ModelDeployment:
        """`chosen` is what `parallelism` comes to."""
        local = self.local_source(folder)
        scaling, budget = self.scaling, self.scaling.budget
        first = chosen.options[0] if chosen.options else None
        return ModelDeployment(
            name=self.name,
            source=str(local) if local else self.model.source or "",
            revision=self.model.revision,
            shape=shape,
            max_model_len=self.model.max_model_len,
            parallelism=first.parallelism if first else _NO_GROUPS,
            pools=self.pools,
            scaling=ScalingRules(
                min_groups=scaling.groups.min if self.pools else 0,
                max_groups=scaling.groups.max if self.pools else 0,
                target_in_flight_per_group=first.rates.in_flight if first else IN_FLIGHT,
                up_delay_s=scaling.up_delay_s,
                down_delay_s=scaling.down_delay_s,
                drain_deadline_s=scaling.drain_deadline_s,
                start_deadline_s=scaling.start_deadline_s,
                usd_per_hour_budget=budget.usd_per_hour if budget else None,
                usd_per_day_budget=budget.usd_per_day if budget else None,
                mode=scaling.mode,
                priority=scaling.priority,
            ),
            slo=self.slo(),
            max_wait_s=scaling.max_wait_s,
            tariff=Tariff(
                usd_per_mtok_in=self.tariff.usd_per_mtok_in,
                usd_per_mtok_cached=self.tariff.usd_per_mtok_cached,
                usd_per_mtok_out=self.tariff.usd_per_mtok_out,
            ),
            engine=first.engine if first else {},
            aliases=self.aliases,
            external=external,
            options=chosen.options,
        )
