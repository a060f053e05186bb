"""A gateway finds the controller that leads, and stays with it."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import aiohttp
import msgspec
import pytest
from aiohttp import web
from tests.gateway.fake_controller import FakeController

from expertmesh.cli.gateway import _http_urls
from expertmesh.core.domain.fleet import Fleet
from expertmesh.errors import SetupError
from expertmesh.gateway.controllers import ControllerUrls
from expertmesh.gateway.exchange import Exchange
from expertmesh.gateway.limits import GatewayLimits

ONE, TWO, THREE = "http://one:1", "http://two:2", "http://three:3"
TOKEN = "the mesh token"


def test_it_stays_with_the_one_that_answers() -> None:
    urls = ControllerUrls([ONE + "/", TWO])
    for _ in range(3):
        urls.begin()
        assert urls.current == ONE


def test_each_is_asked_once_a_report_and_the_next_begins_with_another() -> None:
    urls = ControllerUrls([ONE, TWO])
    urls.begin()
    assert urls.failed()
    assert urls.current == TWO
    assert not urls.failed()
    assert urls.current == ONE


def test_a_leader_that_is_named_is_asked_even_when_it_is_not_configured() -> None:
    urls = ControllerUrls([ONE])
    urls.begin()
    assert urls.follows(THREE)
    assert urls.current == THREE
    urls.begin()
    assert urls.current == THREE
    assert urls.failed()
    assert urls.current == ONE


def test_two_that_name_each_other_are_not_asked_for_ever() -> None:
    urls = ControllerUrls([ONE, TWO])
    urls.begin()
    assert urls.follows(TWO)
    assert not urls.follows(ONE)


def test_what_is_no_url_is_not_followed() -> None:
    urls = ControllerUrls([ONE])
    urls.begin()
    assert not urls.follows("file:///etc/passwd")
    assert urls.current == ONE


# Over HTTP


class View:
    """As much of a fleet view and an admission as the exchange uses."""

    def __init__(self) -> None:
        self.fleet: Fleet | None = None

    def apply(self, fleet: Fleet) -> None:
        self.fleet = fleet

    def reported(self) -> dict[str, Any]:
        return {}

    def traffic(self) -> dict[str, Any]:
        return {}

    def fleet_changed(self) -> None:
        pass


class Pair:
    def __init__(self) -> None:
        self.one, self.two = FakeController(TOKEN), FakeController(TOKEN)
        self.one.fleet, self.two.fleet = Fleet(version=1), Fleet(version=2)
        self.view = View()

    def follows(self, controller: FakeController, leader: str) -> None:
        error = {"code": "not_leader", "message": "ask the leader", "leader": leader}
        body = msgspec.json.encode({"error": error})
        controller.broken = web.Response(status=503, body=body)


Build = Callable[[str], Exchange]


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    pair = Pair()
    await pair.one.start()
    await pair.two.start()
    yield pair
    await pair.one.stop()
    await pair.two.stop()


@pytest.fixture
async def build(pair: Pair) -> AsyncIterator[Build]:
    async with aiohttp.ClientSession() as http:

        def build(urls: str) -> Exchange:
            view: Any = pair.view
            return Exchange(
                http,
                urls,
                TOKEN,
                "g1",
                view,
                view,
                GatewayLimits(exchange_timeout_s=0.3),
                asyncio.Event(),
            )

        yield build


async def test_a_follower_leads_to_the_leader_within_one_exchange(pair: Pair, build: Build) -> None:
    pair.follows(pair.one, pair.two.url)
    exchange = build(pair.one.url)
    await exchange.once()
    assert pair.view.fleet == Fleet(version=2)
    await exchange.once()
    assert (len(pair.one.reports), len(pair.two.reports)) == (1, 2)


async def test_when_the_leader_ends_the_other_one_is_asked_at_once(
    pair: Pair, build: Build
) -> None:
    exchange = build(f"{pair.one.url},{pair.two.url}")
    await exchange.once()
    assert pair.view.fleet == Fleet(version=1)
    await pair.one.stop()
    await exchange.once()
    assert pair.view.fleet == Fleet(version=2)


async def test_one_that_hangs_costs_one_exchange(pair: Pair, build: Build) -> None:
    async def hang(request: web.Request) -> web.Response:
        await asyncio.sleep(5)
        return web.Response()

    app = web.Application()
    app.router.add_post("/v1/exchange", hang)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    exchange = build(f"http://127.0.0.1:{runner.addresses[0][1]},{pair.two.url}")
    await exchange.once()
    assert pair.view.fleet is None
    await exchange.once()
    assert pair.view.fleet == Fleet(version=2)
    await runner.cleanup()


async def test_a_leader_that_starts_is_not_left(pair: Pair, build: Build) -> None:
    """It answers without a fleet until its first decision, and needs the reports meanwhile."""
    body = msgspec.json.encode({"error": {"code": "starting", "message": "ask again"}})
    pair.one.broken = web.Response(status=503, body=body)
    pair.follows(pair.two, pair.one.url)
    exchange = build(f"{pair.one.url},{pair.two.url}")
    for _ in range(3):
        await exchange.once()
    assert (len(pair.one.reports), len(pair.two.reports)) == (3, 0)
    pair.one.broken = None
    await exchange.once()
    assert pair.view.fleet == Fleet(version=1)


async def test_both_followers_keep_the_last_fleet(pair: Pair, build: Build) -> None:
    exchange = build(f"{pair.one.url},{pair.two.url}")
    await exchange.once()
    pair.follows(pair.one, "http://127.0.0.1:1")
    pair.follows(pair.two, "http://127.0.0.1:1")
    for _ in range(3):
        await exchange.once()
    assert pair.view.fleet == Fleet(version=1)


def test_urls_may_be_given_one_by_one_or_with_commas_between() -> None:
    assert _http_urls([ONE, f"{TWO}, {THREE}"]) == f"{ONE},{TWO},{THREE}"
    with pytest.raises(SetupError, match="--controller-url: 'two:2'"):
        _http_urls([f"{ONE},two:2"])
