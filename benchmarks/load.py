"""Clients that measure: streamed chat completions, straight to ranks or through a gateway."""

import asyncio
import itertools
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp

QUESTIONS = (
    "Tell me a story about a fox.",
    "What is the sea?",
    "Tell me a story about a happy dog.",
    "What do bees make?",
)
_TIMEOUT = aiohttp.ClientTimeout(total=400)
_TEXT = re.compile(rb'"content":"[^"]')
_TOKENS = re.compile(rb'"completion_tokens":(\d+)')
_ERROR = re.compile(rb'"message":\s*"([^"]{1,160})')


@dataclass(frozen=True, slots=True)
class Target:
    """Where requests go: one gateway, or the ranks in turn."""

    name: str
    urls: tuple[str, ...]
    """Each ends before `/v1/…`."""
    headers: dict[str, str]


@dataclass(frozen=True, slots=True)
class Answer:
    sent_at_s: float
    """Unix time."""
    first_s: float | None
    """From sending to the first text; None when none came."""
    total_s: float
    tokens: int
    error: str | None


@asynccontextmanager
async def client_session() -> AsyncIterator[aiohttp.ClientSession]:
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=_TIMEOUT) as http:
        yield http


def question(model: str, number: int, max_tokens: int) -> dict[str, Any]:
    return {
        "model": model,
        "messages": [{"role": "user", "content": QUESTIONS[number % len(QUESTIONS)]}],
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "temperature": 0.0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def ask(
    http: aiohttp.ClientSession, url: str, headers: dict[str, str], body: dict[str, Any]
) -> Answer:
    """Never raises for what the other side does: a failure is an answer with an error."""
    sent_at_s, started_s = time.time(), time.perf_counter()
    first_s: float | None = None
    received = b""
    error: str | None = None
    try:
        async with http.post(f"{url}/v1/chat/completions", json=body, headers=headers) as response:
            while chunk := await response.content.readany():
                received += chunk
                if first_s is None and _TEXT.search(received):
                    first_s = time.perf_counter() - started_s
        if response.status != 200 or b"data: [DONE]" not in received or b'"error"' in received:
            error = _reason(response.status, received)
    except (aiohttp.ClientError, TimeoutError, OSError) as failure:
        error = str(failure) or type(failure).__name__
    tokens = _TOKENS.findall(received)
    total_s = time.perf_counter() - started_s
    return Answer(sent_at_s, first_s, total_s, int(tokens[-1]) if tokens else 0, error)


def _reason(status: int, received: bytes) -> str:
    found = _ERROR.search(received)
    message = found.group(1).decode(errors="replace") if found else "the stream ended early"
    return f"{status}: {message}"


class FailedRequests(Exception):
    """A measurement in which requests fail measures nothing."""


async def tokens_per_s(
    http: aiohttp.ClientSession, target: Target, model: str, concurrency: int, requests: int
) -> float:
    """Completion tokens of `requests` requests, `concurrency` at a time, over the time of all."""
    numbers = iter(range(requests))
    urls = itertools.cycle(target.urls)
    answers: list[Answer] = []

    async def client() -> None:
        for number in numbers:
            body = question(model, number, 64)
            answers.append(await ask(http, next(urls), target.headers, body))

    started_s = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(concurrency)))
    duration_s = time.perf_counter() - started_s
    raise_failures(target, answers)
    return sum(answer.tokens for answer in answers) / duration_s


@dataclass(frozen=True, slots=True)
class Pair:
    """The same request sent both ways, one after the other."""

    direct_s: float
    gateway_s: float

    @property
    def added_s(self) -> float:
        return self.gateway_s - self.direct_s


async def first_token_pairs(
    http: aiohttp.ClientSession,
    direct: Target,
    gateway: Target,
    model: str,
    pairs: int,
    limit_s: float,
) -> list[Pair]:
    """Time to first token at concurrency 1. Which way goes first alternates: the second request of
    a pair finds warmer caches."""
    urls = itertools.cycle(direct.urls)
    measured: list[Pair] = []
    until_s = time.monotonic() + limit_s
    for number in range(pairs):
        if time.monotonic() > until_s:
            break
        times: dict[str, float] = {}
        for target in (direct, gateway) if number % 2 else (gateway, direct):
            url = next(urls) if target is direct else target.urls[0]
            answer = await ask(http, url, target.headers, question(model, number // 2, 2))
            raise_failures(target, [answer])
            times[target.name] = answer.first_s or answer.total_s
        measured.append(Pair(times[direct.name], times[gateway.name]))
    return measured


def raise_failures(target: Target, answers: list[Answer]) -> None:
    errors = [answer.error for answer in answers if answer.error]
    if errors:
        raise FailedRequests(
            f"{len(errors)} of {len(answers)} requests failed ({target.name}): {errors[0]}"
        )
