"""The hub, asked over a socket that a test opens, and not asked without a network."""

import socket
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from expertmesh.clients.hugging_face import hub_file
from expertmesh.errors import ManifestError, UpstreamUnavailable

constants = pytest.importorskip("huggingface_hub.constants")
file_download = pytest.importorskip("huggingface_hub.file_download")

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {"/maker/model/resolve/main/config.json": b'{"architectures": ["A"]}'}


class Hub(BaseHTTPRequestHandler):
    """Answers as the real one does, for one model."""

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        content = FILES.get(self.path)
        if content is not None:
            self.send_response(200)
            self.send_header("ETag", '"etag"')
        elif self.path.startswith("/maker/model/resolve/main/"):
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
        elif self.path.startswith("/maker/closed/"):
            self.send_response(403)
            self.send_header("X-Error-Code", "GatedRepo")
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(content or b"")))
        self.end_headers()
        if body:
            self.wfile.write(content or b"")

    def log_message(self, format: str, *args: object) -> None:
        pass


def point_at(monkeypatch: pytest.MonkeyPatch, url: str, cache: Path) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    point_at(monkeypatch, f"http://127.0.0.1:{server.server_port}", tmp_path)
    yield
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    point_at(monkeypatch, f"http://127.0.0.1:{port}", tmp_path)


@pytest.mark.usefixtures("hub")
def test_a_file_is_fetched() -> None:
    path = hub_file("maker/model", "main", "config.json")
    assert path is not None and path.read_bytes() == b'{"architectures": ["A"]}'


@pytest.mark.usefixtures("hub")
def test_a_file_that_the_model_does_not_have() -> None:
    assert hub_file("maker/model", "main", "model.safetensors.index.json") is None


@pytest.mark.usefixtures("hub")
def test_a_model_that_the_hub_does_not_have() -> None:
    with pytest.raises(ManifestError, match="maker/other: the hub has no such model"):
        hub_file("maker/other", "main", "config.json")


@pytest.mark.usefixtures("hub")
def test_a_model_that_asks_for_a_token() -> None:
    with pytest.raises(UpstreamUnavailable, match="set HF_TOKEN"):
        hub_file("maker/closed", "main", "config.json")


@pytest.mark.usefixtures("no_hub")
def test_without_a_connection_nothing_is_found() -> None:
    with pytest.raises(UpstreamUnavailable, match="no connection, and nothing in its cache"):
        hub_file("maker/model", "main", "config.json")


def test_what_was_fetched_is_found_without_a_connection(
    hub: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fetched = hub_file("maker/model", "main", "config.json")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub_file("maker/model", "main", "config.json") == fetched
    assert hub_file("maker/model", "main", "model.safetensors.index.json") is None
