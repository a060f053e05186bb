"""Who sends traffic, what each may use, and what a key proves about a request."""

from dataclasses import dataclass
from enum import StrEnum


class Priority(StrEnum):
    """Served in this order; within one of them tenants share fairly."""

    INTERACTIVE = "interactive"
    STANDARD = "standard"
    BATCH = "batch"


@dataclass(frozen=True, slots=True)
class Limits:
    """None means without limit."""

    requests_per_min: int | None = None
    tokens_per_min: int | None = None
    """Prompt and completion tokens together."""
    concurrent_requests: int | None = None
    usd_per_day: float | None = None
    """UTC days, at the tariff; read through its shortest decimal form, so 0.3 is exactly 0.3."""
    usd_per_month: float | None = None

    @property
    def none(self) -> bool:
        return self == Limits()


@dataclass(frozen=True, slots=True)
class Tenant:
    name: str
    priority: Priority = Priority.STANDARD
    weight: float = 1.0
    """Share of the tokens among waiting tenants of one priority, in proportion."""
    limits: Limits = Limits()


@dataclass(frozen=True, slots=True)
class Account:
    """What limits are counted against: a tenant, or one of its keys."""

    name: str
    """`tenant:<name>` or `key:<id>`."""
    limits: Limits


@dataclass(frozen=True, slots=True)
class Caller:
    """All that a valid key says about a request."""

    key_id: str
    tenant: str
    priority: Priority = Priority.STANDARD
    weight: float = 1.0
    models: frozenset[str] | None = None
    """Names of models that the key may use; None for all."""
    admin: bool = False
    """The key opens the admin API, and only that."""
    expires_at_s: float | None = None
    accounts: tuple[Account, ...] = ()
    """Those of the tenant and of the key that have limits; all of them must have room."""

    def may_use(self, model: str) -> bool:
        return self.models is None or model in self.models
