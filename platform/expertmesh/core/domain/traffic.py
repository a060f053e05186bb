"""What gateways report to the controller, once a second per worker."""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class ModelTraffic:
    queued_requests: int = 0
    queued_tokens: int = 0
    """Prompt and maximum completion tokens of the queued requests, estimated."""
    queued_prompt_tokens: int = 0
    """The part of them that belongs to prompts."""
    oldest_wait_s: float = 0.0
    arrivals_total: int = 0
    """Requests that need an engine, whatever became of them, but not those that a tenant's limits
    refused. All totals count from the worker's start."""
    arrived_prompt_tokens_total: int = 0
    """Of the arrivals, estimated; cached ones included."""
    finished_total: int = 0
    """Requests that groups have answered, whole or in part. One whose client left before its answer
    told the tokens does not count, unless it streamed."""
    uncached_prompt_tokens_total: int = 0
    """Of the finished ones, as engines report them. Of a stream that broke off before its engine
    did, the whole prompt as estimated, and the output tokens that were seen."""
    output_tokens_total: int = 0
    external_requests_total: int = 0
    """Requests that external providers have answered; none of these are in the totals above but
    for the arrivals."""
    external_prompt_tokens_total: int = 0
    """Cached ones included: another engine's cache says nothing about ours."""
    external_output_tokens_total: int = 0
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
    """Times from asking a rank to the first token, summed since the worker started, over
    `ttft_count` answers: without the wait in the gateway."""
    ttft_count: int = 0
    tpot_s_sum: float = 0.0
    """Times per further token, one a request, over `tpot_count` answers."""
    tpot_count: int = 0


@dataclass(frozen=True, slots=True)
class GatewayReport:
    gateway: str
    """Unique per worker process and start: `<host>-<pid>-<start time>`."""
    sent_at_s: float
    """By the worker's clock, which may jump."""
    number: int = 0
    """Of this report, growing by one with each; 0: it does not say."""
    fleet_version: int = 0
    """Of the fleet that the worker had when it sent this; 0: none, or it does not say."""
    models: dict[str, ModelTraffic] = field(default_factory=dict)
    groups: dict[str, GroupTraffic] = field(default_factory=dict)
