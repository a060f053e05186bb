"""Answers as they stand on the wire, read strictly."""

import re
from dataclasses import dataclass

_HEAD = re.compile(rb"HTTP/1\.1 (\d{3}) [^\r\n]*\r\n((?:[!-9;-~]+: ?[^\r\n]*\r\n)*)\r\n")


class BadAnswer(Exception):
    """What came is no HTTP."""


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def closes(self) -> bool:
        return self.headers.get("connection") == "close"


def read_answers(data: bytes, ended: bool = False) -> list[Answer]:
    """The whole answers, without interim ones. Raises BadAnswer.

    `ended`: nothing follows, so an answer without a length is whole.
    """
    answers = []
    place = 0
    while place < len(data):
        end = data.find(b"\r\n\r\n", place)
        if end < 0:
            break
        found = _HEAD.fullmatch(data, place, end + 4)
        if found is None:
            raise BadAnswer(data[place : place + 300])
        place = end + 4
        status = int(found[1])
        if status == 100:
            continue
        headers: dict[str, str] = {}
        for line in found[2].split(b"\r\n")[:-1]:
            name, _, value = line.partition(b":")
            headers[name.decode().lower()] = value.strip().decode()
        if "content-length" in headers:
            size = int(headers["content-length"])
            body, place = data[place : place + size], place + size
            if place > len(data):
                break
        elif headers.get("transfer-encoding") == "chunked":
            chunks = _read_chunks(data, place)
            if chunks is None:
                break
            body, place = chunks
        elif not ended:
            break
        else:
            body, place = data[place:], len(data)
        answers.append(Answer(status, headers, body))
    return answers


def _read_chunks(data: bytes, place: int) -> tuple[bytes, int] | None:
    """The body, and where it ends; None when it does not end yet."""
    parts: list[bytes] = []
    while True:
        end = data.find(b"\r\n", place)
        if end < 0:
            return None
        line = data[place:end]
        if not re.fullmatch(rb"[0-9a-f]{1,8}", line):
            raise BadAnswer(line)
        size = int(line, 16)
        place = end + 2 + size + 2
        if place > len(data):
            return None
        if data[place - 2 : place] != b"\r\n":
            raise BadAnswer(data[end:place][-300:])
        if not size:
            return b"".join(parts), place
        parts.append(data[end + 2 : place - 2])
