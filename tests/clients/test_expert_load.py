"""A rank, asked over a socket that a test opens."""

import json
import socket
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from expertmesh.clients.expert_load import read_expert_load
from expertmesh.errors import UpstreamUnavailable

TOKEN = "secret"
ANSWER = {"group": "em-m-p-1", "rank": 0, "layers": [{"layer": 0, "tokens": {"0": 5}}]}


class Rank(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            self.send_response(401)
            self.end_headers()
        elif self.path in ("/em-m-p-1/em/experts", "/odd/em/experts"):
            self.send_response(200)
            self.end_headers()
            text = json.dumps(ANSWER) if "odd" not in self.path else "<html>"
            self.wfile.write(text.encode())
        else:
            self.send_response(404)
            self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Rank)
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_rank_answers_who_has_the_token(url: str) -> None:
    for base in (f"{url}/em-m-p-1", f"{url}/em-m-p-1/", f"{url}/em-m-p-1/em/experts"):
        assert read_expert_load(base, TOKEN) == ANSWER


@pytest.mark.parametrize(
    ("path", "token", "words"),
    [
        ("/em-m-p-1", "wrong", "401 Unauthorized; the mesh token is not the group's"),
        ("/other", TOKEN, "404 Not Found"),
        ("/odd", TOKEN, "answers no JSON"),
    ],
)
def test_what_a_rank_refuses_is_said_without_the_token(
    url: str, path: str, token: str, words: str
) -> None:
    with pytest.raises(UpstreamUnavailable) as caught:
        read_expert_load(url + path, token)
    message = str(caught.value)
    assert f"{url}{path}/em/experts: " in message and words in message
    assert "secret" not in message and "wrong" not in message


def test_nobody_listens() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(UpstreamUnavailable, match="does not answer"):
        read_expert_load(f"http://127.0.0.1:{port}", TOKEN)


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://host/x", "host:80"])
def test_only_http_is_asked(url: str) -> None:
    with pytest.raises(UpstreamUnavailable, match="is no URL of a rank"):
        read_expert_load(url, TOKEN)
