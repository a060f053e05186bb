"""The gateway: traffic, refusals, retries, queues, connections, and what waits for the ledger."""

from grafana_foundation_sdk.models import dashboard as models

from dashboards.panels import (
    GREEN,
    RED,
    YELLOW,
    Panels,
    board,
    finished,
    latency,
    lines,
    number,
    query,
    stacked,
    thresholds,
)
from dashboards.queries import rate, series
from expertmesh.telemetry import metrics


def build() -> models.Dashboard:
    made = board(
        "gateway", "gateway", "Traffic, refusals, retries, queues and connections of all gateways."
    )
    return finished(
        made, (("Traffic", _traffic()), ("Refusals", _refusals()), ("Inside", _inside()))
    )


def _traffic() -> Panels:
    requests = metrics.GATEWAY_REQUESTS
    every = f"sum({rate(requests)})"
    return (
        number("Requests", "Answered each second.", "reqps")
        .span(6)
        .with_target(query(every, "requests")),
        number("Server errors", "Share of the answers with a status from 500 on.", "percentunit")
        .span(6)
        .thresholds(thresholds((None, GREEN), (0.001, YELLOW), (0.01, RED)))
        .with_target(
            query(f"(sum({rate(requests, status='~5..')}) or vector(0)) / {every}", "errors")
        ),
        number("Open requests", "Accepted, and not yet answered to their end.", "short")
        .span(6)
        .with_target(query(f"sum({series(metrics.GATEWAY_OPEN)})", "open")),
        number("Age of the fleet", "Since the controller last answered the slowest worker.", "s")
        .span(6)
        .thresholds(thresholds((None, GREEN), (5, YELLOW), (15, RED)))
        .with_target(query(f"max({series(metrics.GATEWAY_FLEET_AGE)})", "age")),
        stacked(lines("Requests by status", "Answered each second.", "reqps"))
        .span(8)
        .with_target(query(f"sum by (status) ({rate(requests)})", "{{status}}")),
        stacked(lines("Requests by endpoint", "Answered each second.", "reqps"))
        .span(8)
        .with_target(query(f"sum by (endpoint) ({rate(requests)})", "{{endpoint}}")),
        lines("Tokens by model", "Generated each second.", "suffix:tokens/s")
        .span(8)
        .with_target(
            query(f"sum by (model) ({rate(metrics.GATEWAY_TOKENS, direction='out')})", "{{model}}")
        ),
    )


def _refusals() -> Panels:
    return (
        lines("Turned away", "Each second, for want of room or capacity, by reason.", "reqps")
        .span(8)
        .with_target(
            query(
                f"sum by (model, reason) ({rate(metrics.GATEWAY_REJECTIONS)})",
                "{{model}} {{reason}}",
            )
        ),
        lines("Refused by a limit", "Each second, by the kind of limit or budget.", "reqps")
        .span(8)
        .with_target(query(f"sum by (kind) ({rate(metrics.GATEWAY_LIMIT_REFUSALS)})", "{{kind}}")),
        lines("Sent again", "Attempts each second that failed at a first group.", "reqps")
        .span(8)
        .with_target(
            query(
                f"sum by (model, reason) ({rate(metrics.GATEWAY_RETRIES)})", "{{model}} {{reason}}"
            )
        ),
        lines("Clients that went away", "Each second, before the end of their answer.", "reqps")
        .span(8)
        .with_target(query(f"sum by (model) ({rate(metrics.GATEWAY_CLIENT_ABORTS)})", "{{model}}")),
        lines("Sent to providers", "Each second.", "reqps")
        .span(8)
        .with_target(
            query(
                f"sum by (model, pool) ({rate(metrics.GATEWAY_EXTERNAL_REQUESTS)})",
                "{{model}} to {{pool}}",
            )
        ),
        lines("Ranks that get no requests", "Because they failed lately.", "short")
        .span(8)
        .with_target(
            query(f"max by (model) ({series(metrics.GATEWAY_EJECTED_RANKS)})", "{{model}}")
        ),
    )


def _inside() -> Panels:
    return (
        latency(
            "Wait in the queue",
            "Of requests that waited, by priority.",
            metrics.GATEWAY_QUEUE_WAIT,
            ("priority",),
        ),
        lines("Queued", "Requests, and held streams that have sent comments only.", "short")
        .span(12)
        .with_target(
            query(f"sum by (model) ({series(metrics.GATEWAY_QUEUED)})", "{{model}} queued")
        )
        .with_target(
            query(f"sum by (model) ({series(metrics.GATEWAY_HELD_STREAMS)})", "{{model}} held")
        ),
        lines("Queued tokens", "Prompts and longest answers of the waiting, estimated.", "short")
        .span(8)
        .with_target(
            query(f"sum by (model) ({series(metrics.GATEWAY_QUEUED_TOKENS)})", "{{model}}")
        ),
        lines("At groups", "Requests in flight at each group.", "short")
        .span(8)
        .with_target(query(f"sum by (group) ({series(metrics.GATEWAY_IN_FLIGHT)})", "{{group}}")),
        lines("Connections to ranks", "Idle and busy ones.", "short")
        .span(8)
        .with_target(
            query(f"sum by (state) ({series(metrics.GATEWAY_UPSTREAM_CONNECTIONS)})", "{{state}}")
        ),
        lines("Usage on its way to the ledger", "Records that wait in gateways.", "short")
        .span(8)
        .with_target(query(f"sum({series(metrics.GATEWAY_USAGE_PENDING)})", "records")),
        lines("Usage given up", "Records that went to the log, each second.", "ops")
        .span(8)
        .with_target(query(f"sum({rate(metrics.GATEWAY_USAGE_GIVEN_UP)})", "records")),
        lines("Log lines dropped", "Each second; the reader of the access log is slow.", "ops")
        .span(8)
        .with_target(query(f"sum({rate(metrics.GATEWAY_ACCESS_LOG_DROPPED)})", "lines")),
    )
