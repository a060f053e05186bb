"""Latency targets of a model deployment."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Slo:
    ttft_s: float = 2.0
    tpot_s: float = 0.05
    attainment: float = 0.99
