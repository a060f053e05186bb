"""Builds a group that starts as Ray Serve starts it by default, to compare with ours.

That is: a task per rank and node that prepares the model folder, a worker process beside each
engine core, a usage actor, and replicas in worker processes that Ray starts for them alone. Engine
arguments, placement and model are the same.
"""

import os
from typing import Any

# Read when Ray Serve LLM is imported.
os.environ["RAYLLM_ENABLE_WORKER_PROCESS_SETUP_HOOK"] = "1"

import msgspec
from ray import serve
from ray.llm._internal.common.callbacks.base import CallbackConfig
from ray.llm._internal.serve.engines.vllm.vllm_engine import VLLMEngine
from ray.serve.deployment import Application
from ray.serve.llm import build_dp_deployment
from ray.serve.llm.deployment import DPServer

from expertmesh.core.domain.fleet import GroupSpec
from expertmesh.serving.group_app import llm_config, serve_options
from expertmesh.serving.group_server import GroupServer


class WorkerProcessEngine(VLLMEngine):  # type: ignore[misc]
    """The plugin that this repository installs would put the worker into the engine core."""

    def _prepare_engine_config(self, callback_ctx: Any) -> tuple[Any, Any, Any]:
        arguments, frontend, config = super()._prepare_engine_config(callback_ctx)
        config.parallel_config.distributed_executor_backend = "mp"
        return arguments, frontend, config


class RayDefaultServer(GroupServer):
    def _init_shared(self, llm_config: Any, engine_cls: Any = None, downloader: Any = None) -> None:
        super()._init_shared(llm_config, WorkerProcessEngine, downloader)

    async def _start_engine(self) -> None:
        await DPServer._start_engine(self)


def build(args: dict[str, Any]) -> Application:
    spec = msgspec.convert(args, GroupSpec)
    config = llm_config(spec).model_copy(update={"callback_config": CallbackConfig()})
    return build_dp_deployment(
        config,
        name_prefix="group:",
        bind_kwargs={"group": spec.name},
        override_serve_options=serve_options(spec),
        deployment_cls=serve.ingress()(RayDefaultServer),
    )
