"""An OTLP/HTTP collector in this process: keeps the spans that it is sent."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


@dataclass(frozen=True, slots=True)
class Received:
    service: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str
    """Empty: it has none."""
    started_at_s: float
    ended_at_s: float
    attributes: dict[str, str | int]
    events: tuple[tuple[str, dict[str, str | int]], ...]


class Receiver:
    def __init__(self) -> None:
        self.url = ""
        self.spans: list[Received] = []

    def wait_for(self, what: Callable[[Received], bool], timeout_s: float = 10.0) -> Received:
        deadline_s = time.monotonic() + timeout_s
        while True:
            for span in list(self.spans):
                if what(span):
                    return span
            names = sorted({f"{span.service}: {span.name}" for span in self.spans})
            assert time.monotonic() < deadline_s, f"no such span; there are {names}"
            time.sleep(0.05)


@contextmanager
def otlp_receiver() -> Iterator[Receiver]:
    receiver = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.path == "/v1/traces":
                if self.headers.get("Content-Encoding") is None:
                    receiver.spans += _spans(ExportTraceServiceRequest.FromString(body))
                self.send_response(200)
            else:
                self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    receiver.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield receiver
    finally:
        server.shutdown()
        server.server_close()


def _spans(request: ExportTraceServiceRequest) -> list[Received]:
    found = []
    for resource in request.resource_spans:
        service = str(_values(resource.resource.attributes).get("service.name", ""))
        for scope in resource.scope_spans:
            for span in scope.spans:
                found.append(
                    Received(
                        service,
                        span.name,
                        span.trace_id.hex(),
                        span.span_id.hex(),
                        span.parent_span_id.hex(),
                        span.start_time_unix_nano / 1e9,
                        span.end_time_unix_nano / 1e9,
                        _values(span.attributes),
                        tuple((event.name, _values(event.attributes)) for event in span.events),
                    )
                )
    return found


def _values(attributes: object) -> dict[str, str | int]:
    return {
        each.key: getattr(each.value, each.value.WhichOneof("value"))
        for each in attributes  # type: ignore[attr-defined]
    }
