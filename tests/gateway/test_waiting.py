"""Requests for a model that has no ready group yet."""

import asyncio
import time
from dataclasses import replace
from typing import Any

import pytest
from multidict import CIMultiDictProxy
from tests.gateway.stand import MODEL, QUICK, SECRET, Stand, group_of, served_model, standing, until
from tests.mock_rank import MockRank

from expertmesh.core.domain.fleet import GroupState
from expertmesh.core.metering.usage import Outcome

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "one two"}], "max_tokens": 20}


async def ask(
    stand: Stand, number: int = 0, **headers: str
) -> tuple[int, Any, CIMultiDictProxy[str]]:
    async with stand.post(
        "/v1/chat/completions", {**CHAT, "seed": number}, headers=headers
    ) as response:
        return response.status, await response.json(), response.headers


@pytest.fixture
async def rank(stand: Stand) -> MockRank:
    """Of a group that is starting."""
    rank = await stand.rank()
    await stand.show(
        group_of(rank, state=GroupState.STARTING, message="loads its weights"),
        models=(served_model(max_wait_s=5.0),),
    )
    return rank


async def test_waiting_requests_are_reported_and_released_in_order(
    stand: Stand, rank: MockRank
) -> None:
    asking = []
    for number in range(5):
        asking.append(asyncio.create_task(ask(stand, number)))
        await until(lambda n=number: stand.service.admission.queued(MODEL) == n + 1)
    await asyncio.sleep(0.2)
    traffic = stand.controller.last.models[MODEL]
    assert (traffic.queued_requests, traffic.wake_requests, traffic.arrivals_total) == (5, 5, 5)
    assert 0.1 < traffic.oldest_wait_s < 5
    assert traffic.queued_tokens > 5 * 20
    assert rank.seen == []
    async with stand.http.get(
        f"{stand.url}/metrics", headers={"Authorization": "Bearer mesh-secret"}
    ) as response:
        assert 'em_gateway_queued_requests{model="tiny-moe"} 5.0' in await response.text()
    shown_at_s = time.monotonic()
    await stand.show(group_of(rank))
    answers = await asyncio.gather(*asking)
    assert time.monotonic() - shown_at_s < 2
    assert [status for status, _, _ in answers] == [200] * 5
    assert [seen.json()["seed"] for seen in rank.seen] == [0, 1, 2, 3, 4]
    rows = await stand.rows(5)
    assert all(row.queue_s > 0.1 and row.queue_s < row.duration_s for row in rows)
    await until(lambda: stand.controller.last.models[MODEL].wake_requests == 0)
    assert stand.count("em_gateway_queue_wait_seconds_count", model=MODEL) == 5


async def test_a_model_without_any_group_is_woken(stand: Stand) -> None:
    await stand.show(models=(served_model(max_wait_s=5.0),))
    asking = asyncio.create_task(ask(stand))
    await until(
        lambda: (
            stand.controller.reports
            and MODEL in stand.controller.last.models
            and stand.controller.last.models[MODEL].wake_requests == 1
        )
    )
    rank = await stand.rank()
    await stand.show(group_of(rank))
    assert (await asking)[0] == 200


async def test_the_limit_of_the_model(stand: Stand, rank: MockRank) -> None:
    await stand.show(
        group_of(
            rank,
            state=GroupState.STARTING,
            message="pending: no room in pool pool-a",
            expected_ready_at_s=time.time() + 42,
        ),
        models=(served_model(max_wait_s=0.2),),
    )
    started_s = time.monotonic()
    status, body, headers = await ask(stand)
    assert 0.2 <= time.monotonic() - started_s < 3
    assert status == 503
    assert 40 <= int(headers["retry-after"]) <= 42
    assert body["error"]["code"] == "model_not_ready"
    assert body["error"]["message"] == (
        "The model 'tiny-moe' has no ready group: em-tiny-moe-pool-a-0 is starting "
        "(pending: no room in pool pool-a); try again later."
    )
    async with stand.post("/v1/messages", CHAT) as response:
        assert response.status == 503
        assert (await response.json())["error"]["type"] == "overloaded_error"
    assert stand.ledger.rows == {}


@pytest.mark.parametrize(
    ("client_s", "at_least_s", "below_s"),
    [("5.3", 0.3, 1.9), ("2", 0.0, 1.9), ("nonsense", 2.0, 9.0), ("600", 2.0, 9.0)],
    ids=["shorter", "no time to wait", "no number", "longer"],
)
async def test_the_limit_of_the_client(
    stand: Stand, rank: MockRank, client_s: str, at_least_s: float, below_s: float
) -> None:
    await stand.show(models=(served_model(max_wait_s=2.0),))
    started_s = time.monotonic()
    status, body, headers = await ask(stand, **{"x-stainless-read-timeout": client_s})
    assert at_least_s <= time.monotonic() - started_s < below_s
    assert (status, headers["retry-after"]) == (503, "5")
    assert "has no group yet" in body["error"]["message"]


@pytest.mark.parametrize(
    "limits",
    [{"waiting_requests": 2}, {"waiting_bytes": 300}],
    ids=["requests", "bytes"],
)
async def test_the_waiting_room_is_bounded(limits: dict[str, int]) -> None:
    async with standing(replace(QUICK, **limits)) as stand:
        rank = await stand.rank()
        await stand.show(models=(served_model(max_wait_s=5.0),))
        asking = [asyncio.create_task(ask(stand, number)) for number in range(2)]
        await until(lambda: stand.service.admission.queued(MODEL) == 2)
        status, body, headers = await ask(stand, 3)
        assert status == 429
        assert body["error"]["type"] == "rate_limit_error"
        assert body["error"]["code"] == "queue_full"
        assert "retry-after" in headers
        assert headers["x-em-dropped-reason"] == "queue_full"
        async with stand.post("/v1/messages", CHAT) as response:
            assert (await response.json())["error"]["type"] == "rate_limit_error"
        await stand.show(group_of(rank))
        assert [status for status, _, _ in await asyncio.gather(*asking)] == [200, 200]
        assert (await ask(stand, 4))[0] == 200


async def test_a_client_that_leaves_no_longer_counts(stand: Stand, rank: MockRank) -> None:
    asking = asyncio.create_task(
        stand.http.post(
            f"{stand.url}/v1/chat/completions", json=CHAT, headers={"x-api-key": SECRET}
        )
    )
    await until(lambda: stand.service.admission.queued(MODEL) == 1)
    asking.cancel()
    await until(lambda: stand.service.admission.queued(MODEL) == 0)
    assert (
        stand.count(
            "em_gateway_requests_total", model=MODEL, endpoint="chat_completions", status="499"
        )
        == 1
    )
    # It never reached a group, so it used nothing.
    await asyncio.sleep(0.15)
    assert stand.ledger.rows == {}


async def test_draining_refuses_who_waits_and_finishes_who_runs(stand: Stand) -> None:
    busy = await stand.rank(first_token_s=0.5)
    await stand.show(
        group_of(busy), models=(served_model(max_wait_s=5.0), served_model("asleep", 5.0))
    )
    running = asyncio.create_task(ask(stand))
    await until(lambda: busy.running == 1)
    waiting = asyncio.create_task(
        stand.http.post(
            f"{stand.url}/v1/completions",
            json={"model": "asleep", "prompt": "x"},
            headers={"x-api-key": SECRET},
        )
    )
    await until(lambda: stand.service.admission.queued("asleep") == 1)
    stand.service.drain()
    response = await waiting
    assert response.status == 503
    await response.read()
    async with stand.http.get(f"{stand.url}/readyz") as ready:
        assert ready.status == 503
        assert (await ready.json())["missing"] == ["the gateway shuts down"]
    assert (await running)[0] == 200
    (row,) = await stand.rows()
    assert row.outcome is Outcome.OK
