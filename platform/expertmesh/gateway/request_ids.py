"""Ids of requests: unique over all workers and starts, without a system call each."""

import itertools
import secrets


class RequestIds:
    def __init__(self) -> None:
        self._prefix = f"req_{secrets.token_hex(8)}"
        self._numbers = itertools.count(1)

    def new(self) -> str:
        return f"{self._prefix}{next(self._numbers):08x}"
