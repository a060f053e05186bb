"""The guard in front of a rank: token, allow-list, health."""

from typing import Any

import pytest

from expertmesh.serving.mesh_guard import ALLOWED_ROUTES, MeshGuard

FORBIDDEN = (
    "/scale_elastic_ep",
    "/is_scaling_elastic_ep",
    "/collective_rpc",
    "/sleep",
    "/wake_up",
    "/pause",
    "/resume",
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
    "/start_profile",
    "/stop_profile",
    "/reset_prefix_cache",
    "/update_weights",
    "/fault_tolerance/apply",
    "/server_info",
    "/docs",
    "/openapi.json",
)


async def answer(path: str, *headers: tuple[bytes, bytes], kind: str = "http") -> list[Any]:
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send("reached the engine")

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        raise AssertionError("the guard must not read the body")

    scope = {"type": kind, "path": path, "root_path": "/em-m-p-1", "headers": list(headers)}
    await MeshGuard(app, "secret")(scope, receive, send)
    return sent


async def test_the_token_opens_the_door() -> None:
    sent = await answer("/em-m-p-1/v1/models", (b"x-em-mesh-token", b"secret"))
    assert sent == ["reached the engine"]


@pytest.mark.parametrize(
    "headers",
    [
        (),
        ((b"x-em-mesh-token", b"wrong"),),
        ((b"x-em-mesh-token", b""),),
        ((b"authorization", b"Bearer secret"),),
        ((b"x-em-mesh-token", b"wrong,worse"),),
        ((b"x-em-mesh-token", b","),),
    ],
)
async def test_without_it_nothing_is_reached(headers: tuple[tuple[bytes, bytes], ...]) -> None:
    start, body = await answer("/em-m-p-1/v1/models", *headers)
    assert start["status"] == 401
    assert b"mesh_token_required" in body["body"]


async def test_health_is_open() -> None:
    assert await answer("/em-m-p-1/health") == ["reached the engine"]


async def test_health_opens_no_other_path() -> None:
    start, _ = await answer("/em-m-p-1/health/../v1/models")
    assert start["status"] == 401


async def test_a_websocket_needs_the_token_too() -> None:
    assert await answer("/em-m-p-1/v1/realtime", kind="websocket") == [
        {"type": "websocket.close", "code": 1008}
    ]


@pytest.mark.parametrize("path", FORBIDDEN)
def test_routes_that_change_the_engine_are_not_offered(path: str) -> None:
    assert path not in ALLOWED_ROUTES
