"""The platform file: pools with prices, and the addresses of the local processes."""

import ipaddress
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, ValidationInfo, field_validator, model_validator

from expertmesh.core.domain.hardware import Market, Pool
from expertmesh.spec.catalog_hardware import PriceManifest
from expertmesh.spec.gateway import GatewayManifest, Listener, VariableName
from expertmesh.spec.manifest import ManifestModel

Name = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$", max_length=40)]


class Nodes(ManifestModel):
    min: Annotated[int, Field(ge=0)] = 0
    max: Annotated[int, Field(ge=1)] = 1

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min {self.min} is above max {self.max}")
        return self


class PoolManifest(ManifestModel):
    """Nodes with a price an hour or, with `market: external`, a provider with a price a token."""

    name: Name
    market: Market
    usd_per_node_hour: Annotated[
        Annotated[float, Field(ge=0, allow_inf_nan=False)] | None, Field(validate_default=True)
    ] = None
    accelerator: str | None = None
    accelerators_per_node: Annotated[int, Field(ge=0)] = 0
    cpus_per_node: Annotated[int, Field(ge=1)] = 1
    nodes: Nodes = Nodes()
    zone: Annotated[str | None, Field(min_length=1, max_length=100)] = None
    """Where its nodes are: spot nodes of one zone are lost together. By default a zone of its
    own."""
    base_url: Annotated[str | None, Field(validate_default=True)] = None
    """Of an external pool: an OpenAI-compatible API; the gateway appends `/v1/...`."""
    key_variable: Annotated[VariableName | None, Field(validate_default=True)] = None
    """Of an external pool: environment variable of the gateway that holds the provider's key."""

    @field_validator("usd_per_node_hour")
    @classmethod
    def _priced(cls, price: float | None, info: ValidationInfo) -> float | None:
        market = info.data.get("market")
        if market is Market.EXTERNAL and price is not None:
            raise ValueError(
                "an external pool is priced per token; remove this key, and write the tariff "
                "under external in the model's manifest"
            )
        if market not in (Market.EXTERNAL, None) and price is None:
            raise ValueError("missing; write what a node of the pool costs an hour")
        return price

    @field_validator("accelerator", "accelerators_per_node", "cpus_per_node", "nodes", "zone")
    @classmethod
    def _nodes_of_ours(cls, value: object, info: ValidationInfo) -> object:
        """Runs only for keys that are written."""
        if info.data.get("market") is Market.EXTERNAL:
            raise ValueError("an external pool has no nodes of ours; remove this key")
        return value

    @field_validator("base_url", "key_variable")
    @classmethod
    def _of_a_provider(cls, value: str | None, info: ValidationInfo) -> str | None:
        market = info.data.get("market")
        if market is Market.EXTERNAL and value is None:
            what = {
                "base_url": "the provider's URL, for example https://api.example.com",
                "key_variable": "the variable of the gateway that holds the provider's key",
            }
            raise ValueError(f"missing in an external pool; write {what[str(info.field_name)]}")
        if market not in (Market.EXTERNAL, None) and value is not None:
            raise ValueError("is for pools with market: external; write that, or remove this key")
        return value

    @field_validator("base_url")
    @classmethod
    def _safe_url(cls, url: str | None) -> str | None:
        if url is None:
            return None
        parts = urlsplit(url)
        unreadable = any(character.isspace() for character in url) or parts.port == 0
        if parts.scheme not in ("https", "http") or not parts.hostname or unreadable:
            raise ValueError("is no URL; write https://<host>")
        if parts.scheme == "http" and not _is_loopback(parts.hostname):
            raise ValueError("would send the key in the clear; write https://")
        if parts.username is not None or parts.query or parts.fragment:
            raise ValueError("write only scheme, host, port and path, and no password")
        path = parts.path.rstrip("/")
        if path.endswith("/v1"):
            raise ValueError("the gateway appends /v1/...; write the URL without /v1")
        return f"{parts.scheme}://{parts.netloc}{path}"

    @model_validator(mode="after")
    def _accelerators_counted(self) -> Self:
        if self.accelerator and not self.accelerators_per_node:
            raise ValueError("accelerator is set, so accelerators_per_node must be at least 1")
        return self

    @property
    def is_external(self) -> bool:
        return self.market is Market.EXTERNAL

    def to_core(self) -> Pool:
        """For a pool with nodes."""
        assert self.usd_per_node_hour is not None, f"pool {self.name} is external"
        return Pool(
            name=self.name,
            market=self.market,
            usd_per_node_hour=self.usd_per_node_hour,
            accelerator=self.accelerator,
            accelerators_per_node=self.accelerators_per_node,
            cpus_per_node=self.cpus_per_node,
            min_nodes=self.nodes.min,
            max_nodes=self.nodes.max,
            zone=self.zone,
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class PlatformBudget(ManifestModel):
    usd_per_hour: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    """Most that the groups of all models may cost together."""


class PlatformManifest(ManifestModel):
    kind: Literal["Platform"]
    name: Name
    pools: Annotated[tuple[PoolManifest, ...], Field(min_length=1)]
    gateway: GatewayManifest = GatewayManifest(port=8080)
    controller: Listener = Listener(port=8090)
    ray_dashboard_port: Annotated[int, Field(ge=1, le=65535)] = 8265
    prices: tuple[PriceManifest, ...] = ()
    """Of GPUs for planning, in place of the catalogue's for the same GPU and market."""
    budget: PlatformBudget | None = None
    store_url: str | None = None
    """SQLAlchemy URL; by default SQLite in the state directory."""

    @model_validator(mode="after")
    def _unique(self) -> Self:
        names = [pool.name for pool in self.pools]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"pools named twice: {', '.join(twice)}; give each its own name")
        ports = [self.gateway.port, self.controller.port, self.ray_dashboard_port]
        if len(set(ports)) < len(ports):
            raise ValueError("gateway, controller and ray_dashboard_port need different ports")
        return self
