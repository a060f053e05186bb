"""Work that waits or runs, from what gateways report."""

from collections.abc import Collection
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Flow:
    """Requests of one model through one gateway worker: means over the last `span_s`."""

    span_s: float
    arrivals_per_s: float = 0.0
    arrived_prompt_tokens_per_s: float = 0.0
    """Of the arrivals, as the gateway estimates them; cached ones included."""
    finished_per_s: float = 0.0
    uncached_prompt_tokens_per_s: float = 0.0
    """Of the requests that finished, as engines report them; so are the output tokens."""
    output_tokens_per_s: float = 0.0
    external_per_s: float = 0.0
    """Requests that external providers have answered; they are among the arrivals, but not among
    the finished ones."""
    external_prompt_tokens_per_s: float = 0.0
    """Cached ones included."""
    external_output_tokens_per_s: float = 0.0


@dataclass(frozen=True, slots=True)
class GatewaySeen:
    """The last report of one gateway worker, as far as one model is concerned."""

    gateway: str
    heard_at_s: float
    """Controller's time at which the report came in."""
    knows_s: float | None
    """The report was sent by a gateway that had the fleet as of this time; None: no fleet yet."""
    queued: int = 0
    queued_prompt_tokens: int = 0
    waking: int = 0
    oldest_wait_s: float = 0.0
    flow: Flow | None = None
    """None: not known, as after a single report."""
    in_flight: dict[str, int] = field(default_factory=dict)
    """By group."""


@dataclass(frozen=True, slots=True)
class GroupDoing:
    """What a group's engines do and have done over the last `span_s`; sums over its ranks."""

    at_s: float
    """When its ranks said so."""
    span_s: float
    running: int
    waiting: int
    kv_usage: float
    """0 to 1."""
    uncached_prompt_tokens_per_s: float
    output_tokens_per_s: float
    ttft_s: float | None = None
    """Means over the requests that gateways saw in the span, without the wait in the gateway; None
    when there were none."""
    tpot_s: float | None = None


@dataclass(frozen=True, slots=True)
class Demand:
    queued: int = 0
    running: int = 0
    oldest_wait_s: float = 0.0
    live_gateways: int = 0
    stale_gateways: int = 0
    """Silent too long to be believed, not long enough to have ended."""
    oldest_report_s: float | None = None
    """Age of the oldest report counted here."""
    queued_prompt_tokens: int = 0
    flow: Flow = Flow(span_s=0.0)
    """Of the live gateways together; all zero where none says."""

    @property
    def work(self) -> int:
        return self.queued + self.running


def measure(
    gateways: tuple[GatewaySeen, ...],
    groups: Collection[str],
    now_s: float,
    *,
    stale_s: float,
    forget_s: float,
) -> Demand:
    """A stale report counts with its last value; one older than `forget_s` not at all."""
    counted = [seen for seen in gateways if now_s - seen.heard_at_s <= forget_s]
    ages = [now_s - seen.heard_at_s for seen in counted]
    stale = sum(age > stale_s for age in ages)
    flows = [
        seen.flow for seen, age in zip(counted, ages, strict=True) if seen.flow and age <= stale_s
    ]
    return Demand(
        queued=sum(max(seen.queued, seen.waking) for seen in counted),
        running=sum(seen.in_flight.get(group, 0) for seen in counted for group in groups),
        oldest_wait_s=max((seen.oldest_wait_s for seen in counted), default=0.0),
        live_gateways=len(counted) - stale,
        stale_gateways=stale,
        oldest_report_s=max(ages, default=None),
        queued_prompt_tokens=sum(seen.queued_prompt_tokens for seen in counted),
        flow=_together(flows),
    )


def _together(flows: list[Flow]) -> Flow:
    return Flow(
        span_s=max((flow.span_s for flow in flows), default=0.0),
        arrivals_per_s=sum(flow.arrivals_per_s for flow in flows),
        arrived_prompt_tokens_per_s=sum(flow.arrived_prompt_tokens_per_s for flow in flows),
        finished_per_s=sum(flow.finished_per_s for flow in flows),
        uncached_prompt_tokens_per_s=sum(flow.uncached_prompt_tokens_per_s for flow in flows),
        output_tokens_per_s=sum(flow.output_tokens_per_s for flow in flows),
        external_per_s=sum(flow.external_per_s for flow in flows),
        external_prompt_tokens_per_s=sum(flow.external_prompt_tokens_per_s for flow in flows),
        external_output_tokens_per_s=sum(flow.external_output_tokens_per_s for flow in flows),
    )


def is_drained(
    group: str,
    since_s: float,
    gateways: tuple[GatewaySeen, ...],
    now_s: float,
    *,
    stale_s: float,
    forget_s: float,
) -> bool:
    """Every gateway knew of the drain when it last reported, and had nothing at the group.

    A gateway that is silent may still have requests there, and with no gateway at all nothing is
    known: then only the deadline ends the drain.
    """
    counted = [seen for seen in gateways if now_s - seen.heard_at_s <= forget_s]
    return bool(counted) and all(
        now_s - seen.heard_at_s <= stale_s
        and seen.knows_s is not None
        and seen.knows_s >= since_s
        and seen.in_flight.get(group, 0) == 0
        for seen in counted
    )
