"""vLLM's engine on CPU, with as few processes as its parallelism allows."""

from typing import Any

from ray.llm._internal.serve.engines.vllm.vllm_engine import VLLMEngine


class CpuEngine(VLLMEngine):
    """Ray asks for a worker process on CPU even when a rank has one worker only. Each process
    imports torch and vLLM anew, which takes longer than anything else in the start of a group."""

    def _prepare_engine_config(self, callback_ctx: Any) -> tuple[Any, Any, Any]:
        arguments, frontend, config = super()._prepare_engine_config(callback_ctx)
        if config.parallel_config.world_size == 1:
            config.parallel_config.distributed_executor_backend = "uni"
        return arguments, frontend, config
