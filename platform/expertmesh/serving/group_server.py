"""One rank of a group: vLLM's native HTTP app inside a Serve replica, reduced to what a mesh needs."""

import os
from typing import Any

from ray.serve.llm import LLMConfig
from ray.serve.llm.deployment import DPServer

from expertmesh.core.domain.fleet import RankInfo
from expertmesh.serving import engine_stats
from expertmesh.serving.fate_sharing import own_children
from expertmesh.serving.mesh_guard import ALLOWED_ROUTES, AsgiApp, MeshGuard

MESH_TOKEN_VARIABLE = "EXPERTMESH_MESH_TOKEN"


class GroupServer(DPServer):
    async def __init__(self, llm_config: LLMConfig, group: str, **kwargs: Any) -> None:
        self._group = group
        self._mesh_token = os.environ.get(MESH_TOKEN_VARIABLE, "")
        if not self._mesh_token:
            raise RuntimeError(
                f"{MESH_TOKEN_VARIABLE} is not set on this Ray node; "
                "start the node with the mesh token in its environment"
            )
        own_children()
        await super().__init__(llm_config, **kwargs)

    async def __serve_build_asgi_app__(self) -> AsgiApp:
        app = await super().__serve_build_asgi_app__()
        app.router.routes[:] = [
            route for route in app.router.routes if getattr(route, "path", None) in ALLOWED_ROUTES
        ]
        app.add_api_route("/em/info", self._info, methods=["GET"], include_in_schema=False)
        app.add_api_route("/em/experts", self._experts, methods=["GET"], include_in_schema=False)
        return MeshGuard(app, self._mesh_token)

    async def _info(self) -> RankInfo:
        load = engine_stats.read_load()
        return RankInfo(
            group=self._group,
            model=self._llm_config.model_id,
            rank=self.dp_rank,
            world_size=self.dp_size,
            running=load.running,
            waiting=load.waiting,
            kv_usage=load.kv_usage,
        )

    async def _experts(self) -> dict[str, Any]:
        replies = await self.collective_rpc("expert_load")
        return {"group": self._group, "rank": self.dp_rank, "workers": replies}
