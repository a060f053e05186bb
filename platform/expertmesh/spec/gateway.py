"""The gateway's part of the platform file."""

import re
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, ValidationInfo, field_validator

from expertmesh.core.domain.gateway import (
    AdmissionBounds,
    GatewayConfig,
    LimitSettings,
    LimitStore,
    WithoutStore,
)
from expertmesh.spec.manifest import ManifestModel

_VARIABLE = r"^[A-Za-z_][A-Za-z0-9_]*$"
_OWN_VARIABLES = ("EXPERTMESH_", "RAY_")


def _a_variable(name: str) -> str:
    if not re.fullmatch(_VARIABLE, name):
        raise ValueError(
            "is no name of an environment variable; write the name here, and the secret only "
            "into that variable"
        )
    if name.startswith(_OWN_VARIABLES):
        raise ValueError("belongs to this system itself; name a variable of its own")
    return name


VariableName = Annotated[
    str, AfterValidator(_a_variable), Field(json_schema_extra={"pattern": _VARIABLE})
]
"""Name of an environment variable of the gateway, never the secret itself."""


class Listener(ManifestModel):
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=1, le=65535)]


class LimitsManifest(ManifestModel):
    store: LimitStore = LimitStore.MEMORY
    redis_url_variable: Annotated[VariableName | None, Field(validate_default=True)] = None
    on_unavailable: WithoutStore = WithoutStore.CLOSED

    @field_validator("redis_url_variable")
    @classmethod
    def _for_redis(cls, variable: str | None, info: ValidationInfo) -> str | None:
        store = info.data.get("store")
        if store is LimitStore.REDIS and variable is None:
            raise ValueError("missing with store: redis; name the variable that holds its URL")
        if store is LimitStore.MEMORY and variable is not None:
            raise ValueError("is for store: redis; write that, or remove this key")
        return variable

    def to_core(self) -> LimitSettings:
        return LimitSettings(self.store, self.redis_url_variable, self.on_unavailable)


class AdmissionManifest(ManifestModel):
    queued_requests: Annotated[int, Field(ge=1, le=1_000_000)] = 1000
    """Requests that may wait in one worker."""
    wait_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Longest wait of any request, beside its model's `max_wait_s`."""

    def to_core(self) -> AdmissionBounds:
        return AdmissionBounds(self.queued_requests, self.wait_s)


class ExternalBounds(ManifestModel):
    concurrent_requests: Annotated[int, Field(ge=1, le=100_000)] = 100
    """Requests that one worker may have at external providers at once."""


def _origin(text: str) -> str:
    parts = urlsplit(text)
    if text != "*" and (
        parts.scheme not in ("http", "https")
        or not parts.netloc
        or text != f"{parts.scheme}://{parts.netloc}"
    ):
        raise ValueError(
            "is no origin; write scheme and host, for example https://chat.example.com"
        )
    return text


class GatewayManifest(Listener):
    workers: Annotated[int, Field(ge=1, le=64)] = 1
    """Processes that share the port; one for each core that the gateway may use."""
    limits: LimitsManifest = LimitsManifest()
    admission: AdmissionManifest = AdmissionManifest()
    external: ExternalBounds = ExternalBounds()
    cors_origins: tuple[Annotated[str, AfterValidator(_origin)], ...] = ()
    """Origins whose pages may call the gateway, or `*`."""

    def to_core(self) -> GatewayConfig:
        return GatewayConfig(
            host=self.host,
            port=self.port,
            workers=self.workers,
            limits=self.limits.to_core(),
            admission=self.admission.to_core(),
            cors_origins=self.cors_origins,
            external_requests=self.external.concurrent_requests,
        )
