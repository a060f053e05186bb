"""Leading and following, with leases in memory and controllers that only count."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import aiohttp
import pytest
from aiohttp.test_utils import TestServer
from tests.controller.memory_store import MemoryJournal
from tests.core.scaling.world import EP2

from expertmesh.clients.kubernetes.events import Saying
from expertmesh.controller.announce import AnnouncedJournal
from expertmesh.controller.api import build_api
from expertmesh.controller.fence import FencedJournal, FencedServe, Term
from expertmesh.controller.leadership import Leadership, LeaseKeeper
from expertmesh.controller.lease import LeaseTiming, LeaseView
from expertmesh.controller.memory_lease import MemoryLease
from expertmesh.core.domain.fleet import Fleet, GroupSpec
from expertmesh.core.domain.lease import LeaseRecord
from expertmesh.core.domain.traffic import GatewayReport
from expertmesh.errors import UpstreamUnavailable

TOKEN = "the mesh token"
AUTH = {"Authorization": f"Bearer {TOKEN}"}
QUICK = LeaseTiming(
    duration_s=1.2, act_for_s=1.0, renew_every_s=0.15, look_every_s=0.1, request_timeout_s=0.3
)


class SharedLease(MemoryLease):
    """Two candidates have it; it can be slow, away, or lose its answers."""

    def __init__(self) -> None:
        super().__init__()
        self.is_down = False
        self.hangs = False
        self.ignores_cancellation = False
        """While it hangs, as SQLite does that waits for a lock."""
        self.loses_answers = False
        self.writes = 0

    async def read(self) -> LeaseRecord:
        await self._answer()
        return await super().read()

    async def write(self, wanted: LeaseRecord) -> LeaseRecord | None:
        await self._answer()
        self.writes += 1
        written = await super().write(wanted)
        if self.loses_answers:
            raise UpstreamUnavailable("the answer was lost")
        return written

    async def _answer(self) -> None:
        while self.hangs:
            try:
                await asyncio.sleep(0.01)
            except asyncio.CancelledError:
                if not self.ignores_cancellation:
                    raise
        if self.is_down:
            raise UpstreamUnavailable("store: connection refused")


class TermJournal(MemoryJournal):
    """As the journal of the store, with terms."""

    def __init__(self) -> None:
        super().__init__()
        self.term = 0

    async def open_term(self, at_s: float, kind: str, payload: dict[str, Any]) -> int:
        await self.append(at_s, kind, None, payload)
        self.term += 1
        return self.term

    async def newest_term(self) -> int:
        self._answer()
        return self.term

    async def append_in_term(
        self, term: int, at_s: float, kind: str, model: str | None, payload: dict[str, Any]
    ) -> int | None:
        if term < self.term:
            return None
        return await self.append(at_s, kind, model, payload)


@dataclass
class CountingController:
    """Runs until it is stopped; whether it may still act is what the tests ask."""

    term: Term
    turns: int = 0
    stopped: bool = False
    hangs: bool = False
    """In a turn, when it is to stop."""
    breaks: bool = False
    reports: list[GatewayReport] = field(default_factory=list)
    fleet: Fleet | None = field(default_factory=lambda: Fleet(version=1))

    async def run(self, stop: asyncio.Event) -> None:
        if self.breaks:
            raise RuntimeError("a fault of the controller")
        while not stop.is_set() or self.hangs:
            self.turns += 1
            await asyncio.sleep(0.01)
        self.stopped = True

    @property
    def metrics(self) -> "CountingController":
        return self

    def text(self) -> bytes:
        return b"em_controller_turns 1.0\n"

    def exchange(self, report: GatewayReport) -> Fleet | None:
        self.reports.append(report)
        return self.fleet

    def summaries(self) -> dict[str, Any]:
        return {"tiny": {"reason": "because"}}

    def doing(self) -> dict[str, Any]:
        return {}

    def flows(self) -> dict[str, Any]:
        return {}

    def not_ready(self) -> dict[str, str]:
        return {}

    def is_stuck(self) -> bool:
        return False


class Candidate:
    def __init__(self, name: str, lease: SharedLease, journal: TermJournal) -> None:
        self.built: list[CountingController] = []
        self.breaks = False
        view = LeaseView(f"{name}_1", f"http://{name}:1", QUICK)
        self.keeper = LeaseKeeper(lease, view)
        self.leadership = Leadership(self.keeper, journal, self._build, lambda: 1_000_000.0)
        self._stop = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def _build(self, term: Term) -> CountingController:
        self.built.append(CountingController(term, breaks=self.breaks))
        return self.built[-1]

    @property
    def leads(self) -> bool:
        return self.leadership.leads

    @property
    def last(self) -> CountingController:
        return self.built[-1]

    def start(self) -> None:
        self._task = asyncio.create_task(self.leadership.run(self._stop))

    async def stop(self) -> None:
        self._stop.set()
        await self.ended()

    async def ended(self) -> None:
        assert self._task is not None
        await self._task

    async def kill(self) -> None:
        """Nothing of its end is done."""
        self.keeper.release = _nothing  # type: ignore[method-assign]
        assert self._task is not None
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


async def _nothing() -> None:
    pass


class Pair:
    def __init__(self) -> None:
        self.lease, self.journal = SharedLease(), TermJournal()
        self.one = Candidate("one", self.lease, self.journal)
        self.two = Candidate("two", self.lease, self.journal)


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    """`one` leads, `two` follows."""
    pair = Pair()
    pair.one.start()
    await until(lambda: pair.one.leads)
    pair.two.start()
    await until(lambda: pair.two.keeper.view.record is not None)
    yield pair
    for candidate in (pair.one, pair.two):
        if candidate._task is not None and not candidate._task.done():
            await candidate.kill()


async def until(what: Callable[[], Any], limit_s: float = 5.0) -> float:
    loop = asyncio.get_running_loop()
    began_s = loop.time()
    while not what():
        assert loop.time() - began_s < limit_s
        await asyncio.sleep(0.005)
    return loop.time() - began_s


# Taking over


async def test_one_leads_and_the_other_waits(pair: Pair) -> None:
    await asyncio.sleep(2 * QUICK.duration_s)
    assert (pair.one.leads, pair.two.leads) == (True, False)
    assert (len(pair.one.built), len(pair.two.built)) == (1, 0)
    assert pair.two.leadership.leader_url == "http://one:1"
    assert pair.one.leadership.leader_url is None


async def test_a_killed_leader_is_followed_when_its_lease_has_run_out(pair: Pair) -> None:
    await pair.one.kill()
    took_s = await until(lambda: pair.two.leads)
    assert QUICK.duration_s / 2 <= took_s <= QUICK.duration_s + 1.0
    assert pair.two.last.term.number == 2
    assert [entry.payload["holder"] for entry in pair.journal.entries] == ["one_1", "two_1"]


async def test_a_clean_stop_gives_the_lease_back(pair: Pair) -> None:
    await pair.one.stop()
    assert pair.one.last.stopped
    assert await until(lambda: pair.two.leads) <= QUICK.duration_s / 2


async def test_a_leader_that_cannot_renew_stops_before_another_may_begin(pair: Pair) -> None:
    first = pair.one.last
    pair.lease.is_down = True
    await until(lambda: not pair.one.leads)
    assert not pair.two.leads
    await until(lambda: first.stopped)
    assert "connection refused" in pair.one.leadership.not_ready()["lease"]
    assert "connection refused" in pair.two.leadership.not_ready()["lease"]
    pair.lease.is_down = False
    await until(lambda: pair.one.leads or pair.two.leads)
    assert pair.journal.term == 2
    await until(lambda: not pair.one.leadership.not_ready())


async def test_a_lease_that_hangs_is_as_good_as_away(pair: Pair) -> None:
    pair.lease.hangs = True
    took_s = await until(lambda: not pair.one.leads)
    assert took_s <= QUICK.act_for_s + 0.5
    await until(lambda: pair.one.last.stopped)
    assert "no answer in time" in pair.one.leadership.not_ready()["lease"]


async def test_a_request_that_cannot_be_broken_off_is_not_waited_for(pair: Pair) -> None:
    pair.lease.hangs = pair.lease.ignores_cancellation = True
    took_s = await until(lambda: pair.one.last.term.over.is_set())
    assert took_s <= QUICK.act_for_s + 0.5
    await until(lambda: "lease" in pair.one.leadership.not_ready())
    await asyncio.sleep(0.5)
    pair.lease.hangs = False
    await until(lambda: pair.one.leads or pair.two.leads)
    await until(lambda: not pair.one.leadership.not_ready())


async def test_renewals_whose_answers_are_lost_cost_the_leadership_in_the_end(pair: Pair) -> None:
    """They may have been done or not: the leader may not count on it."""
    pair.lease.loses_answers = True
    await until(lambda: not pair.one.leads)
    pair.lease.loses_answers = False
    await until(lambda: pair.one.leads or pair.two.leads)


async def test_a_single_lost_answer_costs_nothing(pair: Pair) -> None:
    pair.lease.loses_answers = True
    writes = pair.lease.writes
    await until(lambda: pair.lease.writes > writes)
    pair.lease.loses_answers = False
    await asyncio.sleep(1.5 * QUICK.duration_s)
    assert pair.one.leads
    assert len(pair.one.built) == 1


async def test_a_lease_that_somebody_took_by_force_ends_the_leadership(pair: Pair) -> None:
    known = await pair.lease.read()
    await pair.lease.write(replace(known, holder="three_1", url="http://three:1"))
    await until(lambda: not pair.one.leads)
    assert pair.one.leadership.leader_url == "http://three:1"
    await until(lambda: pair.one.leads or pair.two.leads)


async def test_a_controller_that_does_not_come_to_an_end_is_cancelled(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("expertmesh.controller.leadership._STOP_PATIENCE_S", 0.1)
    pair.one.last.hangs = True
    pair.lease.is_down = True
    await until(lambda: not pair.one.leads)
    await asyncio.sleep(0.3)
    turns = pair.one.last.turns
    await asyncio.sleep(0.1)
    assert pair.one.last.turns == turns


async def test_a_fault_of_the_controller_ends_the_process_and_frees_the_lease() -> None:
    pair = Pair()
    pair.one.breaks = True
    pair.one.start()
    with pytest.raises(RuntimeError, match="a fault of the controller"):
        await pair.one.ended()
    assert (await pair.lease.read()).holder is None


async def test_without_a_store_no_term_begins(pair: Pair) -> None:
    pair.journal.is_down = True
    await pair.one.stop()
    await until(lambda: pair.two.keeper.may_act)
    await asyncio.sleep(0.2)
    assert (pair.two.leads, pair.two.built) == (False, [])
    pair.journal.is_down = False
    await until(lambda: pair.two.leads)


# A later term


async def test_a_leader_that_finds_a_later_term_lets_go_and_stays_away(
    pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    """As when two controllers of one store do not have the same lease."""
    pair.journal.term += 1
    journal = FencedJournal(pair.journal, pair.one.last.term)
    with caplog.at_level(logging.ERROR), pytest.raises(UpstreamUnavailable, match="term 1 is over"):
        await journal.append(1.0, "decision", "tiny", {})
    assert not pair.one.leads
    await until(lambda: pair.two.leads)
    assert "a later term than 1 has begun" in caplog.text
    assert len(pair.one.built) == 1


def term(number: int = 1, holds: bool = True) -> Term:
    return Term(number, lambda: holds)


async def test_a_leader_whose_time_is_over_records_nothing() -> None:
    store = TermJournal()
    journal = FencedJournal(store, term(holds=False))
    with pytest.raises(UpstreamUnavailable, match="term 1 is over"):
        await journal.append(1.0, "decision", "tiny", {})
    assert store.entries == []


async def test_what_was_recorded_too_late_is_not_done() -> None:
    ours = term()

    class Slow(TermJournal):
        async def append_in_term(self, *args: Any) -> int | None:
            seq = await super().append_in_term(*args)
            ours.end()
            return seq

    with pytest.raises(UpstreamUnavailable, match="term 1 is over"):
        await FencedJournal(Slow(), ours).append(1.0, "decision", "tiny", {})


@dataclass
class Serve:
    puts: list[tuple[GroupSpec, ...]] = field(default_factory=list)
    hangs: bool = False
    cancelled: bool = False

    async def put(self, specs: tuple[GroupSpec, ...]) -> None:
        self.puts.append(specs)
        try:
            if self.hangs:
                await asyncio.sleep(3600)
        except asyncio.CancelledError:
            self.cancelled = True
            raise


SPEC = GroupSpec("em-tiny-cheap-1", "tiny", "someone/tiny", "cheap", EP2, 1024, 0.6)


async def test_a_put_of_the_leader_is_done() -> None:
    serve, store = Serve(), TermJournal()
    store.term = 1
    await FencedServe(serve, store, term()).put((SPEC,))
    assert serve.puts == [(SPEC,)]


async def test_a_put_after_the_time_or_in_an_earlier_term_is_not_sent() -> None:
    serve, store = Serve(), TermJournal()
    store.term = 2
    with pytest.raises(UpstreamUnavailable, match="term 2 is over"):
        await FencedServe(serve, store, term(2, holds=False)).put((SPEC,))
    late = term(1)
    with pytest.raises(UpstreamUnavailable, match="term 1 is over"):
        await FencedServe(serve, store, late).put((SPEC,))
    assert serve.puts == []
    assert late.overtaken


async def test_a_put_goes_on_while_the_store_is_away() -> None:
    serve, store = Serve(), TermJournal()
    store.is_down = True
    await FencedServe(serve, store, term()).put((SPEC,))
    assert len(serve.puts) == 1


async def test_a_put_that_is_under_way_is_given_up_with_the_term() -> None:
    serve, ours = Serve(hangs=True), term()
    putting = asyncio.create_task(FencedServe(serve, TermJournal(), ours).put((SPEC,)))
    await until(lambda: serve.puts)
    ours.end()
    with pytest.raises(UpstreamUnavailable, match="term 1 is over"):
        await putting
    assert serve.cancelled


async def test_a_put_that_fails_fails() -> None:
    class Refusing(Serve):
        async def put(self, specs: tuple[GroupSpec, ...]) -> None:
            raise UpstreamUnavailable("Ray answered 500")

    with pytest.raises(UpstreamUnavailable, match="Ray answered 500"):
        await FencedServe(Refusing(), TermJournal(), term()).put((SPEC,))


# What a follower shows

Get = Callable[[Candidate, str], Awaitable[tuple[int, Any]]]


@asynccontextmanager
async def api_of(candidate: Candidate) -> AsyncIterator[tuple[aiohttp.ClientSession, str]]:
    leadership = candidate.leadership
    server = TestServer(build_api(leadership, TOKEN, leadership))
    await server.start_server()
    async with aiohttp.ClientSession(headers=AUTH) as http:
        yield http, str(server.make_url("")).rstrip("/")
    await server.close()


async def test_a_follower_is_healthy_and_ready_and_names_the_leader(pair: Pair) -> None:
    report = {"gateway": "g1", "sent_at_s": 1.0}
    async with api_of(pair.two) as (http, url):
        async with http.get(f"{url}/healthz") as response:
            assert response.status == 200
        async with http.get(f"{url}/readyz") as response:
            assert await response.json() == {"status": "ready", "role": "follower"}
        for method, path in (("POST", "/v1/exchange"), ("GET", "/v1/fleet")):
            async with http.request(
                method, url + path, json=report if method == "POST" else None
            ) as response:
                error = (await response.json())["error"]
                assert (response.status, error["code"]) == (503, "not_leader")
                assert error["leader"] == "http://one:1"
        async with http.get(f"{url}/metrics") as response:
            text = await response.text()
            assert "em_controller_leads 0.0" in text
            assert "em_controller_term 0.0" in text
            assert "em_controller_turns" not in text
        async with http.get(f"{url}/v1/decisions") as response:
            assert await response.json() == {"decisions": []}


async def test_a_leader_answers_for_itself(pair: Pair) -> None:
    async with api_of(pair.one) as (http, url):
        async with http.get(f"{url}/readyz") as response:
            assert await response.json() == {"status": "ready"}
        async with http.post(
            f"{url}/v1/exchange", json={"gateway": "g1", "sent_at_s": 1.0}
        ) as response:
            assert (await response.json())["version"] == 1
        async with http.get(f"{url}/metrics") as response:
            text = await response.text()
            assert "em_controller_leads 1.0" in text
            assert "em_controller_term 1.0" in text
            assert "em_controller_turns 1.0" in text
    assert len(pair.one.last.reports) == 1


async def test_a_former_leader_answers_no_gateway_from_the_moment_its_time_is_over(
    pair: Pair,
) -> None:
    pair.one.keeper.view = pair.one.keeper.view.resigned()
    report = GatewayReport("g1", 1.0)
    assert pair.one.leadership.exchange(report) is None
    assert pair.one.leadership.fleet is None
    assert pair.one.last.reports == []


async def test_without_any_leader_the_answer_is_to_ask_again() -> None:
    pair = Pair()
    async with (
        api_of(pair.one) as (http, url),
        http.post(f"{url}/v1/exchange", json={"gateway": "g1", "sent_at_s": 1.0}) as response,
    ):
        assert (await response.json())["error"]["code"] == "starting"


# Announcements


async def test_each_action_of_a_recorded_decision_is_said() -> None:
    said: list[Saying] = []
    journal = AnnouncedJournal(MemoryJournal(), said.append)
    actions = [
        {"kind": "start", "group": "em-tiny-cheap-1"},
        {"kind": "drain", "group": "em-tiny-dear-1", "why": "it will be lost"},
    ]
    decision = {"reason": "40 requests wait", "actions": actions}
    await journal.append(1.0, "controller started", None, {"groups": []})
    assert await journal.append(2.0, "decision", "tiny", {"decision": decision}) == 2
    await journal.append(3.0, "decision", "tiny", {"decision": {"reason": "", "actions": []}})
    assert said == [
        Saying("StartGroup", "em-tiny-cheap-1 of tiny: 40 requests wait (decision 2)"),
        Saying("DrainGroup", "em-tiny-dear-1 of tiny: it will be lost (decision 2)"),
    ]
    assert len(await journal.read()) == 3


async def test_a_decision_that_was_not_recorded_is_not_said() -> None:
    store, said = MemoryJournal(), list[Saying]()
    store.is_down = True
    with pytest.raises(UpstreamUnavailable):
        await AnnouncedJournal(store, said.append).append(
            1.0, "decision", "tiny", {"decision": {"reason": "", "actions": [{}]}}
        )
    assert said == []
