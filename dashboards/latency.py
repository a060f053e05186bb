"""Latency and its targets: who meets them, what is left of the error budget, where time goes."""

from grafana_foundation_sdk.models import dashboard as models

from dashboards.alerts import burn, missed
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
from dashboards.queries import increase, quantile, rate, recorded, series
from expertmesh.telemetry import metrics


def build() -> models.Dashboard:
    made = board(
        "latency and SLO",
        "latency",
        "How fast requests are, how many meet their targets, and how fast the error budget goes.",
    )
    return finished(made, (("Targets", _targets()), ("Latency", _latency()), ("Wait", _wait())))


def _targets() -> Panels:
    every = f"sum({increase(metrics.GATEWAY_SLO)})"
    met = f"(sum({increase(metrics.GATEWAY_SLO, result='met')}) or vector(0))"
    target = f"max({series(metrics.CONTROLLER_SLO)})"
    return (
        number(
            "Attainment",
            "Share of the requests in the time shown that met the targets of their model. Those "
            "that were refused for want of room count as missed; refusals by a limit and faulty "
            "requests do not count.",
            "percentunit",
        )
        .span(6)
        .thresholds(thresholds((None, RED), (0.9, YELLOW), (0.99, GREEN)))
        .with_target(query(f"{met} / {every}", "attainment", instant=True)),
        number("Target", "The highest attainment that a chosen model asks for.", "percentunit")
        .span(6)
        .with_target(query(target, "target")),
        number(
            "Error budget left",
            "Of the misses that the target allows for the requests of the time shown; below zero "
            "more have missed.",
            "percentunit",
        )
        .span(6)
        .thresholds(thresholds((None, RED), (0, YELLOW), (0.5, GREEN)))
        .with_target(
            query(
                f"1 - (1 - {met} / {every}) / clamp_min(1 - {target}, 0.0001)",
                "left",
                instant=True,
            )
        ),
        number("Requests judged", "In the time shown.", "short")
        .span(6)
        .with_target(query(every, "requests", instant=True)),
        lines(
            "Missed by model",
            "Share of the requests that missed the targets, over five minutes and over an hour.",
            "percentunit",
        )
        .span(8)
        .with_target(query(recorded(missed("5m")), "{{model}} 5 min"))
        .with_target(query(recorded(missed("1h")), "{{model}} 1 h")),
        lines(
            "Burn rate",
            "1 uses the error budget up in just the time that it is for. Alerts: 14.4 over an "
            "hour, 6 over six hours.",
            "none",
        )
        .span(8)
        .with_target(query(recorded(burn("5m")), "{{model}} 5 min"))
        .with_target(query(recorded(burn("1h")), "{{model}} 1 h"))
        .with_target(query(recorded(burn("6h")), "{{model}} 6 h")),
        stacked(
            lines(
                "Requests by result",
                "Each second: met, slow_start (time to first token), slow_tokens (time per token), "
                "failed.",
                "reqps",
            )
        )
        .span(8)
        .with_target(query(f"sum by (result) ({rate(metrics.GATEWAY_SLO)})", "{{result}}")),
    )


def _latency() -> Panels:
    return (
        latency(
            "Time to first token",
            "Streamed requests: from accepting one to its first body byte, any wait included. "
            "Marks are traces.",
            metrics.GATEWAY_TTFT,
        ),
        latency(
            "Time per output token",
            "Streamed requests: mean time per token after the first. Marks are traces.",
            metrics.GATEWAY_TPOT,
        ),
        latency(
            "Whole request",
            "From accepting a request to its last byte; the length of answers decides it.",
            metrics.GATEWAY_DURATION,
        ),
        lines(
            "p95 by model and pool",
            "Time to first token of 95 of 100 streamed requests.",
            "s",
        )
        .span(12)
        .with_target(
            query(quantile(0.95, metrics.GATEWAY_TTFT, ("model", "pool")), "{{model}} on {{pool}}")
        ),
    )


def _wait() -> Panels:
    return (
        latency(
            "Wait of requests that waited",
            "Time in the gateway's queue, by priority; requests that did not wait are not in it.",
            metrics.GATEWAY_QUEUE_WAIT,
            ("priority",),
        ),
        lines(
            "Oldest wait and the longest allowed",
            "Of all gateways, as the controller hears it.",
            "s",
        )
        .span(12)
        .with_target(
            query(f"max by (model) ({series(metrics.CONTROLLER_OLDEST_WAIT)})", "{{model}} oldest")
        )
        .with_target(
            query(f"max by (model) ({series(metrics.CONTROLLER_WAIT_LIMIT)})", "{{model}} allowed")
        ),
    )
