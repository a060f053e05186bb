"""A child process of the planner's memory tests: starts engines and writes what they hold.

    python memory_process.py JOB.json RESULT.json

A job names steps, each a layout to load a model in; the result holds, for each step, the bytes of
every weight on this rank as vLLM allocates them, and what it says about its cache.
"""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Step:
    name: str
    model: str
    """Directory of a checkpoint."""
    dtype: str
    kv_bytes: int
    tensor: int = 1
    data: int = 1
    expert_parallel: bool = False
    rank: int = 0
    port: int = 0
    """For the rendezvous of two ranks."""


MAX_MODEL_LEN = 256


def measure(step: Step) -> dict[str, Any]:
    if step.tensor > 1:
        os.environ |= {
            "RANK": str(step.rank),
            "LOCAL_RANK": str(step.rank),
            "WORLD_SIZE": str(step.tensor),
            "LOCAL_WORLD_SIZE": str(step.tensor),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(step.port),
        }
    if step.data > 1:
        os.environ |= {
            "VLLM_DP_RANK": str(step.rank),
            "VLLM_DP_RANK_LOCAL": str(step.rank),
            "VLLM_DP_SIZE": str(step.data),
            "VLLM_DP_MASTER_IP": "127.0.0.1",
            "VLLM_DP_MASTER_PORT": str(step.port),
        }
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory
    from vllm.model_executor.model_loader import base_loader

    weights: dict[str, int] = {}
    process = base_loader.process_weights_after_loading

    def note_and_process(model: Any, *args: Any, **kwargs: Any) -> None:
        """Before the CPU kernels pack the weights in their own way."""
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "rotary" not in name and "cache" not in name and not name.endswith("_map"):
                weights[name] = tensor.numel() * tensor.element_size()
        process(model, *args, **kwargs)

    base_loader.process_weights_after_loading = note_and_process
    llm = LLM(
        model=step.model,
        dtype=step.dtype,
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=16,
        max_num_batched_tokens=MAX_MODEL_LEN,
        skip_tokenizer_init=True,
        enforce_eager=True,
        seed=0,
        kv_cache_memory_bytes=step.kv_bytes,
        tensor_parallel_size=step.tensor,
        enable_expert_parallel=step.expert_parallel,
        distributed_executor_backend="external_launcher" if step.tensor > 1 else "uni",
    )
    base_loader.process_weights_after_loading = process
    config = llm.llm_engine.vllm_config
    cache = config.cache_config
    result = {
        "weights": weights,
        "kv_tokens": cache.kv_cache_size_tokens,
        "blocks": cache.num_gpu_blocks,
        "block_tokens": cache.block_size,
        "in_flight_tokens": config.max_in_flight_tokens,
        "mamba_cache_mode": cache.mamba_cache_mode,
        "prefix_caching": cache.enable_prefix_caching,
    }
    llm.llm_engine.engine_core.shutdown()
    del llm
    cleanup_dist_env_and_memory()
    return result


def main(job_file: str, result_file: str) -> None:
    results = {}
    for entry in json.loads(Path(job_file).read_text()):
        step = Step(**entry)
        results[step.name] = measure(step)
        Path(result_file).write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
