"""The platform file: pools with prices, and the addresses of the local processes."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from expertmesh.core.domain.hardware import Market, Pool
from expertmesh.spec.manifest import ManifestModel

Name = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$", max_length=40)]


class Nodes(ManifestModel):
    min: Annotated[int, Field(ge=0)] = 0
    max: Annotated[int, Field(ge=1)] = 1

    @model_validator(mode="after")
    def _ordered(self) -> "Nodes":
        if self.min > self.max:
            raise ValueError(f"min {self.min} is above max {self.max}")
        return self


class PoolManifest(ManifestModel):
    name: Name
    market: Market
    usd_per_node_hour: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    accelerator: str | None = None
    accelerators_per_node: Annotated[int, Field(ge=0)] = 0
    cpus_per_node: Annotated[int, Field(ge=1)] = 1
    nodes: Nodes = Nodes()

    @model_validator(mode="after")
    def _accelerators_counted(self) -> "PoolManifest":
        if self.accelerator and not self.accelerators_per_node:
            raise ValueError("accelerator is set, so accelerators_per_node must be at least 1")
        return self

    def to_core(self) -> Pool:
        return Pool(
            name=self.name,
            market=self.market,
            usd_per_node_hour=self.usd_per_node_hour,
            accelerator=self.accelerator,
            accelerators_per_node=self.accelerators_per_node,
            cpus_per_node=self.cpus_per_node,
            min_nodes=self.nodes.min,
            max_nodes=self.nodes.max,
        )


class Listener(ManifestModel):
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=1, le=65535)]


class PlatformManifest(ManifestModel):
    kind: Literal["Platform"]
    name: Name
    pools: Annotated[tuple[PoolManifest, ...], Field(min_length=1)]
    gateway: Listener = Listener(port=8080)
    controller: Listener = Listener(port=8090)
    ray_dashboard_port: Annotated[int, Field(ge=1, le=65535)] = 8265
    store_url: str | None = None
    """SQLAlchemy URL; by default SQLite in the state directory."""

    @model_validator(mode="after")
    def _unique(self) -> "PlatformManifest":
        names = [pool.name for pool in self.pools]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"pools named twice: {', '.join(twice)}; give each its own name")
        ports = [self.gateway.port, self.controller.port, self.ray_dashboard_port]
        if len(set(ports)) < len(ports):
            raise ValueError("gateway, controller and ray_dashboard_port need different ports")
        return self
