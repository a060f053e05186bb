"""ASGI middleware of a rank: an allow-list of routes, and the mesh token on all but health."""

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from expertmesh.core.domain.mesh_token import MeshToken

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
AsgiApp = Callable[[Scope, Receive, Send], Awaitable[None]]

MESH_TOKEN_HEADER = b"x-em-mesh-token"

# What a rank offers. Everything else of vLLM's app changes the engine (sleep, collective_rpc,
# scale_elastic_ep, weight updates, LoRA loading, profiling, cache resets) and stays unreachable.
ALLOWED_ROUTES = frozenset(
    {
        "/health",
        "/metrics",
        "/version",
        "/em/info",
        "/em/experts",
        "/tokenize",
        "/detokenize",
        "/v1/models",
        "/v1/models/{model:path}",
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/responses",
        "/v1/responses/{response_id}",
        "/v1/responses/{response_id}/cancel",
        "/v1/messages",
        "/v1/messages/count_tokens",
        "/v1/embeddings",
        "/v1/audio/transcriptions",
        "/v1/audio/translations",
        "/v1/rerank",
        "/v1/score",
        "/pooling",
        "/classify",
    }
)
_OPEN_PATHS = ("/health",)


class MeshGuard:
    """Answers 401 to a request without the mesh token, before anything reads its body."""

    def __init__(self, app: AsgiApp, mesh_token: str) -> None:
        self._app = app
        self._token = MeshToken(mesh_token)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self._may_pass(scope):
            await _refuse(send)
            return
        if scope["type"] == "websocket" and not self._may_pass(scope):
            await send({"type": "websocket.close", "code": 1008})
            return
        await self._app(scope, receive, send)

    def _may_pass(self, scope: Scope) -> bool:
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if path in _OPEN_PATHS:
            return True
        for name, value in scope["headers"]:
            if name == MESH_TOKEN_HEADER:
                return self._token.admits(value)
        return False


async def _refuse(send: Send) -> None:
    body = json.dumps(
        {
            "error": {
                "message": "a rank answers its mesh only: send requests to the gateway",
                "type": "authentication_error",
                "param": None,
                "code": "mesh_token_required",
            }
        }
    ).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 401, "headers": headers})
    await send({"type": "http.response.body", "body": body})
