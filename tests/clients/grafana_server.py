"""A server with those endpoints of Grafana's HTTP API that are used: our own mock, no Grafana.

It keeps what it is sent as Grafana does: dashboards get an id and a version and are brought to its
own form, folders get a uid, and a contact point belongs to this API unless a header says otherwise.
"""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "glsa_test"


class GrafanaState:
    def __init__(self) -> None:
        self.folders: dict[str, dict[str, Any]] = {}
        self.data_sources: dict[str, dict[str, Any]] = {}
        self.dashboards: dict[str, dict[str, Any]] = {}
        self.contacts: dict[str, dict[str, Any]] = {}
        self.writes: list[str] = []
        self.refuse_writes = 0
        """Status of every answer to a write; 0: they are done."""
        self.url = ""

    def read(self, path: str) -> Any:
        kind, _, uid = path.rpartition("/")
        if path == "/api/v1/provisioning/contact-points":
            return list(self.contacts.values())
        if kind == "/api/dashboards/uid" and uid in self.dashboards:
            return self.dashboards[uid]
        known = {"/api/folders": self.folders, "/api/datasources/uid": self.data_sources}
        return known.get(kind, {}).get(uid)

    def write(
        self, method: str, path: str, body: dict[str, Any], provenance: str
    ) -> tuple[int, Any]:
        self.writes.append(f"{method} {path}")
        if self.refuse_writes:
            return self.refuse_writes, {"message": "refused"}
        uid = path.rpartition("/")[2]
        match method, path.removesuffix(f"/{uid}"):
            case "PUT", "/api/folders":
                self.folders[uid] |= body
            case "PUT", "/api/datasources/uid":
                self.data_sources[uid] = body
            case "PUT", "/api/v1/provisioning/contact-points":
                if self.contacts[uid]["provenance"] not in ("", provenance):
                    return 409, {"message": "cannot change provenance"}
                self.contacts[uid] = {**body, "provenance": provenance}
                return 202, {"message": "contactpoint updated"}
            case _:
                return 404, {"message": f"{method} {path}: not found"}
        return 200, {}

    def create(self, path: str, body: dict[str, Any], provenance: str) -> tuple[int, Any]:
        self.writes.append(f"POST {path}")
        if self.refuse_writes:
            return self.refuse_writes, {"message": "refused"}
        if path == "/api/folders":
            self.folders[body["uid"]] = {**body, "id": 1, "version": 1}
        elif path == "/api/datasources":
            self.data_sources[body["uid"]] = {**body, "id": 1, "readOnly": False}
        elif path == "/api/dashboards/db":
            if body["folderUid"] not in self.folders:
                return 400, {"message": "folder not found"}
            uid = body["dashboard"]["uid"]
            version = self.dashboards.get(uid, {"dashboard": {"version": 0}})["dashboard"][
                "version"
            ]
            stored = _in_its_form({**body["dashboard"], "id": 7, "version": version + 1})
            meta = {"folderUid": body["folderUid"]}
            self.dashboards[uid] = {"dashboard": stored, "meta": meta}
        elif path == "/api/v1/provisioning/contact-points":
            self.contacts[body["uid"]] = {**body, "provenance": provenance}
            return 202, self.contacts[body["uid"]]
        else:
            return 404, {"message": f"POST {path}: not found"}
        return 200, {}


def _in_its_form(dashboard: dict[str, Any]) -> dict[str, Any]:
    """As newer releases do, that add what is theirs."""
    panels = [{**panel, "pluginVersion": "12.0.0"} for panel in dashboard["panels"]]
    return {**dashboard, "panels": panels, "schemaVersion": 42, "preload": False}


@contextmanager
def grafana_server() -> Iterator[GrafanaState]:
    state = GrafanaState()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self._may():
                found = state.read(self.path)
                if found is None:
                    self._answer(404, {"message": "not found"})
                else:
                    self._answer(200, found)

        def do_POST(self) -> None:
            if self._may():
                self._answer(*state.create(self.path, self._body(), self._provenance()))

        def do_PUT(self) -> None:
            if self._may():
                self._answer(*state.write("PUT", self.path, self._body(), self._provenance()))

        def _provenance(self) -> str:
            return "" if self.headers["X-Disable-Provenance"] == "true" else "api"

        def _may(self) -> bool:
            if self.headers["Authorization"] == f"Bearer {TOKEN}":
                return True
            self._body()
            self._answer(401, {"message": "Invalid API key"})
            return False

        def _body(self) -> Any:
            length = int(self.headers.get("Content-Length") or 0)
            return json.loads(self.rfile.read(length) or b"null")

        def _answer(self, status: int, content: Any) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
