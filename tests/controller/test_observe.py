import asyncio
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace

import aiohttp
import msgspec
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from tests.controller.running_system import two_pools
from tests.core.scaling.world import EP2

from expertmesh.clients.ray_serve import Application, ApplicationStatus, RayNode, Replica
from expertmesh.controller.observe import (
    HttpRankProbe,
    Observer,
    Snapshot,
    Surroundings,
    condensed,
    observation_of,
)
from expertmesh.core.domain.fleet import GroupSpec, GroupState, Rank, RankInfo
from expertmesh.core.scaling.contract import GroupRecord, ModelState
from expertmesh.core.scaling.demand import GroupDoing
from expertmesh.errors import UpstreamUnavailable

SPEC = GroupSpec("em-tiny-cheap-1", "tiny", "/models/tiny", "cheap", EP2, 1024, 0.6)
URL = "http://10.0.0.1:30000/em-tiny-cheap-1"
INFO = RankInfo("em-tiny-cheap-1", "tiny", 0, 2, 1, 0, 0.5)
ALONE = Surroundings(gateways=(), elsewhere=(), held_since_s={}, first_look=False, settled=True)


def application(**changes: object) -> Application:
    values: dict[str, object] = {
        "name": SPEC.name,
        "status": ApplicationStatus.RUNNING,
        "message": "",
        "spec": SPEC,
        "replicas": (Replica("RUNNING", "n1", "10.0.0.1", 7), Replica("STARTING", "", "", None)),
        "rank_urls": (URL,),
    }
    return Application(**{**values, **changes})  # type: ignore[arg-type]


def snapshot(**changes: object) -> Snapshot:
    values: dict[str, object] = {
        "applications": (application(),),
        "nodes": (
            RayNode("n1", "10.0.0.1", True, "cheap", 1.0),
            RayNode("n2", "10.0.0.2", True, "cheap", 4.0),
            RayNode("n3", "10.0.0.3", False, "cheap", 1.0),
            RayNode("n4", "10.0.0.4", True, None, 8.0),
        ),
        "placement_groups": None,
        "ranks": {URL: INFO},
        "failures": {URL: 0},
    }
    return Snapshot(**{**values, **changes})  # type: ignore[arg-type]


def test_workers_are_those_of_live_nodes_with_the_pools_label() -> None:
    seen = observation_of(two_pools(), ModelState(), snapshot(), ALONE)
    # A node offers no more than the manifest says that its price is for.
    assert {pool.name: pool.live_workers for pool in seen.pools} == {"cheap": 2, "dear": 0}


def test_a_replica_is_known_by_node_and_process() -> None:
    seen = observation_of(two_pools(), ModelState(), snapshot(), ALONE).groups[0]
    assert seen.application is not None
    assert [replica.member for replica in seen.application.replicas] == ["n1/7", None]
    assert [replica.node_alive for replica in seen.application.replicas] == [True, None]
    assert seen.spec == SPEC


@pytest.mark.parametrize(
    ("node_id", "alive"),
    [("n1", True), ("n3", False), ("never listed", False)],
    ids=["alive", "dead", "unknown to Ray"],
)
def test_whether_a_replicas_node_lives(node_id: str, alive: bool) -> None:
    app = application(replicas=(Replica("RUNNING", node_id, "10.0.0.1", 7),))
    look = snapshot(applications=(app,))
    seen = observation_of(two_pools(), ModelState(), look, ALONE).groups[0]
    assert seen.application is not None
    assert seen.application.replicas[0].node_alive is alive


def test_a_rank_that_answers_for_another_group_is_not_counted() -> None:
    look = snapshot(ranks={URL: None})
    assert observation_of(two_pools(), ModelState(), look, ALONE).groups[0].ranks[0].index is None
    other = RankInfo("em-other-cheap-1", "other", 0, 2, 0, 0, 0.0)
    look = snapshot(ranks={URL: other})
    assert observation_of(two_pools(), ModelState(), look, ALONE).groups[0].ranks[0].index is None


@pytest.mark.parametrize(
    ("names", "there"),
    [
        (None, None),
        (frozenset(), False),
        (frozenset({"SERVE_GANG::em-tiny-cheap-1_group:tiny_0_abc"}), True),
        (frozenset({"SERVE_GANG::em-tiny-cheap-11_group:tiny_0_abc"}), False),
    ],
    ids=["not asked", "gone", "there", "of a group whose name is longer"],
)
def test_whether_a_placement_group_is_there(
    names: frozenset[str] | None, there: bool | None
) -> None:
    look = snapshot(placement_groups=names)
    seen = observation_of(two_pools(), ModelState(), look, ALONE).groups[0]
    assert seen.placement_group is there


def test_silence_of_serve_is_told_apart_from_an_empty_list() -> None:
    silent = snapshot(applications=None, nodes=None)
    seen = observation_of(two_pools(), ModelState(), silent, ALONE)
    assert not seen.serve_answers
    assert seen.pools[0].live_workers is None
    assert observation_of(two_pools(), ModelState(), snapshot(applications=()), ALONE).serve_answers


def test_a_traceback_is_cut_down_to_what_failed_and_why() -> None:
    message = (
        "A replica failed to start with exception. Retrying 2 more time(s). Error:\n"
        "\x1b[36mray::ServeReplica:x\x1b[39m (pid=1)\n"
        '  File "x.py", line 1\n'
        "RuntimeError: out of memory\n"
    )
    assert condensed(message) == (
        "A replica failed to start with exception. Retrying 2 more time(s). Error: "
        "RuntimeError: out of memory"
    )
    assert condensed("") == ""


def test_what_a_group_does_is_seen_with_it() -> None:
    doing = GroupDoing(100.0, 10.0, 3, 0, 0.5, 120.0, 30.0)
    around = replace(ALONE, doing={SPEC.name: doing, "em-other-cheap-1": doing})
    (seen,) = observation_of(two_pools(), ModelState(), snapshot(), around).groups
    assert seen.doing == doing
    (seen,) = observation_of(two_pools(), ModelState(), snapshot(), ALONE).groups
    assert seen.doing is None


# Notices that a node will be taken


NODES = (
    RayNode("n1", "10.0.0.1", True, "cheap", 1.0, "spot-a"),
    RayNode("n2", "10.0.0.2", True, "cheap", 1.0, "spot-b"),
    RayNode("n3", "10.0.0.3", True, "cheap", 1.0, "spot-c"),
)
ON_TWO = (Replica("RUNNING", "n1", "10.0.0.1", 7), Replica("RUNNING", "n2", "10.0.0.2", 8))


@pytest.mark.parametrize(
    ("notices", "leaving_at_s", "live"),
    [
        pytest.param({}, None, 3, id="none"),
        pytest.param({"n2": 500.0}, 500.0, 2, id="by id"),
        pytest.param({"10.0.0.2": 500.0}, 500.0, 2, id="by address"),
        pytest.param({"spot-b": 500.0}, 500.0, 2, id="by name"),
        pytest.param({"spot-b": 500.0, "n1": 400.0}, 400.0, 1, id="the first of two nodes"),
        pytest.param({"spot-b": 500.0, "n2": 400.0}, 400.0, 2, id="one node told of twice"),
        pytest.param({"spot-c": 500.0}, None, 2, id="a node without this group"),
        pytest.param({"spot": 500.0, "": 1.0, "10.0.0": 1.0}, None, 3, id="strangers"),
    ],
)
def test_a_group_leaves_with_the_first_of_its_nodes(
    notices: dict[str, float], leaving_at_s: float | None, live: int
) -> None:
    look = snapshot(nodes=NODES, applications=(application(replicas=ON_TWO),), notices=notices)
    seen = observation_of(two_pools(), ModelState(), look, ALONE)
    assert seen.groups[0].leaving_at_s == leaving_at_s
    assert {pool.name: pool.live_workers for pool in seen.pools} == {"cheap": live, "dear": 0}


@pytest.mark.parametrize("key", ["n2", "10.0.0.2"])
def test_a_notice_counts_while_the_nodes_cannot_be_listed(key: str) -> None:
    look = snapshot(nodes=None, applications=(application(replicas=ON_TWO),), notices={key: 500.0})
    seen = observation_of(two_pools(), ModelState(), look, ALONE)
    assert seen.groups[0].leaving_at_s == 500.0


def record(name: str, model: str, *members: str) -> GroupRecord:
    spec = replace(SPEC, name=name, model=model)
    return GroupRecord(spec, GroupState.READY, 0.0, 0.0, members=members)


def test_a_notice_counts_while_serve_is_silent() -> None:
    state = ModelState(groups=(record(SPEC.name, "tiny", "n1/7", "n2/8"),))
    look = snapshot(nodes=NODES, applications=None, notices={"spot-b": 500.0})
    seen = observation_of(two_pools(), state, look, ALONE)
    assert seen.groups[0].leaving_at_s == 500.0


def test_what_runs_on_a_node_that_leaves_takes_no_room() -> None:
    """The node is no room either: what is left for others is the same as without both."""
    others = (
        record("em-a-cheap-1", "a", "n1/1", "n2/2"),
        replace(record("em-b-cheap-1", "b", "n3/3", "n3/4"), removed_at_s=5.0),
    )
    around = replace(ALONE, elsewhere=others)
    for notices, live, used, staying in (
        ({}, 3, 4, 2),
        ({"spot-b": 500.0}, 2, 3, 1),
        ({"spot-a": 500.0, "spot-b": 500.0}, 1, 2, 0),
        ({"spot-c": 500.0}, 2, 2, 2),
    ):
        look = snapshot(nodes=NODES, applications=(), ranks={}, notices=notices)
        pool = observation_of(two_pools(), ModelState(), look, around).pools[0]
        assert (pool.live_workers, pool.used_elsewhere, pool.staying_elsewhere) == (
            live,
            used,
            staying,
        )


class Notices:
    def __init__(self, answer: Mapping[str, float] | Exception) -> None:
        self.answer = answer

    async def read(self) -> Mapping[str, float]:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


async def test_a_notice_stands_while_its_source_is_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    notices = Notices({"n1": 500.0})
    observer = Observer(EmptyServe(), NoRanks(), notices)
    assert (await observer.look([])).notices == {"n1": 500.0}
    notices.answer = UpstreamUnavailable("the API server is away")
    look = await observer.look([])
    assert look.notices == {"n1": 500.0}
    assert look.problems == {"spot notices": "the API server is away"}
    notices.answer = {}
    assert (await observer.look([])).notices == {}

    async def hang() -> Mapping[str, float]:
        await asyncio.sleep(60)
        return {}

    monkeypatch.setattr("expertmesh.controller.observe._SERVE_TIMEOUT_S", 0.05)
    monkeypatch.setattr(notices, "read", hang)
    look = await observer.look([])
    assert look.problems == {"spot notices": "their source did not answer within 0.05 s"}
    assert look.nodes == ()


async def test_without_a_source_there_are_no_notices() -> None:
    look = await Observer(EmptyServe(), NoRanks()).look([])
    assert (look.notices, look.problems) == ({}, {})


# When ranks answered


async def test_the_time_of_an_answer_is_when_it_came_not_when_the_look_ended() -> None:
    clock = [100.0]

    class SlowServe(EmptyServe):
        async def applications(self) -> tuple[Application, ...]:
            await asyncio.sleep(0.05)
            clock[0] = 104.0
            return (application(rank_urls=(URL, "http://late")),)

    class Ranks:
        async def info(self, base_url: str) -> RankInfo | None:
            return INFO if base_url == URL else None

    known = replace(record(SPEC.name, "tiny"), ranks=(Rank(0, URL),))
    look = await Observer(SlowServe(), Ranks(), now_s=lambda: clock[0]).look([known])
    assert look.answered_at_s == {URL: 100.0}
    assert look.ranks == {URL: INFO, "http://late": None}


# The probe over real HTTP


@pytest.fixture
async def rank() -> AsyncIterator[TestServer]:
    async def info(request: web.Request) -> web.Response:
        if request.headers.get("X-EM-Mesh-Token") != "secret":
            return web.Response(status=401)
        match request.match_info["kind"]:
            case "good":
                return web.Response(body=msgspec.json.encode(INFO))
            case "hung":
                await asyncio.sleep(10)
            case "dead":
                return web.Response(status=500)
        return web.Response(text="<html>")

    app = web.Application()
    app.router.add_get("/{kind}/em/info", info)
    server = TestServer(app)
    await server.start_server()
    yield server
    await server.close()


@pytest.mark.parametrize(
    ("kind", "token", "answer"),
    [
        ("good", "secret", INFO),
        ("good", "wrong", None),
        ("hung", "secret", None),
        ("dead", "secret", None),
        ("odd", "secret", None),
    ],
)
async def test_a_probe_takes_only_a_ranks_own_answer(
    rank: TestServer, kind: str, token: str, answer: RankInfo | None
) -> None:
    async with aiohttp.ClientSession() as http:
        probe = HttpRankProbe(http, token, timeout_s=0.3)
        assert await probe.info(str(rank.make_url(f"/{kind}"))) == answer


async def test_a_probe_of_a_closed_port_is_no_error(rank: TestServer) -> None:
    url = str(rank.make_url("/good"))
    await rank.close()
    async with aiohttp.ClientSession() as http:
        assert await HttpRankProbe(http, "secret").info(url) is None


class EmptyServe:
    async def applications(self) -> tuple[Application, ...]:
        return ()

    async def nodes(self) -> tuple[RayNode, ...]:
        return ()

    async def placement_group_names(self) -> frozenset[str]:
        return frozenset()


class HangingServe:
    """A dashboard that takes connections and never answers."""

    async def applications(self) -> tuple[Application, ...]:
        await asyncio.sleep(60)
        return ()

    async def nodes(self) -> tuple[RayNode, ...]:
        raise ValueError("a bug in the client")

    async def placement_group_names(self) -> frozenset[str]:
        return frozenset()


class NoRanks:
    async def info(self, base_url: str) -> RankInfo | None:
        return None


async def test_what_cannot_be_seen_is_unknown_and_said_to_be(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("expertmesh.controller.observe._SERVE_TIMEOUT_S", 0.05)
    look = await Observer(HangingServe(), NoRanks()).look([])
    assert (look.applications, look.nodes, look.placement_groups) == (None, None, None)
    assert look.problems == {
        "applications": "Ray's dashboard did not answer within 0.05 s",
        "nodes": "ValueError: a bug in the client",
    }
