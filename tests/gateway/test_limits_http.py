"""Limits of tenants and keys, and their money, as clients and the ledger see them."""

import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from decimal import Decimal
from typing import Any

import aiohttp
import pytest
from anthropic import AsyncAnthropic
from anthropic import RateLimitError as AnthropicRateLimitError
from openai import AsyncOpenAI, NotFoundError, RateLimitError
from tests.gateway.stand import (
    MODEL,
    QUICK,
    SECRET,
    Stand,
    group_of,
    served_model,
    standing,
    until,
)
from tests.mock_rank import Fault, MockRank

from expertmesh.core.admission.limit_book import LimitBook
from expertmesh.core.admission.reservation import PICO_PER_USD, Estimate, Refused, Reserved
from expertmesh.core.domain.fleet import GroupState
from expertmesh.core.domain.tenant import Account, Limits
from expertmesh.core.metering.usage import Outcome
from expertmesh.gateway.limiter import LocalLimiter
from expertmesh.gateway.limits import GatewayLimits

MESSAGES: Any = [{"role": "user", "content": "one two three"}]
CHAT: dict[str, Any] = {"model": MODEL, "messages": MESSAGES, "max_tokens": 8}
CHAT_PATH = "/v1/chat/completions"
TENANT = "tenant:team-l"
IN_PICO, OUT_PICO = 200_000, 600_000
"""Per token, of the model that the stand serves."""
TEMPLATE_TOKENS = 256
"""Reserved on top of a token for each byte of the request."""


def reserved_pico(asked: dict[str, Any]) -> int:
    """Of a chat completion."""
    size = len(json.dumps(asked))
    if asked.get("stream"):
        size += len(',"stream_options":{"include_usage":true}')
    return (size + TEMPLATE_TOKENS) * IN_PICO + int(asked["max_tokens"]) * OUT_PICO


def usd(pico: int) -> float:
    return float(Decimal(pico) / PICO_PER_USD)


class Limited:
    """A tenant with limits before one rank. At the end nothing may be reserved, and the book must
    hold exactly what the ledger says."""

    def __init__(self, stand: Stand, rank: MockRank, book: LimitBook, secret: str) -> None:
        self.stand = stand
        self.rank = rank
        self.book = book
        self.secret = secret

    @property
    def committed_pico(self) -> int:
        return self.book.committed_pico_usd(TENANT)[0]

    def post(self, path: str, asked: Any, **options: Any) -> Any:
        return self.stand.post(path, asked, secret=self.secret, **options)

    async def ask(self, path: str = CHAT_PATH, **fields: Any) -> tuple[int, Any, Any]:
        async with self.post(path, {**CHAT, **fields}) as response:
            return response.status, await response.json(), response.headers

    async def start(self, **fields: Any) -> "asyncio.Task[tuple[int, Any, Any]]":
        """A request that is at the rank when this returns."""
        before = len(self.rank.seen)
        task = asyncio.create_task(self.ask(**fields))
        await until(lambda: len(self.rank.seen) > before)
        return task


@asynccontextmanager
async def limited(limits: Limits, bounds: GatewayLimits = QUICK) -> AsyncIterator[Limited]:
    book = LimitBook()
    async with standing(bounds, book=book) as stand:
        rank = await stand.rank(tokens=4)
        await stand.show(group_of(rank), models=(served_model(max_wait_s=5.0),))
        secret = await stand.key("team-l", accounts=(Account(TENANT, limits),))
        yield Limited(stand, rank, book, secret)
        await until(lambda: book.open_reservations == 0)
        day, month = book.committed_pico_usd(TENANT)
        await until(lambda: spent_pico(stand) == day)
        assert day == month
        assert book.clipped_pico_usd == 0


def spent_pico(stand: Stand) -> int:
    rows = [row for row in stand.ledger.rows.values() if row.tenant == "team-l"]
    return int(sum(row.tariff_usd for row in rows) * PICO_PER_USD)


# Requests, tokens and places.


async def test_requests_per_minute_in_the_words_of_openai() -> None:
    async with limited(Limits(requests_per_min=3)) as team:
        for left in (2, 1, 0):
            status, _, headers = await team.ask()
            assert status == 200
            assert headers["x-ratelimit-limit-requests"] == "3"
            assert headers["x-ratelimit-remaining-requests"] == str(left)
            reset_s = float(headers["x-ratelimit-reset-requests"].removesuffix("s"))
            assert (2 - left) * 20 < reset_s <= (3 - left) * 20
            assert "x-ratelimit-limit-tokens" not in headers
        status, body, headers = await team.ask()
        assert status == 429
        assert body["error"]["type"] == "rate_limit_error"
        assert body["error"]["code"] == "rate_limit_exceeded"
        assert body["error"]["message"].startswith(
            "The tenant 'team-l' is over its limit of 3 requests per minute; try again in "
        )
        assert 15 <= int(headers["retry-after"]) <= 20
        assert headers["x-ratelimit-remaining-requests"] == "0"
        assert headers["x-em-dropped-reason"] == "requests_per_min"
        assert "x-should-retry" not in headers
        assert len(team.rank.seen) == 3
        refusals = "em_gateway_limit_refusals_total"
        assert team.stand.count(refusals, model=MODEL, kind="requests_per_min") == 1
        # Others are not touched by it.
        async with team.stand.post(CHAT_PATH, CHAT) as response:
            assert response.status == 200
            assert "x-ratelimit-limit-requests" not in response.headers


async def test_requests_per_minute_in_the_words_of_anthropic() -> None:
    async with limited(Limits(requests_per_min=1, tokens_per_min=9000)) as team:
        status, _, headers = await team.ask("/v1/messages")
        assert status == 200
        assert headers["anthropic-ratelimit-requests-limit"] == "1"
        assert headers["anthropic-ratelimit-requests-remaining"] == "0"
        assert headers["anthropic-ratelimit-tokens-limit"] == "9000"
        assert 8900 < int(headers["anthropic-ratelimit-tokens-remaining"]) < 9000
        at = time.strptime(headers["anthropic-ratelimit-requests-reset"], "%Y-%m-%dT%H:%M:%SZ")
        assert 50 < time.mktime(at) - time.timezone - time.time() <= 61
        status, body, headers = await team.ask("/v1/messages")
        assert status == 429
        assert body["error"]["type"] == "rate_limit_error"
        assert headers["anthropic-ratelimit-requests-remaining"] == "0"
        assert int(headers["retry-after"]) <= 60
        # In streams too.
        async with team.stand.post("/v1/messages", {**CHAT, "stream": True}) as response:
            assert "anthropic-ratelimit-requests-limit" not in response.headers


async def test_streams_tell_what_is_left() -> None:
    async with (
        limited(Limits(requests_per_min=5, tokens_per_min=9000)) as team,
        team.post(CHAT_PATH, {**CHAT, "stream": True}) as response,
    ):
        assert response.headers["x-ratelimit-remaining-requests"] == "4"
        assert response.headers["x-ratelimit-limit-tokens"] == "9000"
        assert "x-em-cost-usd" not in response.headers
        await response.read()


async def test_tokens_per_minute_are_given_back_when_not_used() -> None:
    async with limited(Limits(tokens_per_min=600)) as team:
        team.rank.gate = asyncio.Event()
        running = [await team.start(max_tokens=200) for _ in range(2)]
        status, body, headers = await team.ask(max_tokens=200)
        assert (status, body["error"]["code"]) == (429, "rate_limit_exceeded")
        assert "600 tokens per minute" in body["error"]["message"]
        assert headers["x-em-dropped-reason"] == "tokens_per_min"
        assert headers["x-ratelimit-limit-tokens"] == "600"
        assert int(headers["x-ratelimit-remaining-tokens"]) < 225
        team.rank.gate.set()
        assert [status for status, _, _ in await asyncio.gather(*running)] == [200, 200]
        # Four tokens came of the 200.
        status, _, headers = await team.ask(max_tokens=200)
        assert status == 200
        assert int(headers["x-ratelimit-remaining-tokens"]) > 300


async def test_requests_at_once() -> None:
    async with limited(Limits(concurrent_requests=2)) as team:
        team.rank.gate = asyncio.Event()
        running = [await team.start() for _ in range(2)]
        status, body, headers = await team.ask()
        assert (status, headers["retry-after"]) == (429, "1")
        assert headers["x-em-dropped-reason"] == "concurrent_requests"
        assert "2 requests at once" in body["error"]["message"]
        team.rank.gate.set()
        assert [status for status, _, _ in await asyncio.gather(*running)] == [200, 200]
        assert (await team.ask())[0] == 200


async def test_all_accounts_of_a_key_count() -> None:
    async with limited(Limits(requests_per_min=10)) as team:
        accounts = (
            Account(TENANT, Limits(requests_per_min=10)),
            Account("key:key_x", Limits(requests_per_min=1)),
        )
        team.secret = await team.stand.key("team-l", key_id="key_x", accounts=accounts)
        status, _, headers = await team.ask()
        assert (status, headers["x-ratelimit-limit-requests"]) == (200, "1")
        status, body, _ = await team.ask()
        assert status == 429
        assert "The key 'key_x' is over its limit of 1 requests" in body["error"]["message"]
        # What one account refuses is not counted by the other.
        team.secret = await team.stand.key("team-l", accounts=accounts[:1])
        _, _, headers = await team.ask()
        assert headers["x-ratelimit-remaining-requests"] == "8"


async def test_new_limits_of_a_key_hold_at_once() -> None:
    async with limited(Limits(requests_per_min=1)) as team:
        assert [(await team.ask())[0] for _ in range(2)] == [200, 429]
        (digest,) = [d for d, c in team.stand.keys.keys.items() if c.tenant == "team-l"]
        caller = team.stand.keys.keys[digest]
        accounts = (Account(TENANT, Limits(requests_per_min=100)),)
        team.stand.keys.keys[digest] = replace(caller, accounts=accounts)
        ring = team.stand.service.ring
        await until(
            lambda: (found := ring.find(team.secret.encode(), 0.0)) and found.accounts == accounts
        )
        assert (await team.ask())[0] == 200


# Money.


@pytest.mark.parametrize("period", ["day", "month"])
async def test_a_thousand_at_once_against_a_budget_for_a_hundred(period: str) -> None:
    budget_pico = 100 * reserved_pico(CHAT)
    limits = Limits(**{f"usd_per_{period}": usd(budget_pico)})
    async with (
        limited(limits) as team,
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http,
    ):
        # Nobody is answered, and so nothing given back, before all have asked.
        team.rank.gate = asyncio.Event()
        refused = 0

        async def ask() -> int:
            nonlocal refused
            headers = {"Authorization": f"Bearer {team.secret}"}
            async with http.post(
                team.stand.url + CHAT_PATH, data=json.dumps(CHAT), headers=headers
            ) as response:
                body = await response.json()
                if response.status != 200:
                    refused += 1
                    assert response.status == 429
                    assert body["error"]["type"] == body["error"]["code"] == "insufficient_quota"
                    assert response.headers["x-should-retry"] == "false"
                    assert response.headers["x-em-dropped-reason"] == f"usd_per_{period}"
                return response.status

        asking = [asyncio.create_task(ask()) for _ in range(1000)]
        await until(lambda: refused == 900)
        assert team.committed_pico == budget_pico
        assert team.book.open_reservations == 100
        team.rank.gate.set()
        assert Counter(await asyncio.gather(*asking)) == {200: 100, 429: 900}
        rows = await team.stand.rows(100)
        assert all(row.outcome is Outcome.OK for row in rows)
        assert 0 < spent_pico(team.stand) <= budget_pico


async def test_a_budget_is_spent_to_its_end_and_never_above() -> None:
    """Settlements and reservations mixed, as in real traffic."""
    asked = {**CHAT, "max_tokens": 4}
    budget_pico = 40 * reserved_pico(asked)
    async with (
        limited(Limits(usd_per_day=usd(budget_pico))) as team,
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=50)) as http,
    ):
        team.rank.cached_tokens = 2

        async def ask(number: int) -> int:
            headers = {"Authorization": f"Bearer {team.secret}"}
            body = {**asked, "stream": number % 3 == 0}
            path = CHAT_PATH if number % 2 else "/v1/messages"
            async with http.post(
                team.stand.url + path, data=json.dumps(body), headers=headers
            ) as response:
                await response.read()
                return response.status

        statuses = Counter(await asyncio.gather(*map(ask, range(2000))))
        assert set(statuses) == {200, 429}
        answered = statuses[200]
        assert answered > 40  # what was not used was given back
        while await ask(1) == 200:
            answered += 1
        await team.stand.rows(answered)
        left = budget_pico - spent_pico(team.stand)
        assert 0 <= left < reserved_pico({**asked, "stream": False})


async def test_a_short_answer_makes_room_for_the_next() -> None:
    asked = {**CHAT, "max_tokens": 3000}
    async with limited(Limits(usd_per_day=usd(reserved_pico(asked) + 1_000_000_000))) as team:
        for _ in range(5):
            async with team.post(CHAT_PATH, asked) as response:
                assert response.status == 200
        team.rank.gate = asyncio.Event()
        running = await team.start(max_tokens=3000)
        status, body, headers = await team.ask(max_tokens=3000)
        assert (status, body["error"]["code"]) == (429, "insufficient_quota")
        assert "A lower max_tokens reserves less." in body["error"]["message"]
        # Until the end of the UTC day, which no client shall sit out.
        assert 0 < int(headers["retry-after"]) <= 86_400
        team.rank.gate.set()
        assert (await running)[0] == 200


async def test_without_max_tokens_the_longest_answer_is_reserved() -> None:
    asked = {"model": MODEL, "messages": MESSAGES}
    most = (len(json.dumps(asked)) + TEMPLATE_TOKENS) * IN_PICO + 4096 * OUT_PICO
    for budget_pico, status in ((most - 1, 429), (most, 200)):
        async with (
            limited(Limits(usd_per_day=usd(budget_pico))) as team,
            team.post(CHAT_PATH, asked) as response,
        ):
            assert response.status == status


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("/v1/responses", {"input": "x", "max_tokens": 1}),
        ("/v1/completions", {"prompt": "x", "max_completion_tokens": 1}),
        ("/v1/chat/completions", {"messages": MESSAGES, "max_output_tokens": 1}),
        ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 1, "n": "900"}),
        ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 1, "n": 900}),
        ("/v1/completions", {"prompt": ["x"] * 900, "max_tokens": 1}),
    ],
    ids=["responses", "completions", "chat", "n as text", "n", "prompts"],
)
async def test_what_the_engine_would_not_heed_does_not_lower_the_reservation(
    path: str, asked: dict[str, Any]
) -> None:
    """The budget is worth 500 tokens of completion, and the request may make more."""
    size = len(json.dumps({"model": MODEL, **asked}))
    budget = usd((size + TEMPLATE_TOKENS) * IN_PICO + 500 * OUT_PICO)
    async with limited(Limits(usd_per_day=budget)) as team:
        async with team.post(path, {"model": MODEL, **asked}) as response:
            assert response.status == 429
            assert (await response.json())["error"]["code"] == "insufficient_quota"
        assert team.rank.seen == []


async def test_embeddings_reserve_their_prompts_only() -> None:
    asked = {"model": MODEL, "input": ["y " * 1900] * 3, "encoding_format": "float"}
    # Three prompts may hold more than one context together.
    size = len(json.dumps(asked)) + TEMPLATE_TOKENS
    assert 4096 < size < 3 * 4096
    async with (
        limited(Limits(usd_per_day=usd(size * IN_PICO - 1))) as team,
        team.post("/v1/embeddings", asked) as response,
    ):
        assert response.status == 429
    async with limited(Limits(usd_per_day=usd(size * IN_PICO))) as team:
        team.rank.max_model_len = 10_000
        async with team.post("/v1/embeddings", asked) as response:
            assert response.status == 200
        (row,) = await team.stand.rows()
        assert row.prompt_tokens == 5700 and row.completion_tokens == 0


async def test_tokenizing_costs_nothing() -> None:
    async with limited(Limits(usd_per_day=0.0)) as team:
        assert (await team.ask("/tokenize"))[0] == 200
        assert (await team.ask("/v1/messages/count_tokens"))[0] == 200
        assert (await team.ask())[0] == 429
        async with team.post("/tokenize", {"model": MODEL, "prompt": "x"}) as response:
            assert "x-em-cost-usd" not in response.headers


@pytest.mark.parametrize(
    "path",
    [
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/responses",
        "/v1/messages",
        "/v1/embeddings",
    ],
)
@pytest.mark.parametrize("cached", [None, 2])
async def test_the_cost_in_the_header_is_that_of_the_ledger(path: str, cached: int | None) -> None:
    asked = {**CHAT, "input": "one two three", "prompt": "one two three"}
    async with limited(Limits(usd_per_day=1.0)) as team:
        team.rank.cached_tokens = cached
        async with team.post(path, asked) as response:
            assert response.status == 200
            cost = response.headers["x-em-cost-usd"]
        (row,) = await team.stand.rows()
        assert Decimal(cost) == row.tariff_usd > 0
        assert "e" not in cost.lower()
        assert row.cached_tokens == (cached or 0)


# Whatever becomes of a request, its reservation is settled: `limited` looks after that.


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize("when", ["prefill", "decode"])
async def test_a_client_that_leaves_is_settled(stream: bool, when: str) -> None:
    asked = {**CHAT, "max_tokens": 3000, "stream": stream}
    budget_pico = reserved_pico(asked) + 1_000_000_000
    async with limited(Limits(usd_per_day=usd(budget_pico), concurrent_requests=1)) as team:
        team.rank.tokens = 100
        if when == "prefill":
            team.rank.gate = asyncio.Event()
        else:
            team.rank.token_interval_s = 0.02
        asking = asyncio.create_task(
            team.stand.http.post(
                team.stand.url + CHAT_PATH,
                json=asked,
                headers={"Authorization": f"Bearer {team.secret}"},
            )
        )
        await until(lambda: team.rank.seen)
        assert team.book.open_reservations == 1
        assert team.committed_pico == reserved_pico(asked)
        if stream and when == "decode":
            response = await asking
            for _ in range(4):
                await response.content.readline()
            response.close()
        else:
            asking.cancel()
        await until(lambda: team.book.open_reservations == 0)
        (row,) = await team.stand.rows()
        assert row.outcome is Outcome.ABORTED
        assert (row.completion_tokens > 0) is (stream and when == "decode")
        team.rank.gate, team.rank.token_interval_s = None, 0.0
        assert (await team.ask(max_tokens=3000))[0] == 200


async def test_a_client_that_leaves_the_queue_is_settled() -> None:
    async with limited(Limits(concurrent_requests=1, usd_per_day=1.0)) as team:
        await team.stand.show(group_of(team.rank, state=GroupState.STARTING))
        asking = asyncio.create_task(team.ask())
        await until(lambda: team.stand.service.admission.queued(MODEL) == 1)
        assert team.book.open_reservations == 1
        asking.cancel()
        await until(lambda: team.book.open_reservations == 0)
        assert team.committed_pico == 0
    assert team.stand.ledger.rows == {}


async def test_what_is_turned_away_is_settled() -> None:
    async with limited(Limits(usd_per_day=1.0), replace(QUICK, waiting_requests=1)) as team:
        await team.stand.show(models=(served_model(max_wait_s=0.3),))
        first = asyncio.create_task(team.ask())
        await until(lambda: team.stand.service.admission.queued(MODEL) == 1)
        status, _, headers = await team.ask()
        assert (status, headers["x-em-dropped-reason"]) == (429, "queue_full")
        assert (await first)[0] == 503
        assert team.book.open_reservations == 0 and team.committed_pico == 0


@pytest.mark.parametrize(
    "fault",
    [
        Fault("refuse", status=500),
        Fault("refuse", status=400),
        Fault("reset"),
        Fault("end"),
        Fault("error"),
        Fault("stall"),
        Fault("hang"),
    ],
    ids=lambda fault: f"{fault.kind} {fault.status}",
)
async def test_a_rank_that_fails_costs_nothing(fault: Fault) -> None:
    asked = {**CHAT, "max_tokens": 3000, "stream": True}
    budget_pico = reserved_pico(asked) + 1_000_000_000
    bounds = replace(QUICK, first_byte_timeout_s=0.3, stall_timeout_s=0.3, most_wait_s=0.0)
    async with limited(Limits(usd_per_day=usd(budget_pico)), bounds) as team:
        team.rank.faults.append(fault)
        async with team.post(CHAT_PATH, asked) as response:
            assert response.status in (400, 502, 504)
            await response.read()
        await until(lambda: team.book.open_reservations == 0)
        assert team.committed_pico == 0
        # The rank is back after a probe, and the budget whole.
        await until(lambda: team.stand.service.view.answers(MODEL))
        assert (await team.ask(max_tokens=3000))[0] == 200


async def test_a_stream_that_breaks_costs_what_was_seen() -> None:
    async with limited(Limits(usd_per_day=1.0)) as team:
        team.rank.faults.append(Fault("reset", after_events=4))
        async with team.post(CHAT_PATH, {**CHAT, "stream": True}) as response:
            assert "The stream broke off" in await response.text()
        (row,) = await team.stand.rows()
        assert (row.outcome, row.completion_tokens) == (Outcome.ERROR, 3)
        assert team.committed_pico == row.tariff_usd * PICO_PER_USD > 0


async def test_a_retry_is_reserved_and_paid_once() -> None:
    async with limited(Limits(usd_per_day=1.0, requests_per_min=10)) as team:
        other = await team.stand.rank("em-tiny-moe-pool-a-1", tokens=4)
        await team.stand.show(group_of(team.rank), group_of(other))
        team.rank.faults = other.faults
        other.faults.append(Fault("reset"))
        status, _, headers = await team.ask()
        assert (status, headers["x-ratelimit-remaining-requests"]) == (200, "9")
        (row,) = await team.stand.rows()
        assert Decimal(headers["x-em-cost-usd"]) == row.tariff_usd


# Limits that are kept elsewhere, and answer later.


class _Later:
    """As a limiter in Redis: the answer comes when the test lets it."""

    def __init__(self, book: LimitBook) -> None:
        self._local = LocalLimiter(book)
        self.gate = asyncio.Event()
        self._tasks: set[asyncio.Task[Reserved | Refused]] = set()

    def reserve(
        self, reservation_id: str, accounts: tuple[Account, ...], estimate: Estimate, now_s: float
    ) -> "asyncio.Future[Reserved | Refused]":
        async def later() -> Reserved | Refused:
            await self.gate.wait()
            return self._local.reserve(reservation_id, accounts, estimate, now_s)

        task = asyncio.create_task(later())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def settle(self, reservation_id: str, tokens: int, pico_usd: int, now_s: float) -> None:
        self._local.settle(reservation_id, tokens, pico_usd, now_s)

    async def run(self) -> None:
        await self._local.run()

    async def close(self) -> None: ...


async def test_limits_that_answer_later() -> None:
    book = LimitBook()
    limiter = _Later(book)
    async with standing(limiter=limiter) as stand:
        rank = await stand.rank(tokens=4)
        await stand.show(group_of(rank))
        accounts = (Account(TENANT, Limits(concurrent_requests=1)),)
        secret = await stand.key("team-l", accounts=accounts)

        async def ask() -> int:
            async with stand.post(CHAT_PATH, CHAT, secret=secret) as response:
                return int(response.status)

        gone = asyncio.create_task(ask())
        await until(lambda: limiter._tasks)
        gone.cancel()
        aborted = "em_gateway_client_aborts_total"
        await until(lambda: stand.count(aborted, model=MODEL) == 1)
        limiter.gate.set()
        await until(lambda: not limiter._tasks)
        # The one who left has been granted a place, and given it back.
        await until(lambda: book.open_reservations == 0)
        assert rank.seen == []
        assert await ask() == 200
        rank.gate = asyncio.Event()
        running = asyncio.create_task(ask())
        await until(lambda: len(rank.seen) == 2)
        assert await ask() == 429
        rank.gate.set()
        assert await running == 200
        assert book.open_reservations == 0


# Keys.


async def test_a_key_for_some_models_sees_and_uses_only_those(stand: Stand) -> None:
    rank = await stand.rank()
    await stand.show(
        group_of(rank),
        models=(served_model(aliases=("gpt-4o", "gpt-4")), served_model("other")),
    )
    by_name = await stand.key("team-b", models=frozenset((MODEL,)))
    by_alias = await stand.key("team-b", models=frozenset(("gpt-4o",)))
    for secret, names in ((by_name, ["gpt-4", "gpt-4o", MODEL]), (by_alias, ["gpt-4o"])):
        async with AsyncOpenAI(base_url=f"{stand.url}/v1", api_key=secret, max_retries=0) as client:
            assert [model.id async for model in client.models.list()] == names
            for name in names:
                assert (await client.models.retrieve(name)).id == name
                await client.chat.completions.create(model=name, messages=MESSAGES)
            for name in {"other", MODEL, "gpt-4", "none"} - set(names):
                with pytest.raises(NotFoundError) as unknown:
                    await client.chat.completions.create(model=name, messages=MESSAGES)
                assert "there are: " in unknown.value.message
                # What the key may not see is not named.
                assert "other" not in unknown.value.message.split("there are: ")[1]
                with pytest.raises(NotFoundError):
                    await client.models.retrieve(name)
    async with AsyncAnthropic(base_url=stand.url, auth_token=by_alias, max_retries=0) as anthropic:
        assert [model.id async for model in anthropic.models.list()] == ["gpt-4o"]
    assert len(rank.seen) == 4


async def test_an_expired_key_is_refused_everywhere(stand: Stand) -> None:
    rank = await stand.rank()
    await stand.show(group_of(rank))
    secret = await stand.key("team-b", expires_at_s=time.time() + 0.5)
    async with stand.post(CHAT_PATH, CHAT, secret=secret) as response:
        assert response.status == 200
    await until(lambda: stand.service.ring.find(secret.encode(), time.time()) is None)
    for path in (CHAT_PATH, "/v1/messages", "/tokenize"):
        async with stand.post(path, CHAT, secret=secret) as response:
            assert response.status == 401
            assert response.headers["www-authenticate"] == "Bearer"
    for path in ("/v1/models", "/admin/v1/keys"):
        async with stand.http.get(stand.url + path, headers={"x-api-key": secret}) as response:
            assert response.status == 401
    assert len(rank.seen) == 1


# What the official clients make of it.


async def test_the_sdks_raise_and_try_again_after_the_time_they_are_told() -> None:
    async with limited(Limits(requests_per_min=30)) as team:
        for _ in range(30):
            assert (await team.ask())[0] == 200
        asked: Any = {"model": MODEL, "messages": MESSAGES}
        url = f"{team.stand.url}/v1"
        async with AsyncOpenAI(base_url=url, api_key=team.secret, max_retries=0) as client:
            with pytest.raises(RateLimitError) as raised:
                await client.chat.completions.create(**asked)
            assert raised.value.code == "rate_limit_exceeded"
            wait_s = int(raised.value.response.headers["retry-after"])
        async with AsyncAnthropic(
            base_url=team.stand.url, api_key=team.secret, max_retries=0
        ) as anthropic:
            with pytest.raises(AnthropicRateLimitError):
                await anthropic.messages.create(max_tokens=4, **asked)
        assert wait_s in (1, 2)
        async with AsyncOpenAI(base_url=url, api_key=team.secret, max_retries=1) as client:
            started_s = time.monotonic()
            await client.chat.completions.create(**asked)
            assert wait_s - 1 < time.monotonic() - started_s < wait_s + 2
        refusals = "em_gateway_limit_refusals_total"
        assert team.stand.count(refusals, model=MODEL) == 3


async def test_the_sdks_do_not_try_again_when_the_budget_is_spent() -> None:
    async with limited(Limits(usd_per_month=0.0)) as team:
        asked: Any = {"model": MODEL, "messages": MESSAGES}
        url = f"{team.stand.url}/v1"
        started_s = time.monotonic()
        async with AsyncOpenAI(base_url=url, api_key=team.secret, max_retries=5) as client:
            with pytest.raises(RateLimitError) as raised:
                await client.chat.completions.create(**asked)
        assert raised.value.type == raised.value.code == "insufficient_quota"
        async with AsyncAnthropic(
            base_url=team.stand.url, api_key=team.secret, max_retries=5
        ) as anthropic:
            with pytest.raises(AnthropicRateLimitError):
                await anthropic.messages.create(max_tokens=4, **asked)
        assert time.monotonic() - started_s < 1
        assert team.stand.count("em_gateway_limit_refusals_total", kind="usd_per_month") == 2


async def test_no_secret_is_told(stand: Stand) -> None:
    await stand.show()
    wrong = "sk-em-" + "w" * 43
    for secret in (SECRET, wrong):
        async with stand.post(CHAT_PATH, CHAT, secret=secret) as response:
            assert secret not in await response.text() + str(response.headers)
    await until(lambda: len(stand.log_lines()) == 2)
    assert wrong not in stand.access_log.read_text()
