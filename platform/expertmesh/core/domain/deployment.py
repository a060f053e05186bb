"""A model deployment: what the manifest says, as plain values."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from expertmesh.core.domain.fleet import ExternalRoute, Parallelism
from expertmesh.core.domain.model_shape import ModelShape
from expertmesh.core.domain.option import GroupOption
from expertmesh.core.domain.slo import Slo


class ScalingMode(StrEnum):
    """What the controller does with its decisions about a model."""

    OBSERVE = "observe"
    """Measures and forecasts only; groups are left as they are."""
    ADVISE = "advise"
    """Also says what it would do, and does not do it."""
    ACT = "act"


@dataclass(frozen=True, slots=True)
class ScalingRules:
    min_groups: int
    max_groups: int
    target_in_flight_per_group: float
    """Queued and running requests that one group should carry."""
    up_delay_s: float
    """A higher need must last this long before a group is added."""
    down_delay_s: float | None
    """A lower need must last this long before a group is drained; None: as long as starting it
    again would take."""
    drain_deadline_s: float
    """A draining group with requests in flight is removed after this long."""
    usd_per_hour_budget: float | None
    """Groups of this model may not cost more than this together."""
    usd_per_day_budget: float | None = None
    """Nor more than this from one midnight (UTC) to the next."""
    mode: ScalingMode = ScalingMode.ACT
    priority: int = 0
    """Where models compete for a pool or a budget, the higher one is served first."""
    start_deadline_s: float | None = None
    """A group that is not ready by then has failed to start; None: see `ScalingConfig`."""


@dataclass(frozen=True, slots=True)
class Tariff:
    usd_per_mtok_in: float
    usd_per_mtok_cached: float
    usd_per_mtok_out: float


@dataclass(frozen=True, slots=True)
class ModelDeployment:
    name: str
    source: str
    """Absolute local folder or Hugging Face id."""
    revision: str
    shape: ModelShape | None
    """None when the source is not a local folder: the engine will read it on its node."""
    max_model_len: int
    parallelism: Parallelism
    pools: tuple[str, ...]
    scaling: ScalingRules
    slo: Slo
    max_wait_s: float
    tariff: Tariff
    engine: dict[str, Any] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()
    """Other names that clients may use."""
    external: tuple[ExternalRoute, ...] = ()
    """Providers that may serve it, in the order in which they are asked."""
    options: tuple[GroupOption, ...] = ()
    """The ways to run a group of it; at least one for each of its pools."""
