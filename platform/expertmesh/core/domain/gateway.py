"""How the gateway is set up: what the platform manifest says, as plain values."""

from dataclasses import dataclass
from enum import StrEnum


class LimitStore(StrEnum):
    """Where the counts stand that tenants' limits are checked against."""

    MEMORY = "memory"
    """Of one gateway: its workers share them, other gateways do not."""
    REDIS = "redis"
    """Shared by all gateways."""


class WithoutStore(StrEnum):
    """What becomes of a request while the store of the counts does not answer."""

    OPEN = "open"
    """It is served, and not limited."""
    CLOSED = "closed"
    """It is refused when it has limits."""


@dataclass(frozen=True, slots=True)
class LimitSettings:
    store: LimitStore = LimitStore.MEMORY
    redis_url_variable: str | None = None
    """Environment variable of the gateway that holds the URL; set when the store is Redis."""
    on_unavailable: WithoutStore = WithoutStore.CLOSED


@dataclass(frozen=True, slots=True)
class AdmissionBounds:
    """Of one worker's queue."""

    queued_requests: int = 1000
    wait_s: float | None = None
    """Longest wait of a request; None: only as long as its model's `max_wait_s` says."""


@dataclass(frozen=True, slots=True)
class GatewayConfig:
    host: str
    port: int
    workers: int = 1
    """Processes that share the port."""
    limits: LimitSettings = LimitSettings()
    admission: AdmissionBounds = AdmissionBounds()
    cors_origins: tuple[str, ...] = ()
    """Origins whose pages may call the gateway, or `*`; none by default."""
    external_requests: int = 100
    """Requests that one worker may have at external providers at once."""
