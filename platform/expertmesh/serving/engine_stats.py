"""What the engine of this rank does and what it holds, read inside the rank's process.

The load comes from vLLM's Prometheus registry, the capacity from its configuration.
"""

from dataclasses import dataclass
from typing import Any

from vllm.v1.metrics.reader import Counter, Gauge, get_metrics_snapshot

_COMPUTED = "local_compute"
"""As against prompt tokens that came from a cache."""


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """What it does now, and what it has done since it started."""

    running: int = 0
    waiting: int = 0
    kv_usage: float = 0.0
    uncached_prompt_tokens_total: int = 0
    output_tokens_total: int = 0
    preemptions_total: int = 0
    cached_prompt_tokens_total: int = 0


@dataclass(frozen=True, slots=True)
class EngineCapacity:
    """Of one rank; 0 where the engine does not say."""

    kv_tokens: int = 0
    max_running: int = 0


def read_capacity(engine: Any) -> EngineCapacity:
    """`engine`: Ray's wrapper of vLLM's AsyncLLM. Never raises: its inner names may change.

    vLLM completes its configuration with what the engine's process found while it started.
    """
    config = getattr(getattr(engine, "_engine_client", None), "vllm_config", None)
    cache = getattr(config, "cache_config", None)
    blocks = _count(getattr(cache, "num_gpu_blocks", None))
    block_tokens = _count(getattr(cache, "block_size", None))
    # vLLM's own figure knows of layers with a sliding window and of caches split over workers.
    kv_tokens = _count(getattr(cache, "kv_cache_size_tokens", None)) or blocks * block_tokens
    scheduler = getattr(config, "scheduler_config", None)
    return EngineCapacity(kv_tokens, max_running=_count(getattr(scheduler, "max_num_seqs", None)))


def _count(value: object) -> int:
    return value if isinstance(value, int) and value > 0 else 0


def read_load() -> EngineLoad:
    gauges: dict[str, float] = {}
    totals: dict[str, int] = {}
    for metric in get_metrics_snapshot():
        if isinstance(metric, Gauge) and "reason" not in metric.labels:
            gauges[metric.name] = metric.value
        elif isinstance(metric, Counter):
            own = metric.labels.get("source", _COMPUTED) == _COMPUTED
            name = metric.name if own else f"{metric.name} from a cache"
            totals[name] = totals.get(name, 0) + metric.value
    return EngineLoad(
        running=int(gauges.get("vllm:num_requests_running", 0)),
        waiting=int(gauges.get("vllm:num_requests_waiting", 0)),
        kv_usage=float(gauges.get("vllm:kv_cache_usage_perc", 0.0)),
        uncached_prompt_tokens_total=totals.get("vllm:prompt_tokens_by_source", 0),
        output_tokens_total=totals.get("vllm:generation_tokens", 0),
        preemptions_total=totals.get("vllm:num_preemptions", 0),
        cached_prompt_tokens_total=totals.get("vllm:prompt_tokens_by_source from a cache", 0),
    )
