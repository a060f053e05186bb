"""What one request consumed: the row of the ledger."""

from decimal import Decimal
from enum import StrEnum

import msgspec


class Outcome(StrEnum):
    OK = "ok"
    ERROR = "error"
    """The group failed; what it had produced until then is recorded."""
    ABORTED = "aborted"
    """The client went away."""


class UsageRecord(msgspec.Struct, frozen=True, gc=False):
    request_id: str
    """Unique; the ledger takes the first record of an id and ignores repetitions."""
    at_s: float
    """Unix time at which the request was accepted."""
    tenant: str
    key_id: str
    model: str
    group: str
    pool: str
    endpoint: str
    outcome: Outcome
    prompt_tokens: int
    cached_tokens: int
    """Part of prompt_tokens that the engine took from its prefix cache."""
    completion_tokens: int
    queue_s: float
    ttft_s: float | None
    """Accepted to first body byte; None when no byte came."""
    duration_s: float
    tariff_usd: Decimal

    @property
    def finished_at_s(self) -> float:
        return self.at_s + self.duration_s
