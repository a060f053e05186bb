"""The gateway's listening socket and its open connections."""

import asyncio
import socket
from collections.abc import Callable
from typing import Final

from expertmesh.gateway.client_connection import ClientConnection, Handler
from expertmesh.gateway.limits import GatewayLimits

BACKLOG: Final = 4096


class GatewayServer:
    def __init__(self, handler: Handler, limits: GatewayLimits, now_s: Callable[[], float]) -> None:
        """`now_s` is a monotonic clock."""
        self._handler: Final = handler
        self._limits = limits
        self._now_s: Final = now_s
        self._connections: set[ClientConnection] = set()
        self._servers: list[asyncio.Server] = []

    @property
    def connections(self) -> int:
        return len(self._connections)

    async def start(self, listener: socket.socket) -> None:
        """Accept connections; the socket is closed with the server."""
        loop = asyncio.get_running_loop()
        self._servers.append(
            await loop.create_server(self._connection, sock=listener, backlog=BACKLOG)
        )

    def use(self, limits: GatewayLimits) -> None:
        self._limits = limits
        for connection in self._connections:
            connection.use(limits)

    def sweep(self, now_s: float) -> None:
        for connection in list(self._connections):
            connection.check(now_s)

    async def drain(self, timeout_s: float, open_calls: Callable[[], int]) -> bool:
        """Refuse new connections and wait until the last request is answered. False when the time
        was over before."""
        for server in self._servers:
            server.close()
        deadline_s = self._now_s() + timeout_s
        while True:
            for connection in list(self._connections):
                connection.drain()
            if not open_calls() and not self._connections:
                return True
            if self._now_s() >= deadline_s:
                return False
            await asyncio.sleep(0.02)

    def close(self) -> None:
        for server in self._servers:
            server.close()
        for connection in list(self._connections):
            connection.close()

    def _connection(self) -> ClientConnection:
        return ClientConnection(self._handler, self._connections, self._limits, self._now_s)
