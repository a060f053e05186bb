"""One rank of a group: vLLM's native HTTP app in a Serve replica, cut to what a mesh needs."""

import asyncio
import logging
import os
import time
from typing import Any

from fastapi import HTTPException
from ray.serve.llm import LLMConfig
from ray.serve.llm.deployment import DPServer

from expertmesh.core.domain.fleet import RankInfo
from expertmesh.errors import UpstreamUnavailable
from expertmesh.serving import engine_stats
from expertmesh.serving.dp_coordinator import end_coordinator_with_rank
from expertmesh.serving.engine_processes import EngineProcesses
from expertmesh.serving.expert_load import LayerLoad, RecentLoads, read_expert_load
from expertmesh.serving.fate_sharing import die_with_parent, own_children
from expertmesh.serving.mesh_guard import ALLOWED_ROUTES, AsgiApp, MeshGuard

MESH_TOKEN_VARIABLE = "EXPERTMESH_MESH_TOKEN"
_EXPERT_LOAD_PERIOD_S = 5.0

_log = logging.getLogger(__name__)


class GroupServer(DPServer):
    # Serve awaits the constructor of a replica.
    async def __init__(  # type: ignore[misc]
        self, llm_config: LLMConfig, group: str, **kwargs: Any
    ) -> None:
        self._group = group
        self._started_at_s = time.time()
        self._expert_load: tuple[LayerLoad, ...] = ()
        self._expert_load_at_s = -_EXPERT_LOAD_PERIOD_S
        self._expert_load_task: asyncio.Task[None] | None = None
        self._recent_loads = RecentLoads()
        self._processes = EngineProcesses()
        self._mesh_token = os.environ.get(MESH_TOKEN_VARIABLE, "")
        if not self._mesh_token.strip(" ,"):
            raise RuntimeError(
                f"{MESH_TOKEN_VARIABLE} is not set on this Ray node; "
                "start the node with the mesh token in its environment"
            )
        # vLLM would speak gRPC; gateway and controller send their traces by HTTP.
        os.environ.setdefault("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/protobuf")
        os.environ.setdefault("OTEL_SERVICE_NAME", "expertmesh-group")
        die_with_parent()
        own_children()
        end_coordinator_with_rank()
        await super().__init__(llm_config, **kwargs)

    async def _start_engine(self) -> None:
        """Without the base's usage report, which starts an actor that imports vLLM once more."""
        await self.engine.start()
        self._processes.watch()

    async def check_health(self) -> None:
        ended = self._processes.ended()
        if ended:
            raise RuntimeError(f"ended: {', '.join(ended)}")
        await super().check_health()

    async def __serve_build_asgi_app__(self) -> AsgiApp:
        app = await super().__serve_build_asgi_app__()
        app.router.routes[:] = [
            route for route in app.router.routes if getattr(route, "path", None) in ALLOWED_ROUTES
        ]
        app.add_api_route("/em/info", self._info, methods=["GET"], include_in_schema=False)
        app.add_api_route("/em/experts", self._experts, methods=["GET"], include_in_schema=False)
        return MeshGuard(app, self._mesh_token)

    async def _info(self) -> RankInfo:
        try:
            await self.check_health()
        except Exception as error:
            # The probe of the controller sees a dead engine before Serve's health check does.
            raise HTTPException(503, f"the engine of this rank has failed: {error}") from error
        self._refresh_expert_load()
        load = engine_stats.read_load()
        capacity = engine_stats.read_capacity(self.engine)
        return RankInfo(
            group=self._group,
            model=self._llm_config.model_id,
            rank=self.dp_rank,
            world_size=self.dp_size,
            running=load.running,
            waiting=load.waiting,
            kv_usage=load.kv_usage,
            kv_tokens=capacity.kv_tokens,
            max_running=capacity.max_running,
            expert_tokens=_by_expert(self._expert_load),
            started_at_s=self._started_at_s,
            uncached_prompt_tokens_total=load.uncached_prompt_tokens_total,
            output_tokens_total=load.output_tokens_total,
            preemptions_total=load.preemptions_total,
            cached_prompt_tokens_total=load.cached_prompt_tokens_total,
            layers=self._recent_loads.peaks(),
        )

    async def _experts(self) -> dict[str, Any]:
        return {
            "group": self._group,
            "rank": self.dp_rank,
            "layers": [
                {"layer": load.layer, "tokens": dict(load.tokens)} for load in self._expert_load
            ],
        }

    def _refresh_expert_load(self) -> None:
        """In the background: a probe must not wait for the engine's current step."""
        if self._expert_load_task is not None and not self._expert_load_task.done():
            return
        if time.monotonic() - self._expert_load_at_s < _EXPERT_LOAD_PERIOD_S:
            return
        self._expert_load_at_s = time.monotonic()
        self._expert_load_task = asyncio.create_task(self._read_expert_load())

    async def _read_expert_load(self) -> None:
        try:
            self._expert_load = await read_expert_load(self)
            self._recent_loads.saw(self._expert_load)
        except UpstreamUnavailable as error:
            _log.warning("%s", error)


def _by_expert(loads: tuple[LayerLoad, ...]) -> dict[str, int]:
    totals: dict[str, int] = {}
    for load in loads:
        for expert, tokens in load.tokens:
            totals[str(expert)] = totals.get(str(expert), 0) + tokens
    return totals
