"""Runs an ASGI application behind the gateway's own server: for the few routes that may be slow."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final
from urllib.parse import unquote_to_bytes

from expertmesh.core.domain.tenant import Caller
from expertmesh.gateway.answers import header_lines, id_lines
from expertmesh.gateway.api import ApiError, Protocol, error_body
from expertmesh.gateway.client_connection import ClientConnection, Request
from expertmesh.gateway.flight import CLIENT_CLOSED

Message = MutableMapping[str, Any]
AsgiApp = Callable[
    [Message, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]],
    Awaitable[None],
]

_log = logging.getLogger(__name__)
_NOT_PASSED_ON: Final = frozenset((b"content-length", b"transfer-encoding", b"connection"))


class _Answer:
    """Watches the client and collects what the application sends."""

    def __init__(self) -> None:
        self.status = 500
        self.lines = b""
        self.body = b""
        self.task: asyncio.Task[None] | None = None

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.lines = header_lines(
                [header for header in message["headers"] if header[0] not in _NOT_PASSED_ON]
            )
        else:
            self.body += message.get("body", b"")

    def client_gone(self) -> None:
        if self.task is not None:
            self.task.cancel()

    def client_full(self) -> None: ...

    def client_drained(self) -> None: ...


class AsgiBridge:
    def __init__(self, app: AsgiApp) -> None:
        self._app: Final = app
        self._tasks: set[asyncio.Task[None]] = set()

    def serve(
        self,
        request: Request,
        client: ClientConnection,
        caller: Caller,
        request_id: str,
        answered: Callable[[int], None],
    ) -> None:
        """Caller and request id stand in `scope["state"]`; `answered` gets the status, once."""
        answer = _Answer()
        client.watcher = answer
        task = asyncio.get_running_loop().create_task(
            self._run(request, client, caller, request_id, answer)
        )
        # Also when the client goes away before the task has begun.
        task.add_done_callback(
            lambda done: answered(CLIENT_CLOSED if done.cancelled() else answer.status)
        )
        answer.task = task
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _run(
        self,
        request: Request,
        client: ClientConnection,
        caller: Caller,
        request_id: str,
        answer: _Answer,
    ) -> None:
        path = request.path.encode("latin-1")
        scope: Message = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": request.version,
            "method": request.method.decode(),
            "scheme": "http",
            "path": _decoded(path),
            "raw_path": path,
            "root_path": "",
            "query_string": request.query,
            "headers": [
                (b"content-type", request.headers.content_type),
                (b"content-length", str(len(request.body)).encode()),
            ],
            "client": None,
            "server": None,
            "state": {"caller": caller, "request_id": request_id},
        }
        sent = False

        async def receive() -> Message:
            nonlocal sent
            if sent:
                # A client that goes away cancels all of this.
                await asyncio.Event().wait()
            sent = True
            return {"type": "http.request", "body": request.body, "more_body": False}

        try:
            await self._app(scope, receive, answer.send)
        except Exception:
            _log.exception("the gateway failed at %s", request.path[:200])
            error = ApiError(500, "The gateway failed; its log says why.")
            answer.status, answer.lines = 500, b"content-type: application/json\r\n"
            answer.body = error_body(Protocol.OPENAI, error, request_id)
        lines = answer.lines + id_lines(Protocol.OPENAI, request_id)
        client.send_whole(answer.status, lines, answer.body)


def _decoded(path: bytes) -> str:

    return unquote_to_bytes(path).decode("utf-8", "replace")
