"""A group of a plan in the words of vLLM 0.29, of its environment, and of the nodes it runs on."""

from dataclasses import dataclass
from typing import Any

from expertmesh.core.domain.accelerator import Accelerator, Era
from expertmesh.core.domain.model_shape import Dtype
from expertmesh.core.perf.memory import GPU_MEMORY_UTILIZATION, NCCL_BYTES
from expertmesh.core.planner.candidates import Backend
from expertmesh.core.planner.plan import GroupPlan
from expertmesh.core.planner.question import GpuPool

SHARED_MEMORY_BYTES_PER_GPU = 2 * 2**30
"""Of /dev/shm, for NCCL and vLLM's own messages; vLLM's guides give a node 10 GiB or more."""
HOST_BYTES_PER_GPU = 16 * 2**30
"""For one engine process with its pinned buffers; unverified."""
CPUS_PER_GPU = 4
"""An engine core, an API server and their helpers; unverified. The group asks Ray for one."""

_LOW_LATENCY = (Backend.DEEPEP_LOW_LATENCY, Backend.MORI_LOW_LATENCY)
_DEEPEP = (Backend.DEEPEP_LOW_LATENCY, Backend.DEEPEP_HIGH_THROUGHPUT)


@dataclass(frozen=True, slots=True)
class NodeResources:
    """Of each node of a group, at most."""

    gpus: int
    cpus: int
    memory_bytes: int
    shared_memory_bytes: int


@dataclass(frozen=True, slots=True)
class EngineSettings:
    engine: dict[str, Any]
    """For `engine:` of the manifest and `GroupSpec.engine`, without parallelism and context."""
    environment: dict[str, str]
    notes: tuple[str, ...]
    """What only the operator of the nodes can fill in."""
    node: NodeResources


def engine_settings(group: GroupPlan, pool: GpuPool, kv: Dtype = Dtype.BF16) -> EngineSettings:
    environment, notes = _environment(group, pool.accelerator)
    gpus = min(group.gpus, pool.gpus_per_node)
    return EngineSettings(
        engine=_engine(group, kv),
        environment=environment,
        notes=notes,
        node=NodeResources(
            gpus=gpus,
            cpus=gpus * CPUS_PER_GPU,
            memory_bytes=gpus * HOST_BYTES_PER_GPU,
            shared_memory_bytes=gpus * SHARED_MEMORY_BYTES_PER_GPU,
        ),
    )


def vllm_serve_arguments(group: GroupPlan, source: str, kv: Dtype = Dtype.BF16) -> list[str]:
    """The same as a command line, to try a plan without ExpertMesh."""
    layout = group.layout
    arguments = [
        *("vllm", "serve", source),
        *("--tensor-parallel-size", str(layout.tensor)),
        *("--data-parallel-size", str(layout.data)),
        *(("--enable-expert-parallel",) if layout.expert_parallel else ()),
        *("--max-model-len", str(group.memory.context_tokens)),
    ]
    for name, value in _engine(group, kv).items():
        option = f"--{name.replace('_', '-')}"
        if value is True:
            arguments.append(option)
        elif isinstance(value, dict):
            arguments += (part for k, v in value.items() for part in (f"{option}.{k}", str(v)))
        else:
            arguments += (option, str(value))
    return arguments


def chart_values(settings: EngineSettings, pool: str) -> dict[str, Any]:
    """For the chart, whose pools bring their GPUs by themselves."""
    node = settings.node
    worker: dict[str, Any] = {
        "sharedMemory": f"{node.shared_memory_bytes // 2**30}Gi",
        "resources": {
            "requests": {"cpu": str(node.cpus), "memory": f"{node.memory_bytes // 2**30}Gi"}
        },
    }
    if settings.environment:
        worker["env"] = dict(settings.environment)
    return {"ray": {"workers": {pool: worker}}}


def eplb_arguments(redundant_experts: int) -> dict[str, Any]:
    """None without copies: moving experts alone gains little, and must still be watched."""
    if not redundant_experts:
        return {}
    return {
        "enable_eplb": True,
        "eplb_config": {"num_redundant_experts": redundant_experts},
    }


def _engine(group: GroupPlan, kv: Dtype) -> dict[str, Any]:
    limits = group.memory.limits
    engine: dict[str, Any] = {
        "gpu_memory_utilization": GPU_MEMORY_UTILIZATION,
        "max_num_seqs": limits.sequences,
        "max_num_batched_tokens": limits.batched_tokens,
    }
    if group.backend is not Backend.NONE:
        engine["all2all_backend"] = group.backend.value
    if group.overlapped:
        # Two halves of a batch in turn: one computes while the other travels.
        engine["enable_dbo"] = True
    engine |= eplb_arguments(group.layout.redundant_experts)
    if kv is Dtype.FP8:
        engine["kv_cache_dtype"] = "fp8"
    return engine


def _environment(
    group: GroupPlan, accelerator: Accelerator
) -> tuple[dict[str, str], tuple[str, ...]]:
    environment: dict[str, str] = {}
    notes: list[str] = []
    rocm = accelerator.era is Era.CDNA
    if rocm:
        environment["VLLM_ROCM_USE_AITER"] = "1"
    if group.nodes > 1:
        notes.append(
            "NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME: the interface between nodes, as the "
            "nodes name it"
        )
        if group.gpus <= accelerator.link_domain:
            # NVLink between nodes needs memory that can be shared between them.
            environment |= {"NCCL_MNNVL_ENABLE": "1", "NCCL_CUMEM_ENABLE": "1"}
            if group.backend is Backend.DEEPEP_LOW_LATENCY:
                environment["VLLM_DEEPEP_LOW_LATENCY_USE_MNNVL"] = "1"
        elif group.backend in _DEEPEP:
            environment |= {
                "NVSHMEM_IB_ENABLE_IBGDA": "true",
                "NVSHMEM_REMOTE_TRANSPORT": "ibgda",
            }
            notes.append(
                "NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME: the same interface; the driver must allow "
                "IBGDA (NVreg_EnableStreamMemOPs=1, PeerMappingOverride=1)"
            )
    if group.backend is Backend.DEEPEP_LOW_LATENCY:
        gib = -(-(group.memory.buffer_bytes - NCCL_BYTES) // 2**30)
        environment["NVSHMEM_SYMMETRIC_SIZE"] = f"{max(1, gib)}G"
    if group.backend in _LOW_LATENCY:
        notes.append(
            f"{group.backend.value} takes at most {group.memory.limits.batched_tokens} tokens of a "
            "rank in a step, so long prompts take several"
        )
    return environment, tuple(notes)
