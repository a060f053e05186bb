"""The uvicorn server of the gateway: one listening socket, no global signal handling of its own."""

import contextlib
from collections.abc import Iterator

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from expertmesh.gateway.app import Gateway

_KEEP_ALIVE_S = 75
"""Longer than clients keep idle connections, so that none is used while it closes."""
_MOST_HEADER_BYTES = 64 * 1024
BACKLOG = 4096


class _HeaderLimitError(Exception):
    """The parser turns it into an answer with status 400 and closes the connection."""


class _BoundedHeaders(HttpToolsProtocol):
    """httptools collects header fields without end; the application only sees them when whole."""

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._header_bytes = 0

    def on_header(self, name: bytes, value: bytes) -> None:
        self._header_bytes += len(name) + len(value)
        if self._header_bytes > _MOST_HEADER_BYTES:
            raise _HeaderLimitError
        super().on_header(name, value)


class GatewayServer(uvicorn.Server):
    """Set `should_exit` to drain it."""

    def __init__(self, app: Gateway, drain_timeout_s: float) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                loop="none",
                http=_BoundedHeaders,
                ws="none",
                lifespan="off",
                interface="asgi3",
                access_log=False,
                log_config=None,
                proxy_headers=False,
                server_header=False,
                backlog=BACKLOG,
                timeout_keep_alive=_KEEP_ALIVE_S,
                timeout_graceful_shutdown=drain_timeout_s,  # type: ignore[arg-type]
            )
        )

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """The caller decides when to stop: signals raised again would skip writing the ledger."""
        yield
