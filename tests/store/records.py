"""Ledger rows for tests: only what a test is about needs to be said."""

from decimal import Decimal

from expertmesh.core.metering.capacity import CapacityHold, NodeHold
from expertmesh.core.metering.usage import Outcome, UsageRecord

NOON_S = 1_767_268_800.0
"""2026-01-01 12:00 UTC."""


def usage_record(
    request_id: str = "request-1",
    at_s: float = NOON_S,
    *,
    tenant: str = "acme",
    model: str = "tiny-moe",
    group: str = "em-tiny-moe-cpu-0",
    pool: str = "cpu",
    outcome: Outcome = Outcome.OK,
    prompt_tokens: int = 100,
    cached_tokens: int = 40,
    completion_tokens: int = 20,
    queue_s: float = 0.0,
    ttft_s: float | None = 0.25,
    duration_s: float = 1.0,
    tariff_usd: Decimal = Decimal("0.0000148"),
) -> UsageRecord:
    return UsageRecord(
        request_id=request_id,
        at_s=at_s,
        tenant=tenant,
        key_id="key_1",
        model=model,
        group=group,
        pool=pool,
        endpoint="/v1/chat/completions",
        outcome=outcome,
        prompt_tokens=prompt_tokens,
        cached_tokens=cached_tokens,
        completion_tokens=completion_tokens,
        queue_s=queue_s,
        ttft_s=ttft_s,
        duration_s=duration_s,
        tariff_usd=tariff_usd,
    )


def capacity_hold(
    group: str = "em-tiny-moe-cpu-0",
    started_at_s: float = NOON_S,
    seen_at_s: float = NOON_S + 60,
    ended_at_s: float | None = None,
    *,
    model: str = "tiny-moe",
    pool: str = "cpu",
    usd_per_hour: float = 0.3,
    start_s: float | None = 0.0,
    draining_at_s: float | None = None,
    tokens_per_s: tuple[float, float] | None = None,
    watts: tuple[float, float] | None = None,
) -> CapacityHold:
    """`start_s`: until it was ready, None: it never was. Pairs: of prefill and decode; idle and
    busy."""
    prefill, decode = tokens_per_s or (None, None)
    idle, busy = watts or (None, None)
    return CapacityHold(
        group=group,
        model=model,
        pool=pool,
        usd_per_hour=usd_per_hour,
        started_at_s=started_at_s,
        seen_at_s=seen_at_s,
        ended_at_s=ended_at_s,
        ready_at_s=None if start_s is None else started_at_s + start_s,
        draining_at_s=draining_at_s,
        prefill_tokens_per_s=prefill,
        decode_tokens_per_s=decode,
        idle_watts=idle,
        busy_watts=busy,
    )


def node_hold(
    node_id: str = "n1",
    started_at_s: float = NOON_S,
    seen_at_s: float = NOON_S + 60,
    ended_at_s: float | None = None,
    *,
    pool: str = "cpu",
    usd_per_hour: float = 0.3,
    idle_watts: float | None = None,
) -> NodeHold:
    return NodeHold(pool, node_id, usd_per_hour, started_at_s, seen_at_s, ended_at_s, idle_watts)
