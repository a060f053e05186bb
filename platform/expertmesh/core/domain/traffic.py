"""What gateways report to the controller, once a second per worker."""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class ModelTraffic:
    queued_requests: int = 0
    queued_tokens: int = 0
    """Prompt and maximum completion tokens of the queued requests, estimated."""
    oldest_wait_s: float = 0.0
    arrivals_total: int = 0
    """Requests accepted since the worker started."""
    wake_requests: int = 0
    """Requests now held because the model has no ready group."""


@dataclass(frozen=True, slots=True)
class GroupTraffic:
    in_flight: int = 0
    tokens_in_flight: int = 0
    requests_total: int = 0
    errors_total: int = 0
    """Refused connections, resets, stalls and 5xx answers since the worker started."""
    ttft_s_sum: float = 0.0
    """Times to first token, summed since the worker started, over `ttft_count` answers."""
    ttft_count: int = 0
    tpot_s_sum: float = 0.0
    """Times per further token, one a request, over `tpot_count` answers."""
    tpot_count: int = 0


@dataclass(frozen=True, slots=True)
class GatewayReport:
    gateway: str
    """Unique per worker process and start: `<host>-<pid>-<start time>`."""
    sent_at_s: float
    fleet_version: int = 0
    """Of the fleet that the worker had when it sent this; 0: none, or it does not say."""
    models: dict[str, ModelTraffic] = field(default_factory=dict)
    groups: dict[str, GroupTraffic] = field(default_factory=dict)
