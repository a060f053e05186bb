"""Where it is announced that nodes will be taken away."""

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from expertmesh.clients.kubernetes.nodes import KubernetesNode, LossNotice
from expertmesh.clients.kubernetes.pods import PlacedPod
from expertmesh.controller.notices import (
    AllNotices,
    FileNotices,
    HttpNotices,
    KubernetesNotices,
)
from expertmesh.errors import UpstreamUnavailable

NOW_S = 1_780_000_000.0


class Clock:
    def __init__(self) -> None:
        self.now_s = NOW_S

    def __call__(self) -> float:
        return self.now_s


# A file


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "notices.yaml"


def write(path: Path, text: str, at_s: float = NOW_S) -> None:
    path.write_text(text)
    os.utime(path, (at_s, at_s))


@pytest.mark.parametrize(
    ("text", "at_s"),
    [
        ("n1: 120\n", NOW_S + 120),
        ('{"n1": 0.5}', NOW_S + 0.5),
        ("n1: 1780000300\n", NOW_S + 300),
        ("n1: 2026-05-28T20:31:40Z\n", NOW_S + 300),
        ('{"n1": "2026-05-28T22:31:40+02:00"}', NOW_S + 300),
        ("n1: 2026-05-28 20:31:40\n", NOW_S + 300),
    ],
)
async def test_times_in_a_file(path: Path, text: str, at_s: float) -> None:
    write(path, text)
    assert await FileNotices(path).read() == {"n1": at_s}


async def test_a_file_is_read_again_when_it_changes(path: Path) -> None:
    notices = FileNotices(path)
    assert await notices.read() == {}
    write(path, "n1: 120\nn2: 60\n")
    assert await notices.read() == {"n1": NOW_S + 120, "n2": NOW_S + 60}
    write(path, "n2: 60\n", NOW_S + 10)
    assert await notices.read() == {"n2": NOW_S + 70}
    write(path, "", NOW_S + 20)
    assert await notices.read() == {}
    write(path, "n1: 1\n")
    os.unlink(path)
    assert await notices.read() == {}


async def test_a_file_that_is_replaced_within_one_tick_is_noticed(path: Path) -> None:
    notices = FileNotices(path)
    write(path, "n1: 120\n")
    await notices.read()
    other = path.with_suffix(".new")
    write(other, "n2: 120\n")
    other.rename(path)
    assert await notices.read() == {"n2": NOW_S + 120}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{ never closed", "expected"),
        ("- n1\n- n2\n", "write node: time lines"),
        ("n1: soon\n", "n1: 'soon' is no time"),
        ("n1: -5\n", "n1: -5 is no time"),
        ("n1: yes\n", "n1: True is no time"),
        ("n1: [1]\n", "n1: [1] is no time"),
        ("n1: .nan\n", "n1: nan is no time"),
        ("n1: 2026-05-28\n", "is no time"),
        ("x" * (1 << 20) + "y: 1", "too many"),
    ],
)
async def test_bad_content_is_named_once_and_the_earlier_notices_stay(
    path: Path, caplog: pytest.LogCaptureFixture, text: str, said: str
) -> None:
    notices = FileNotices(path)
    write(path, "n1: 120\n")
    await notices.read()
    write(path, text, NOW_S + 5)
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            assert await notices.read() == {"n1": NOW_S + 120}
    assert len(caplog.messages) == 1
    assert str(path) in caplog.messages[0]
    assert said in caplog.messages[0]


# An endpoint


@dataclass
class Endpoint:
    text: str = "{}"
    status: int = 200
    delay_s: float = 0.0
    asked: int = 0
    url: str = ""

    async def answer(self, request: web.Request) -> web.Response:
        self.asked += 1
        await asyncio.sleep(self.delay_s)
        return web.Response(text=self.text, status=self.status)


@pytest.fixture
async def endpoint() -> AsyncIterator[Endpoint]:
    endpoint = Endpoint()
    app = web.Application()
    app.router.add_get("/notices", endpoint.answer)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    endpoint.url = f"http://127.0.0.1:{runner.addresses[0][1]}/notices"
    yield endpoint
    await runner.cleanup()


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as http:
        yield http


async def test_an_endpoint_is_asked_once_in_a_while(
    endpoint: Endpoint, http: aiohttp.ClientSession
) -> None:
    clock = Clock()
    notices = HttpNotices(http, endpoint.url, now_s=clock)
    endpoint.text = '{"n1": 120, "10.0.0.2": 1780000060}'
    assert await notices.read() == {"n1": NOW_S + 120, "10.0.0.2": NOW_S + 60}
    clock.now_s += 1
    await notices.read()
    assert endpoint.asked == 1
    clock.now_s += 5
    assert await notices.read() == {"n1": NOW_S + 120, "10.0.0.2": NOW_S + 60}
    endpoint.text = "{}"
    clock.now_s += 5
    assert await notices.read() == {}
    assert endpoint.asked == 3


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"status": 500}, "status 500"),
        ({"text": "[1]"}, "write node: time lines"),
        ({"text": '{"n1": "soon"}'}, "'soon' is no time"),
        ({"delay_s": 5.0}, "no answer"),
    ],
)
async def test_an_endpoint_that_fails_is_named_and_asked_again_later(
    endpoint: Endpoint, http: aiohttp.ClientSession, change: dict[str, object], said: str
) -> None:
    clock = Clock()
    notices = HttpNotices(http, endpoint.url, timeout_s=0.2, now_s=clock)
    for name, value in change.items():
        setattr(endpoint, name, value)
    for _ in range(3):
        with pytest.raises(UpstreamUnavailable, match=f"{endpoint.url}: .*{said}"):
            await notices.read()
    assert endpoint.asked == 1
    endpoint.status, endpoint.text, endpoint.delay_s = 200, '{"n1": 9}', 0.0
    clock.now_s += 6
    assert await notices.read() == {"n1": clock.now_s + 9}


async def test_an_endpoint_is_asked_again_when_the_clock_went_back(
    endpoint: Endpoint, http: aiohttp.ClientSession
) -> None:
    clock = Clock()
    notices = HttpNotices(http, endpoint.url, now_s=clock)
    await notices.read()
    clock.now_s -= 3600
    await notices.read()
    assert endpoint.asked == 2


# Kubernetes


@dataclass
class Listed:
    objects: dict[str, KubernetesNode] = field(default_factory=dict)
    is_known: bool = True
    problem: str | None = None


@dataclass
class ListedPods:
    objects: dict[str, PlacedPod] = field(default_factory=dict)


def node(name: str, *notices: LossNotice) -> KubernetesNode:
    return KubernetesNode(name, (f"10.0.0.{name[1:]}",), None, None, "spot", True, notices)


def kubernetes(*nodes: KubernetesNode) -> tuple[Listed, KubernetesNotices, Clock]:
    clock = Clock()
    listed = Listed({node.name: node for node in nodes})
    pods = ListedPods(
        {
            "ray-1": PlacedPod("ray-1", "n1", ("10.1.0.1",)),
            "ray-2": PlacedPod("ray-2", "n2", ("10.1.0.2",)),
            "ray-3": PlacedPod("ray-3", "", ()),
        }
    )
    return listed, KubernetesNotices(listed, pods, clock), clock


async def test_a_notice_names_the_node_its_address_and_the_ray_pods_on_it() -> None:
    _, notices, _ = kubernetes(node("n1", LossNotice("taint", 120.0)), node("n2"))
    at_s = NOW_S + 120
    assert await notices.read() == {"n1": at_s, "10.0.0.1": at_s, "ray-1": at_s, "10.1.0.1": at_s}


async def test_the_time_of_a_notice_stands_still() -> None:
    _, notices, clock = kubernetes(node("n1", LossNotice("taint", 120.0)))
    await notices.read()
    clock.now_s += 30
    assert (await notices.read())["n1"] == NOW_S + 120


async def test_a_notice_that_is_withdrawn_is_gone_and_counts_anew_when_it_comes_back() -> None:
    rebalance = LossNotice("rebalance", 900.0)
    listed, notices, clock = kubernetes(node("n1", rebalance))
    await notices.read()
    listed.objects["n1"] = node("n1")
    assert await notices.read() == {}
    clock.now_s += 600
    listed.objects["n1"] = node("n1", rebalance)
    assert (await notices.read())["n1"] == NOW_S + 1500


async def test_the_earliest_of_several_notices_counts() -> None:
    _, notices, _ = kubernetes(
        node(
            "n1",
            LossNotice("rebalance", 900.0),
            LossNotice("taint", 120.0, given_at_s=NOW_S - 50),
            LossNotice("condition", 30.0, NOW_S, lost_at_s=NOW_S + 100),
        )
    )
    assert (await notices.read())["n1"] == NOW_S + 70


async def test_a_notice_from_the_future_does_not_gain_time() -> None:
    _, notices, _ = kubernetes(node("n1", LossNotice("taint", 120.0, given_at_s=NOW_S + 999)))
    assert (await notices.read())["n1"] == NOW_S + 120


async def test_nodes_that_are_not_read_are_a_problem() -> None:
    listed, notices, _ = kubernetes(node("n1", LossNotice("taint", 120.0)))
    listed.is_known = False
    with pytest.raises(UpstreamUnavailable, match="no nodes read yet"):
        await notices.read()
    listed.is_known, listed.problem = True, "GET /api/v1/nodes: 403"
    with pytest.raises(UpstreamUnavailable, match="403"):
        await notices.read()


# Several


@dataclass
class Source:
    notices: Mapping[str, float] = field(default_factory=dict)
    fails: bool = False

    async def read(self) -> Mapping[str, float]:
        if self.fails:
            raise UpstreamUnavailable("no answer")
        return self.notices


async def test_of_several_sources_the_earliest_time_counts() -> None:
    both = AllNotices([Source({"n1": 9.0, "n2": 5.0}), Source({"n1": 7.0, "n3": 1.0})])
    assert await both.read() == {"n1": 7.0, "n2": 5.0, "n3": 1.0}


async def test_one_source_that_fails_keeps_its_last_notices(
    caplog: pytest.LogCaptureFixture,
) -> None:
    one, two = Source({"n1": 9.0}), Source({"n2": 5.0})
    both = AllNotices([one, two])
    await both.read()
    one.fails, two.notices = True, {}
    for _ in range(3):
        assert await both.read() == {"n1": 9.0}
    assert caplog.messages == ["no answer"]
    two.fails = True
    with pytest.raises(UpstreamUnavailable, match="no answer; no answer"):
        await both.read()
    one.fails, one.notices = False, {}
    assert await both.read() == {}
