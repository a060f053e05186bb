"""Two controllers, one of which leads: the other one is ready to take over within seconds.

A leader runs a controller that continues from the journal, as after a restart. When the lease is
lost the controller is stopped and dropped; the process goes on as a follower.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Protocol, TypeVar

from prometheus_client import CollectorRegistry, Gauge, generate_latest

from expertmesh.controller.fence import Term, TermStore
from expertmesh.controller.health import StepHealth
from expertmesh.controller.journal import DecisionJournal
from expertmesh.controller.lease import LeaseStep, LeaseStore, LeaseView
from expertmesh.controller.picture import ExpertHeat, Picture
from expertmesh.core.domain.fleet import Fleet
from expertmesh.core.domain.traffic import GatewayReport
from expertmesh.core.scaling.demand import Flow, GroupDoing
from expertmesh.core.scaling.replay import DecisionRecord
from expertmesh.errors import UpstreamUnavailable
from expertmesh.telemetry import metrics as names

_log = logging.getLogger(__name__)
_Answer = TypeVar("_Answer")

TERM = "term"
"""Kind of the journal entry with which a leader begins."""

_RETRY_S = 1.0
_STUCK_AFTER_S = 120.0
_TERM_TIMEOUT_S = 5.0
_STOP_PATIENCE_S = 5.0
"""For the turn of a controller that has lost the lease; what it writes is refused anyway."""


def boot_time_s() -> float:
    """Monotonic, and it also counts while the machine is suspended."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class LeaseKeeper:
    """Renews the lease while it is held, and takes it when it is free."""

    def __init__(
        self, store: LeaseStore, view: LeaseView, now_s: Callable[[], float] = boot_time_s
    ) -> None:
        """`now_s` is a monotonic clock."""
        self._store = store
        self._now_s = now_s
        self._led = False
        self._not_before_s = float("-inf")
        self._wake = asyncio.Event()
        self._unanswered: asyncio.Task[Any] | None = None
        self.view = view
        self.problem: str | None = None
        """Why the lease cannot be read or written."""
        self.turned_at_s = now_s()
        self.changed: Callable[[bool], None] = lambda leads: None
        """Called when this process begins and when it ceases to lead."""

    @property
    def may_act(self) -> bool:
        return self.view.may_act(self._now_s())

    @property
    def turned_ago_s(self) -> float:
        return self._now_s() - self.turned_at_s

    async def run(self) -> None:
        """For ever."""
        while True:
            await self.step()
            now_s = self._now_s()
            due_s = self.view.wake_at_s(now_s)
            if self._led:
                due_s = min(due_s, self.view.act_until_s)
            try:
                async with asyncio.timeout(max(0.0, due_s - now_s)):
                    await self._wake.wait()
            except TimeoutError:
                continue
            self._wake.clear()

    async def step(self) -> None:
        """One look, and one write when it is due."""
        if self._unanswered is None or self._unanswered.done():
            self._unanswered = None
            self.turned_at_s = self._now_s()
        try:
            await self._step(leads=self._note())
        except UpstreamUnavailable as error:
            self._failed(str(error))
        except TimeoutError:
            self._failed("no answer in time")
        except Exception as error:
            _log.exception("the lease cannot be kept")
            self._failed(f"{type(error).__name__}: {error}")
        else:
            if self.problem is not None:
                _log.info("lease: it can be read and written again")
            self.problem = None
        self._note()

    def give_up(self, for_s: float) -> None:
        """Leads no more, and does not try to for so long."""
        self._not_before_s = self._now_s() + for_s
        self.view = self.view.resigned()
        self._note()
        self._wake.set()

    async def release(self) -> None:
        """So that another one can take over at once; when it fails the lease runs out."""
        self.view = self.view.resigned()
        self._note()
        free = self.view.release()
        if free is None:
            return
        try:
            await self._ask(self._store.write(free), self.view.timing.request_timeout_s)
        except Exception as error:
            _log.warning("lease: cannot be given back: %s", str(error) or type(error).__name__)
        else:
            _log.info("lease: given back")

    def _note(self) -> bool:
        leads = self.may_act
        if leads != self._led:
            self._led = leads
            self.changed(leads)
        return leads

    def _failed(self, problem: str) -> None:
        if self.problem is None:
            _log.error("lease: %s", problem)
        self.problem = problem

    async def _step(self, leads: bool) -> None:
        if not leads:
            await self._look()
        now_s = self._now_s()
        step = self.view.next_step(now_s)
        if step is LeaseStep.WAIT or (step is LeaseStep.TAKE and now_s < self._not_before_s):
            return
        wanted = self.view.claim()
        written = await self._ask(self._store.write(wanted), self._patience_s(now_s))
        if written is None:
            await self._look()
        else:
            self.view = self.view.wrote(written, now_s, self._now_s())

    async def _look(self) -> None:
        record = await self._ask(self._store.read(), self._patience_s(self._now_s()))
        self.view = self.view.saw(record, self._now_s())

    async def _ask(self, question: Coroutine[Any, Any, _Answer], patience_s: float) -> _Answer:
        """Raises TimeoutError in time even where a request cannot be broken off, as one to SQLite
        that waits for a lock; no other one is begun until that one has ended."""
        if self._unanswered is not None:
            question.close()
            await asyncio.wait({self._unanswered}, timeout=patience_s)
            raise TimeoutError
        asking = asyncio.create_task(question)
        try:
            await asyncio.wait({asking}, timeout=patience_s)
            if asking.done():
                return asking.result()
            raise TimeoutError
        finally:
            if not asking.done():
                asking.cancel()
                self._unanswered = asking
                asking.add_done_callback(_forget)

    def _patience_s(self, now_s: float) -> float:
        """Waiting for an answer must not keep a leader from seeing that its time is over."""
        patience_s = self.view.timing.request_timeout_s
        if self.view.may_act(now_s):
            patience_s = min(patience_s, self.view.act_until_s - now_s)
        return patience_s


class MetricsText(Protocol):
    def text(self) -> bytes: ...


class LedController(Protocol):
    """The controller of one term."""

    @property
    def fleet(self) -> Fleet | None: ...
    @property
    def metrics(self) -> MetricsText: ...
    def exchange(self, report: GatewayReport) -> Fleet | None: ...
    def summaries(self) -> dict[str, dict[str, Any]]: ...
    def doing(self) -> dict[str, GroupDoing]: ...
    def flows(self) -> dict[str, Flow]: ...
    def picture(self) -> Picture | None: ...
    def heat(self) -> dict[str, ExpertHeat]: ...
    def not_ready(self) -> dict[str, str]: ...
    def is_stuck(self) -> bool: ...
    async def run(self, stop: asyncio.Event) -> None: ...


class Leadership:
    """What the HTTP API shows of this process, whether it leads or follows."""

    def __init__(
        self,
        keeper: LeaseKeeper,
        journal: TermStore,
        build: Callable[[Term], LedController],
        unix_now_s: Callable[[], float] = time.time,
    ) -> None:
        """`build` makes a controller that writes through the fence of its term."""
        self._keeper = keeper
        self._store = journal
        self._journal = DecisionJournal(journal)
        self._build = build
        self._unix_now_s = unix_now_s
        self._changed = asyncio.Event()
        self._term: Term | None = None
        self._controller: LedController | None = None
        self._health = StepHealth()
        self._registry = CollectorRegistry()
        self._leads_gauge = _gauge(names.CONTROLLER_LEADS, self._registry)
        self._term_gauge = _gauge(names.CONTROLLER_TERM, self._registry)
        keeper.changed = self._lease_changed

    async def run(self, stop: asyncio.Event) -> None:
        """Until `stop`; the lease is then given back, and the groups stay as they are."""
        keeping = asyncio.create_task(self._keeper.run())
        try:
            while not stop.is_set():
                self._changed.clear()
                if self._keeper.may_act:
                    await self._lead(stop)
                else:
                    await _first_of(stop.wait(), self._changed.wait())
        finally:
            keeping.cancel()
            await asyncio.gather(keeping, return_exceptions=True)
            await self._keeper.release()

    # What the HTTP API asks

    @property
    def leads(self) -> bool:
        return self._term is not None and self._term.holds

    @property
    def leader_url(self) -> str | None:
        """Of another process that leads, as far as is known."""
        url = self._keeper.view.leader_url
        return None if url == self._keeper.view.url else url

    @property
    def fleet(self) -> Fleet | None:
        controller = self._leading()
        return controller.fleet if controller is not None else None

    def exchange(self, report: GatewayReport) -> Fleet | None:
        controller = self._leading()
        return controller.exchange(report) if controller is not None else None

    def summaries(self) -> dict[str, dict[str, Any]]:
        controller = self._leading()
        return controller.summaries() if controller is not None else {}

    def doing(self) -> dict[str, GroupDoing]:
        controller = self._leading()
        return controller.doing() if controller is not None else {}

    def flows(self) -> dict[str, Flow]:
        controller = self._leading()
        return controller.flows() if controller is not None else {}

    def picture(self) -> Picture | None:
        """None while another process leads."""
        controller = self._leading()
        return controller.picture() if controller is not None else None

    def heat(self) -> dict[str, ExpertHeat]:
        controller = self._leading()
        return controller.heat() if controller is not None else {}

    async def decisions(self, limit: int, model: str | None) -> list[dict[str, Any]]:
        """From the journal, so a follower answers too."""
        return await self._journal.newest(limit, model)

    async def last_record(self, model: str) -> DecisionRecord | None:
        return await self._journal.last(model)

    async def explained(self, seq: int) -> dict[str, Any] | None:
        return await self._journal.explained(seq)

    def not_ready(self) -> dict[str, str]:
        """A follower is ready when it could take over."""
        controller = self._leading()
        problems = self._health.repeated()
        if controller is not None:
            problems |= controller.not_ready()
        if self._keeper.problem is not None and not self._keeper.may_act:
            problems["lease"] = self._keeper.problem
        return problems

    def is_stuck(self) -> bool:
        controller = self._controller
        return self._keeper.turned_ago_s > _STUCK_AFTER_S or (
            controller is not None and controller.is_stuck()
        )

    @property
    def metrics(self) -> "Leadership":
        return self

    def text(self) -> bytes:
        """The metrics of this process, and those of the controller while it leads."""
        controller = self._leading()
        self._leads_gauge.set(controller is not None)
        self._term_gauge.set(self._term.number if self._term is not None else 0)
        own = generate_latest(self._registry)
        return own + controller.metrics.text() if controller is not None else own

    # Leading

    def _leading(self) -> LedController | None:
        return self._controller if self.leads else None

    def _lease_changed(self, leads: bool) -> None:
        if not leads and self._term is not None:
            _log.warning("the lease is not held any more: term %d is over", self._term.number)
            self._term.end()
        self._changed.set()

    async def _lead(self, stop: asyncio.Event) -> None:
        """One term, until it is over or the process is to stop."""
        term = await self._open_term(stop)
        if term is None:
            return
        try:
            controller = self._build(term)
            self._term, self._controller = term, controller
            _log.info("this controller leads: term %d", term.number)
            await self._run(controller, term, stop)
        finally:
            self._term = self._controller = None
        if stop.is_set():
            return
        _log.info("this controller follows after term %d", term.number)
        if term.overtaken:
            # Whoever began the later term does not keep to this lease; let it be for a while.
            self._keeper.give_up(self._keeper.view.timing.duration_s)
            await self._keeper.release()

    async def _open_term(self, stop: asyncio.Event) -> Term | None:
        view = self._keeper.view
        origin = {"holder": view.me, "url": view.url}
        try:
            async with asyncio.timeout(_TERM_TIMEOUT_S):
                number = await self._store.open_term(self._unix_now_s(), TERM, origin)
        except Exception as error:
            self._health.failed("open term", f"{type(error).__name__}: {error}")
            await _first_of(stop.wait(), asyncio.sleep(_RETRY_S))
            return None
        self._health.succeeded("open term")
        term = Term(number, lambda: self._keeper.may_act)
        return term if term.holds else None

    async def _run(self, controller: LedController, term: Term, stop: asyncio.Event) -> None:
        ended = asyncio.Event()
        running = asyncio.create_task(controller.run(ended))
        try:
            await _first_of(asyncio.wait({running}), stop.wait(), term.over.wait())
            ended.set()
            if not stop.is_set():
                await asyncio.wait({running}, timeout=_STOP_PATIENCE_S)
                if not running.done():
                    running.cancel()
            await asyncio.gather(running, return_exceptions=term.over.is_set())
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)


def _forget(task: "asyncio.Task[Any]") -> None:
    if not task.cancelled():
        task.exception()


async def _first_of(*events: Awaitable[Any]) -> None:
    tasks = [asyncio.ensure_future(event) for event in events]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _gauge(metric: names.Metric, registry: CollectorRegistry) -> Gauge:
    return Gauge(metric.name, metric.help, metric.labels, registry=registry)
