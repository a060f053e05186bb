"""Requests that are wrong in some way, the same ones for the same seed."""

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

from tests.gateway.abuse.gateway_process import ALIAS
from tests.gateway.stand import MODEL

PATHS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/v1/embeddings",
    "/tokenize",
    "/v1/tokenize",
    "/detokenize",
    "/v1/detokenize",
)
_GETS = ("/v1/models", f"/v1/models/{MODEL}", "/healthz", "/readyz", "/metrics")
_READ_FIELDS = (
    "model",
    "stream",
    "stream_options",
    "max_tokens",
    "max_completion_tokens",
    "max_output_tokens",
    "n",
    "best_of",
    "prompt",
    "messages",
    "input",
    "prompt_cache_key",
    "user",
    "metadata",
    "previous_response_id",
)
_VALUES = (
    b"null",
    b"true",
    b"false",
    b"0",
    b"-1",
    b"1e999",
    b"-0.0",
    b"1e-400",
    b"1.5",
    b"9223372036854775807",
    b"9223372036854775808",
    b"18446744073709551616",
    b"-9223372036854775809",
    b"1" + b"0" * 400,
    b"1" + b"0" * 5000,
    b"NaN",
    b"Infinity",
    b"0x10",
    b"01",
    b'""',
    b'"\\ud800"',
    b'"\\udc00\\ud800"',
    b'"\\u0000"',
    b'"\xff\xfe"',
    b'"\xed\xa0\x80"',
    b'"\xf0\x9f\x98\x80"',
    b'"' + b"x" * 5000 + b'"',
    b'"\n"',
    b"'single'",
    b"[]",
    b"{}",
    b"[[[[]]]]",
    b'{"include_usage":7}',
    b'{"include_usage":true,"include_usage":false}',
    b'{"user_id":[1]}',
    b'{"user_id":"\\ud800"}',
    b'["a","b",1,null]',
    b"[1,2,3]",
    b"undefined",
    b"",
)


class End(Enum):
    """What the client does after its last byte."""

    WAIT = "waits"
    HALF_CLOSE = "closes its half"
    RESET = "resets the connection"


@dataclass(frozen=True, slots=True)
class Case:
    name: str
    pieces: tuple[bytes, ...]
    """Each is a write of its own."""
    end: End = End.WAIT
    expected: tuple[int, ...] | None = None
    """Statuses of all answers, where they are certain."""


class Maker:
    def __init__(self, secret: str, seed: int) -> None:
        self._auth = f"Authorization: Bearer {secret}\r\n".encode()
        self._secret = secret
        self._random = random.Random(seed)

    def cases(self, count: int) -> Iterator[Case]:
        """A third of them damaged bytes, the others wrong heads, bodies and keys."""
        makers: tuple[tuple[Callable[[], Case], int], ...] = (
            (self._damaged, 30),
            (self._wrong_framing, 25),
            (self._wrong_json, 35),
            (self._wrong_key, 10),
        )
        chosen = [make for make, share in makers for _ in range(count * share // 100)]
        chosen += [self._damaged] * (count - len(chosen))
        self._random.shuffle(chosen)
        for make in chosen:
            yield make()

    # Good ones, to begin with.

    def body(self, path: str, stream: bool = False) -> dict[str, Any]:
        asked: dict[str, Any] = {"model": self._random.choice((MODEL, ALIAS)), "max_tokens": 4}
        if "chat" in path or "messages" in path:
            asked["messages"] = [{"role": "user", "content": "one two"}]
        elif path == "/v1/responses" or path == "/v1/embeddings":
            asked["input"] = "one two"
        else:
            asked["prompt"] = "one two"
        if stream:
            asked["stream"] = True
        return asked

    def good(self, path: str, body: bytes | None = None, more: bytes = b"") -> bytes:
        if body is None:
            body = json.dumps(self.body(path, self._random.random() < 0.4)).encode()
        return (
            b"POST %b HTTP/1.1\r\nHost: x\r\n%bContent-Type: application/json\r\n%b"
            b"Content-Length: %d\r\n\r\n%b"
        ) % (path.encode(), self._auth, more, len(body), body)

    def get(self, path: str) -> bytes:
        return b"GET %b HTTP/1.1\r\nHost: x\r\n%b\r\n" % (path.encode(), self._auth)

    def _path(self) -> str:
        return self._random.choice(PATHS)

    def _head(self, path: str | None = None, more: bytes = b"") -> bytes:
        """Without its end."""
        path = path or self._path()
        return b"POST %b HTTP/1.1\r\nHost: x\r\n%b%b" % (path.encode(), self._auth, more)

    def _cut(self, data: bytes) -> tuple[bytes, ...]:
        """In one piece or several."""
        if self._random.random() < 0.7 or len(data) < 2:
            return (data,)
        places = sorted(self._random.randrange(1, len(data)) for _ in range(3))
        return (
            data[: places[0]],
            data[places[0] : places[1]],
            data[places[1] : places[2]],
            data[places[2] :],
        )

    def _an_end(self) -> End:
        return self._random.choices((End.WAIT, End.HALF_CLOSE, End.RESET), (6, 3, 1))[0]

    # Bytes.

    def _damaged(self) -> Case:
        draw = self._random
        if draw.random() < 0.85:
            data = bytearray(self.good(self._path()))
        else:
            data = bytearray(self.get(draw.choice(_GETS)))
        for _ in range(draw.choice((1, 1, 1, 2, 3, 8))):
            place = draw.randrange(len(data))
            match draw.randrange(7):
                case 0:
                    data[place] ^= 1 << draw.randrange(8)
                case 1:
                    data[place] = draw.choice(b'\x00\r\n\t :;,\xff\x7f{}[]"0')
                case 2:
                    del data[place : place + draw.choice((1, 2, 5, 30))]
                case 3:
                    data[place:place] = draw.randbytes(draw.choice((1, 2, 16)))
                case 4:
                    span = data[place : place + draw.choice((2, 20, 80))]
                    data[place:place] = span
                case 5:
                    other = draw.randrange(len(data))
                    data[place], data[other] = data[other], data[place]
                case _:
                    del data[place:]
            if len(data) < 2:
                break
        return Case("damaged bytes", self._cut(bytes(data)), self._an_end())

    # Heads and framing.

    def _wrong_framing(self) -> Case:
        name, make = self._random.choice(_FRAMINGS)
        return make(self, name)

    # JSON.

    def _wrong_json(self) -> Case:
        draw = self._random
        path = self._path()
        asked = self.body(path)
        # Raw, so that values may be what no encoder writes.
        fields = [(key, json.dumps(value).encode()) for key, value in asked.items()]
        kind = draw.randrange(13)
        expected: tuple[int, ...] | None = None
        if kind < 6:
            for _ in range(draw.choice((1, 1, 2, 4))):
                fields.append((draw.choice(_READ_FIELDS), draw.choice(_VALUES)))
            draw.shuffle(fields)
        elif kind == 6:
            depth = draw.choice((50, 400, draw.randrange(900, 1010), 5000, 100_000))
            opening, closing = draw.choice(((b"[", b"]"), (b'{"a":', b"}")))
            nested = opening * depth + b"1" + closing * depth
            fields += [(draw.choice((*_READ_FIELDS, "tools")), nested), ("stream", b"true")]
            if draw.random() < 0.5:
                fields.append(("stream_options", b'{"x":1}'))
        elif kind == 12:
            key = draw.choice(("\xff", "a\\ud800", "a\\x", "\xed\xa0\x80", "a\n", "\xc3\xa9"))
            fields.append((key, b"1"))
            fields.append(("stream", draw.choice((b"true", b"false"))))
            fields.append(("stream_options", draw.choice((b"{}", b"null"))))
            expected = None if key == "\xc3\xa9" else (400,)
        elif kind == 7:
            fields.append(("stream", b"true"))
            fields.append(("stream_options", draw.choice(_VALUES)))
        body = b"{" + b",".join(b'"%b":%b' % (k.encode("latin-1"), v) for k, v in fields) + b"}"
        match kind:
            case 8:
                body = draw.choice((b"\xef\xbb\xbf", b"\x00", b"\xff\xfe")) + body
                expected = (400,)
            case 9:
                body = body + draw.choice((b"}", b"x", b"\x00", b"{}", b",", b"//"))
                expected = (400,)
            case 10:
                body = draw.choice(
                    (b"[]", b"1", b"null", b'"x"', b"", b"{", b"{}", b"[" * 200_000, b"\x00" * 9)
                )
                expected = (400,)
            case 11:
                encoding = draw.choice(("utf-16", "utf-16-le", "utf-32", "utf-7"))
                body = body.decode("latin-1").encode(encoding)
                expected = None if encoding == "utf-7" else (400,)
        return Case("wrong JSON", self._cut(self.good(path, body)), expected=expected)

    # Keys.

    def _wrong_key(self) -> Case:
        draw = self._random
        secret = self._secret.encode()
        damaged = bytearray(secret)
        place = draw.randrange(len(damaged))
        damaged[place] = ord("x") if damaged[place] != ord("x") else ord("y")
        lines = draw.choice(
            (
                b"",
                b"Authorization: Bearer\r\n",
                b"Authorization: Bearer \r\n",
                b"Authorization: Basic " + secret + b"\r\n",
                b"Authorization: " + secret + b"\r\n",
                b"Authorization: Bearer " + secret[:-1] + b"\r\n",
                b"Authorization: Bearer " + secret + b"x\r\n",
                b"Authorization: Bearer " + secret + b" " + secret + b"\r\n",
                b"Authorization: Bearer " + bytes(damaged) + b"\r\n",
                b"Authorization: Bearer \xff\xfe\r\n",
                b"Authorization: Bearer " + b"x" * 20_000 + b"\r\n",
                b"x-api-key: \r\n",
                b"x-api-key: " + bytes(damaged) + b"\r\n",
                b"Cookie: key=" + secret + b"\r\n",
                b"Proxy-Authorization: Bearer " + secret + b"\r\n",
            )
        )
        path = draw.choice((*PATHS, "/admin/v1/keys", "/metrics", "/v1/models"))
        if path in PATHS:
            size = draw.choice((3, 200, 20_000))
            data = b"POST %b HTTP/1.1\r\nHost: x\r\n%bContent-Length: %d\r\n\r\n%b" % (
                path.encode(),
                lines,
                size,
                b"x" * size,
            )
        else:
            data = b"GET %b HTTP/1.1\r\nHost: x\r\n%b\r\n" % (path.encode(), lines)
        return Case("wrong key", self._cut(data), expected=(401,))


def _refused(build: Callable[[Maker], bytes], *statuses: int) -> Callable[[Maker, str], Case]:
    def make(maker: Maker, name: str) -> Case:
        # Behind it comes a request that nobody may take for one.
        data = build(maker)
        return Case(name, maker._cut(data), expected=statuses or (400,))

    return make


def _open_ended(build: Callable[[Maker], bytes], *statuses: int) -> Callable[[Maker, str], Case]:
    """Something is missing: the client waits for an answer, or goes."""

    def make(maker: Maker, name: str) -> Case:
        end = maker._random.choices((End.WAIT, End.HALF_CLOSE, End.RESET), (2, 6, 2))[0]
        expected = statuses if end is End.WAIT else None
        return Case(name, maker._cut(build(maker)), end, expected)

    return make


_BODY = json.dumps({"model": MODEL, "prompt": "one"}).encode()
_SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n"


def _framed(framing: bytes) -> Callable[[Maker], bytes]:
    return lambda maker: maker._head(more=framing) + _SMUGGLED


def _line(line: bytes) -> Callable[[Maker], bytes]:
    return lambda maker: line + b"\r\nHost: x\r\n" + maker._auth + b"\r\n"


def _chunked(*chunks: bytes, head: bytes = b"") -> Callable[[Maker], bytes]:
    framing = b"Transfer-Encoding: chunked\r\n" + head + b"\r\n"
    return lambda maker: maker._head("/v1/completions", framing) + b"".join(chunks)


def _good_chunk(body: bytes = _BODY) -> bytes:
    return b"%x\r\n%b\r\n" % (len(body), body)


def _pipelined(maker: Maker, name: str) -> Case:
    count = maker._random.choice((1, 2, 7, 40))
    good = b"".join(maker.good(maker._path()) for _ in range(count))
    bad = maker._random.choice((b"NONSENSE\r\n\r\n", b"\x00", b"GET /x HTTP/9.9\r\n\r\n"))
    return Case(name, maker._cut(good + bad), expected=(200,) * count + (400,))


def _many_gets(maker: Maker, name: str) -> Case:
    count = maker._random.choice((50, 400))
    return Case(name, (maker.get("/healthz") * count,), expected=(200,) * count)


def _one_byte_chunks(maker: Maker, name: str) -> Case:
    body = b"".join(b"1\r\n%b\r\n" % bytes((byte,)) for byte in _BODY)
    return Case(name, (_chunked(body, b"0\r\n\r\n")(maker),), expected=(200,))


def _short_body(maker: Maker) -> bytes:
    data = maker.good(maker._path())
    return data[: -maker._random.randrange(1, 20)]


def _half_head(maker: Maker) -> bytes:
    data = maker.good(maker._path())
    return data[: maker._random.randrange(1, data.index(b"\r\n\r\n"))]


_TE = b"Transfer-Encoding: chunked\r\n"
_FRAMINGS: tuple[tuple[str, Callable[[Maker, str], Case]], ...] = (
    ("length and chunks", _refused(_framed(b"Content-Length: 5\r\n" + _TE + b"\r\n0\r\n\r\n"))),
    ("chunks and length", _refused(_framed(_TE + b"Content-Length: 5\r\n\r\n0\r\n\r\n"))),
    ("two lengths", _refused(_framed(b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello!"))),
    ("list of lengths", _refused(_framed(b"Content-Length: 5, 5\r\n\r\nhello"))),
    ("signed length", _refused(_framed(b"Content-Length: +5\r\n\r\nhello"))),
    ("negative length", _refused(_framed(b"Content-Length: -1\r\n\r\n"))),
    ("hexadecimal length", _refused(_framed(b"Content-Length: 0x5\r\n\r\nhello"))),
    ("no length", _refused(_framed(b"Content-Length:\r\n\r\n"))),
    ("underscored length", _refused(_framed(b"Content-Length: 1_0\r\n\r\nhello"))),
    ("overflowing length", _refused(_framed(b"Content-Length: " + b"9" * 40 + b"\r\n\r\n"))),
    ("endless length", _refused(_framed(b"Content-Length: " + b"9" * 6000 + b"\r\n\r\n"))),
    ("length over the limit", _refused(_framed(b"Content-Length: 99999999999\r\n\r\n"), 413)),
    ("space before the colon", _refused(_framed(b"Content-Length : 5\r\n\r\nhello"))),
    ("tab before the colon", _refused(_framed(b"Transfer-Encoding\t: chunked\r\n\r\n"))),
    ("unknown encoding", _refused(_framed(b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n"))),
    ("encodings after chunked", _refused(_framed(b"Transfer-Encoding: chunked, x\r\n\r\n"))),
    (
        "gzip and chunks",
        _refused(_framed(b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n"), 501),
    ),
    ("chunked twice", _refused(_framed(_TE + _TE + b"\r\n0\r\n\r\n"))),
    ("folded header", _refused(_framed(b"X-A: b\r\n Content-Length: 5\r\n\r\nhello"))),
    ("folded with a tab", _refused(_framed(b"X-A: b\r\n\tc\r\n\r\n"))),
    ("line feed alone", _refused(_framed(b"X-A: b\nContent-Length: 5\r\n\r\nhello"))),
    ("carriage return alone", _refused(_framed(b"X-A: b\rX-B: c\r\n\r\n"))),
    ("null in a value", _refused(_framed(b"X-A: a\x00b\r\n\r\n"))),
    ("null in a name", _refused(_framed(b"X\x00A: ab\r\n\r\n"))),
    ("no name", _refused(_framed(b": b\r\n\r\n"))),
    ("no colon", _refused(_framed(b"NoColonHere\r\n\r\n"))),
    ("space in a name", _refused(_framed(b"X A: b\r\n\r\n"))),
    ("second host", _refused(_framed(b"Host: y\r\n\r\n"))),
    ("unknown expectation", _refused(_framed(b"Expect: magic\r\nContent-Length: 0\r\n\r\n"), 417)),
    ("too many headers", _refused(_framed(b"X: y\r\n" * 300 + b"\r\n"), 431)),
    ("huge header", _refused(_framed(b"X: " + b"y" * 200_000 + b"\r\n\r\n"), 431)),
    ("huge name", _refused(_framed(b"y" * 200_000 + b": x\r\n\r\n"), 431)),
    ("huge target", _refused(_line(b"GET /" + b"y" * 200_000 + b" HTTP/1.1"), 431)),
    ("version 1.2", _refused(_line(b"GET /healthz HTTP/1.2"))),
    ("version 2.0", _refused(_line(b"PRI * HTTP/2.0"))),
    ("version 0.9", _refused(_line(b"GET /healthz HTTP/0.9"))),
    ("no version", _refused(_line(b"GET /healthz"))),
    ("other protocol", _refused(_line(b"GET /healthz ICE/1.0"))),
    ("small letters", _refused(_line(b"get /healthz HTTP/1.1"))),
    ("unknown method", _refused(_line(b"BREW /healthz HTTP/1.1"))),
    ("null in the target", _refused(_line(b"GET /a\x00b HTTP/1.1"))),
    ("space in the target", _refused(_line(b"GET /a b HTTP/1.1"))),
    ("TLS hello", _refused(lambda maker: b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")),
    ("another path", _refused(_line(b"GET /em/info HTTP/1.1"), 404)),
    ("dots in the path", _refused(_line(b"GET /v1/../em/info HTTP/1.1"), 404)),
    ("encoded path", _refused(_line(b"GET /v1/%63hat/completions HTTP/1.1"), 404)),
    ("absolute URL", _refused(_line(b"GET http://a.example/em/info HTTP/1.1"), 404)),
    ("absolute URL of another kind", _refused(_line(b"GET ftp://a.example/healthz HTTP/1.1"), 404)),
    ("tunnel", _refused(_line(b"CONNECT a.example:443 HTTP/1.1"), 404)),
    ("asterisk", _refused(_line(b"OPTIONS * HTTP/1.1"), 404)),
    ("DELETE of an endpoint", _refused(_line(b"DELETE /v1/completions HTTP/1.1"), 405)),
    ("invalid UTF-8 in a model", _refused(_line(b"GET /v1/models/%ff%fe%00 HTTP/1.1"), 404)),
    ("no chunk size", _refused(_chunked(b"\r\nhello\r\n0\r\n\r\n"))),
    ("chunk size that is no number", _refused(_chunked(b"zz\r\nhello\r\n0\r\n\r\n"))),
    ("signed chunk size", _refused(_chunked(b"+5\r\nhello\r\n0\r\n\r\n"))),
    ("negative chunk size", _refused(_chunked(b"-5\r\nhello\r\n0\r\n\r\n"))),
    ("marked chunk size", _refused(_chunked(b"0x5\r\nhello\r\n0\r\n\r\n"))),
    ("space in the chunk size", _refused(_chunked(b"5 \r\nhello\r\n0\r\n\r\n"))),
    ("overflowing chunk size", _refused(_chunked(b"f" * 17 + b"\r\nhello"))),
    ("chunk longer than said", _refused(_chunked(b"3\r\nhello\r\n0\r\n\r\n"))),
    ("line feed after a chunk", _refused(_chunked(b"5\r\nhello\n0\r\n\r\n"))),
    ("null in a trailer", _refused(_chunked(_good_chunk(), b"0\r\nX: a\x00\r\n\r\n"))),
    ("endless trailers", _refused(_chunked(_good_chunk(), b"0\r\n", b"X: y\r\n" * 150_000), 431)),
    ("huge trailer", _refused(_chunked(_good_chunk(), b"0\r\nX: ", b"y" * 900_000), 431)),
    ("huge chunk extension", _refused(_chunked(b"1;" + b"x" * 900_000), 431)),
    ("trailers that name a key", _refused(_chunked(b"0\r\nAuthorization: Bearer x\r\n\r\n"))),
    ("compressed", _refused(_chunked(_good_chunk(), head=b"Content-Encoding: gzip\r\n"), 415)),
    ("chunks without an end", _open_ended(_chunked(_good_chunk()), 408)),
    ("chunk over the limit", _open_ended(_chunked(b"7fffffff\r\n", b"x" * 9000), 408)),
    ("half a chunk", _open_ended(_chunked(b"ff\r\nhello"), 408)),
    ("half a body", _open_ended(_short_body, 408)),
    ("half a head", _open_ended(_half_head, 408)),
    ("nothing", _open_ended(lambda maker: b"")),
    ("empty lines", _open_ended(lambda maker: b"\r\n" * 50)),
    ("good ones before a bad one", _pipelined),
    ("many at once", _many_gets),
    ("chunks of one byte", _one_byte_chunks),
)
