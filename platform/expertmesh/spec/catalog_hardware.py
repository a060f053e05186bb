"""GPUs and dated prices that ship with ExpertMesh."""

import datetime
import functools
from collections.abc import Mapping
from importlib import resources
from types import MappingProxyType
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import Field, ValidationError, model_validator

from expertmesh.core.domain.accelerator import Accelerator, Era, Price, PriceMarket
from expertmesh.core.domain.model_shape import Dtype
from expertmesh.errors import ManifestError
from expertmesh.spec.manifest import ManifestModel, explain, refuse

_Model = TypeVar("_Model", bound=ManifestModel)
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class AcceleratorManifest(ManifestModel):
    name: Annotated[str, Field(min_length=1)]
    aliases: tuple[str, ...] = ()
    era: Era
    memory_gib: _Positive
    memory_gb_per_s: _Positive
    tflops: Annotated[dict[Dtype, _Positive], Field(min_length=1)]
    weights_only: tuple[Dtype, ...] = ()
    link_gb_per_s: _NotNegative = 0.0
    link_domain: Annotated[int, Field(ge=1)] = 1
    nic_gb_per_s: _NotNegative = 0.0
    tdp_watts: _NotNegative = 0.0
    all_in_watts: _Positive | None = None
    source: Annotated[str, Field(min_length=1)]

    @model_validator(mode="after")
    def _all_in_is_more(self) -> "AcceleratorManifest":
        if self.all_in_watts is not None and self.all_in_watts < self.tdp_watts:
            raise ValueError(f"all_in_watts is below tdp_watts {self.tdp_watts:g}; it includes it")
        return self

    def to_core(self) -> Accelerator:
        return Accelerator(
            name=self.name,
            era=self.era,
            memory_bytes=int(self.memory_gib * 2**30),
            memory_bytes_per_s=self.memory_gb_per_s * 1e9,
            flops_per_s={dtype: tflops * 1e12 for dtype, tflops in self.tflops.items()},
            link_bytes_per_s=self.link_gb_per_s * 1e9,
            link_domain=self.link_domain,
            nic_bytes_per_s=self.nic_gb_per_s * 1e9,
            tdp_watts=self.tdp_watts,
            all_in_watts=self.all_in_watts,
            source=self.source,
            weights_only=frozenset(self.weights_only),
            aliases=self.aliases,
        )


class PriceManifest(ManifestModel):
    """Of one GPU for an hour."""

    accelerator: Annotated[str, Field(min_length=1)]
    usd_per_hour: _NotNegative
    market: PriceMarket
    provider: Annotated[str, Field(min_length=1)]
    dated: datetime.date
    source: Annotated[str, Field(min_length=1)]

    def to_core(self) -> Price:
        day = datetime.datetime.combine(self.dated, datetime.time(), datetime.UTC)
        return Price(
            accelerator=self.accelerator,
            usd_per_hour=self.usd_per_hour,
            market=self.market,
            provider=self.provider,
            dated_s=day.timestamp(),
            source=self.source,
        )


class _Accelerators(ManifestModel):
    accelerators: tuple[AcceleratorManifest, ...]


class _Prices(ManifestModel):
    prices: tuple[PriceManifest, ...]


def read_accelerators(text: str, file: str) -> Mapping[str, Accelerator]:
    """Names and aliases to GPUs. Raises ManifestError with one line a problem."""
    found: dict[str, Accelerator] = {}
    for manifest in _validated(text, file, _Accelerators).accelerators:
        accelerator = manifest.to_core()
        for name in (accelerator.name, *accelerator.aliases):
            if name in found:
                raise refuse(file, "accelerators", name, "is named twice; name it once")
            found[name] = accelerator
    return MappingProxyType(found)


def read_prices(text: str, file: str, known: Mapping[str, Accelerator]) -> tuple[Price, ...]:
    """Raises ManifestError with one line a problem; a price must be of a known GPU."""
    prices = _validated(text, file, _Prices).prices
    for index, price in enumerate(prices):
        if price.accelerator not in known:
            raise refuse(
                file,
                f"prices.{index}.accelerator",
                price.accelerator,
                f"no such GPU; known: {', '.join(sorted(known))}",
            )
    return tuple(price.to_core() for price in prices)


@functools.cache
def accelerators() -> Mapping[str, Accelerator]:
    """The catalogue's GPUs by name and alias."""
    return read_accelerators(*_shipped("accelerators.yaml"))


@functools.cache
def prices() -> tuple[Price, ...]:
    """The catalogue's prices."""
    return read_prices(*_shipped("prices.yaml"), accelerators())


def _shipped(name: str) -> tuple[str, str]:
    file = resources.files("expertmesh") / "catalog" / name
    return file.read_text(encoding="utf-8"), f"catalog/{name}"


def _validated(text: str, file: str, model: type[_Model]) -> _Model:
    try:
        content: Any = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ManifestError(f"{file}: is no YAML: {' '.join(str(error).split())}") from None
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise explain(file, model, error) from None
