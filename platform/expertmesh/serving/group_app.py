"""The Serve application of one group: builds GroupServer as one gang in the group's pool.

Serve imports `build` by name and passes the GroupSpec as plain data.
"""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec
from ray import serve
from ray.llm._internal.common.callbacks.base import CallbackConfig
from ray.serve.config import GangPlacementStrategy, GangSchedulingConfig
from ray.serve.deployment import Application
from ray.serve.llm import LLMConfig, ModelLoadingConfig, build_dp_deployment

from expertmesh.core.domain.fleet import GroupSpec
from expertmesh.serving.group_server import GroupServer
from expertmesh.serving.local_weights import LocalWeights
from expertmesh.telemetry.traces import traces_endpoint

POOL_LABEL = "expertmesh.io/pool"

# Serve notices a dead rank after three failed checks.
_HEALTH_CHECK_PERIOD_S = 2
_HEALTH_CHECK_TIMEOUT_S = 10
# Serve keeps a replica reachable for at least 30 s while it drains; the gateway has drained before.
_SHUTDOWN_TIMEOUT_S = 5
_CPU_KV_BYTES = 256 * 2**20
"""vLLM's own default is nearly all of the host's memory, for each rank on it."""


_EXPORTERS = tuple(
    f"opentelemetry.exporter.otlp.proto.{kind}.trace_exporter" for kind in ("grpc", "http")
)


def build(args: dict[str, Any]) -> Application:
    spec = msgspec.convert(args, GroupSpec)
    return build_dp_deployment(
        llm_config(spec),
        name_prefix="group:",
        bind_kwargs={"group": spec.name},
        override_serve_options=serve_options(spec),
        deployment_cls=serve.ingress()(GroupServer),
    )


def llm_config(spec: GroupSpec) -> LLMConfig:
    on_cpu = spec.accelerator is None
    is_local = Path(spec.model_source).is_absolute()
    parallelism = spec.parallelism
    engine: dict[str, Any] = {
        "data_parallel_size": parallelism.data,
        "tensor_parallel_size": parallelism.tensor,
        "enable_expert_parallel": parallelism.expert > 1,
        "max_model_len": spec.max_model_len,
        # Without it the engine keeps to itself what it took from its cache, and that has a price.
        "enable_prompt_tokens_details": True,
    }
    if on_cpu:
        # Compilation and profiling cost more than they bring on models that run on a CPU.
        engine |= {"enforce_eager": True, "kv_cache_memory_bytes": _CPU_KV_BYTES}
    endpoint = traces_endpoint(os.environ)
    # vLLM does not start without both of its exporters when it is given an endpoint.
    if endpoint is not None and all(map(_is_there, _EXPORTERS)):
        engine["otlp_traces_endpoint"] = endpoint
    engine |= spec.engine
    worker = {"CPU": 1} if on_cpu else {"CPU": 1, "GPU": 1}
    return LLMConfig(
        model_loading_config=ModelLoadingConfig(
            model_id=spec.model, model_source=spec.model_source
        ),
        engine_kwargs=engine,
        accelerator_type=spec.accelerator,
        placement_group_config={"bundle_per_worker": worker},
        # The replica only relays to its first worker, whose bundle it shares.
        deployment_config={"ray_actor_options": {"num_cpus": 0}},
        callback_config=CallbackConfig(callback_class=LocalWeights)
        if is_local
        else CallbackConfig(),
        # vLLM's own Prometheus registry answers on every rank, complete and exact.
        log_engine_metrics=False,
    )


def serve_options(spec: GroupSpec) -> dict[str, Any]:
    ranks = spec.parallelism.data
    return {
        "num_replicas": ranks,
        "gang_scheduling_config": GangSchedulingConfig(
            gang_size=ranks, gang_placement_strategy=GangPlacementStrategy.PACK
        ),
        "placement_group_bundle_label_selector": [{POOL_LABEL: spec.pool}],
        "health_check_period_s": _HEALTH_CHECK_PERIOD_S,
        "health_check_timeout_s": _HEALTH_CHECK_TIMEOUT_S,
        "graceful_shutdown_timeout_s": _SHUTDOWN_TIMEOUT_S,
    }


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False
