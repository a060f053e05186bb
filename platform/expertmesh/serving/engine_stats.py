"""Read the engine's own load figures from vLLM's Prometheus registry, inside the rank's process."""

from dataclasses import dataclass

from vllm.v1.metrics.reader import Gauge, get_metrics_snapshot


@dataclass(frozen=True, slots=True)
class EngineLoad:
    running: int
    waiting: int
    kv_usage: float


def read_load() -> EngineLoad:
    gauges = {
        metric.name: metric.value
        for metric in get_metrics_snapshot()
        if isinstance(metric, Gauge) and "reason" not in metric.labels
    }
    return EngineLoad(
        running=int(gauges.get("vllm:num_requests_running", 0)),
        waiting=int(gauges.get("vllm:num_requests_waiting", 0)),
        kv_usage=float(gauges.get("vllm:kv_cache_usage_perc", 0.0)),
    )
