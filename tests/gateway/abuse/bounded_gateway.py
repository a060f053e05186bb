"""`expertmesh gateway` with bounds that the command does not offer, so that no test has to wait.

python -m tests.gateway.abuse.bounded_gateway SETTINGS
"""

import os
import socket
import sys
from pathlib import Path

import msgspec

from expertmesh.core.domain.gateway import GatewayConfig
from expertmesh.gateway.limits import GatewayLimits
from expertmesh.launch.gateway import GatewaySettings, listen, log_to_stderr, run_worker


class Settings(msgspec.Struct):
    port: int
    controller_url: str
    store_url: str
    state_dir: str
    limits: dict[str, float]
    """Fields of GatewayLimits."""
    send_buffer_bytes: int | None
    """Of each client's connection, in the kernel; None for the kernel's own choice."""


def main() -> None:
    settings = msgspec.json.decode(sys.argv[1], type=Settings)
    log_to_stderr()
    listener = listen("127.0.0.1", settings.port)
    if settings.send_buffer_bytes is not None:
        # Accepted connections inherit it.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, settings.send_buffer_bytes)
    run_worker(
        GatewaySettings(
            config=GatewayConfig("127.0.0.1", settings.port),
            controller_url=settings.controller_url,
            state_dir=Path(settings.state_dir),
            store_url=settings.store_url,
            mesh_token=os.environ["EXPERTMESH_MESH_TOKEN"],
            limits=msgspec.convert(settings.limits, GatewayLimits, strict=False),
        ),
        listener,
    )


if __name__ == "__main__":
    main()
