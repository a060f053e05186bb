"""From manifests to what the scaling core and the gateways need of them."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from expertmesh.core.domain.accelerator import Accelerator
from expertmesh.core.domain.deployment import ModelDeployment, ScalingRules
from expertmesh.core.domain.fleet import ServedModel
from expertmesh.core.domain.hardware import Pool
from expertmesh.core.scaling.contract import ScalingConfig, Timing

_RETIRED_DRAIN_DEADLINE_S = 120.0


@dataclass(frozen=True, slots=True)
class Shared:
    """What the models have in common."""

    pools: tuple[Pool, ...] = ()
    """Those with nodes."""
    usd_per_hour_budget: float | None = None
    """Of all models together."""
    accelerators: Mapping[str, Accelerator] = field(default_factory=dict)
    """By name and alias."""


def scaling_config(
    deployment: ModelDeployment, pools: tuple[Pool, ...], timing: Timing
) -> ScalingConfig:
    return ScalingConfig(
        model=deployment.name,
        source=deployment.source,
        max_model_len=deployment.max_model_len,
        rules=deployment.scaling,
        pools=tuple(pool for pool in pools if pool.name in deployment.pools),
        options=deployment.options,
        timing=timing,
        slo=deployment.slo,
        max_wait_s=deployment.max_wait_s,
        external=deployment.external,
    )


def retired_config(model: str, timing: Timing) -> ScalingConfig:
    """For groups of a model that is in no manifest any more: drain them all."""
    return ScalingConfig(
        model=model,
        source="",
        max_model_len=0,
        rules=ScalingRules(
            min_groups=0,
            max_groups=0,
            target_in_flight_per_group=1.0,
            up_delay_s=0.0,
            down_delay_s=0.0,
            drain_deadline_s=_RETIRED_DRAIN_DEADLINE_S,
            usd_per_hour_budget=None,
        ),
        pools=(),
        options=(),
        timing=timing,
    )


def served_model(deployment: ModelDeployment) -> ServedModel:
    return ServedModel(
        name=deployment.name,
        max_model_len=deployment.max_model_len,
        usd_per_mtok_in=deployment.tariff.usd_per_mtok_in,
        usd_per_mtok_cached=deployment.tariff.usd_per_mtok_cached,
        usd_per_mtok_out=deployment.tariff.usd_per_mtok_out,
        max_wait_s=deployment.max_wait_s,
        aliases=deployment.aliases,
        external=deployment.external,
        slo=deployment.slo,
    )
