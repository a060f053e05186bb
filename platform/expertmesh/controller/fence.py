"""What a controller writes, guarded against the moment when another one leads.

Its own clock tells a leader when to stop; the term in the journal catches what a clock cannot: a
process that was stopped in the middle of a step and goes on later. A new leader opens a new term
before it reads the last state, so an earlier one can record no decision any more, and what is not
recorded is not done.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import Any, Protocol

from expertmesh.controller.apply import ServeWriter
from expertmesh.controller.journal import Entry, JournalStore
from expertmesh.core.domain.fleet import GroupSpec
from expertmesh.errors import UpstreamUnavailable

_log = logging.getLogger(__name__)

_LOOK_TIMEOUT_S = 2.0


class TermStore(JournalStore, Protocol):
    async def open_term(self, at_s: float, kind: str, payload: dict[str, Any]) -> int: ...

    async def newest_term(self) -> int: ...

    async def append_in_term(
        self, term: int, at_s: float, kind: str, model: str | None, payload: dict[str, Any]
    ) -> int | None: ...


class Term:
    """One leadership, from taking the lease until it is over."""

    def __init__(self, number: int, may_act: Callable[[], bool]) -> None:
        """`may_act`: by the lease and the own clock."""
        self.number = number
        self.over = asyncio.Event()
        self.overtaken = False
        """A later term was seen in the journal."""
        self._may_act = may_act

    @property
    def holds(self) -> bool:
        return not self.over.is_set() and self._may_act()

    def end(self) -> None:
        self.over.set()

    def overtake(self) -> None:
        if not self.overtaken:
            _log.error("a later term than %d has begun: this controller acts no more", self.number)
        self.overtaken = True
        self.over.set()

    def check(self) -> None:
        """Raises UpstreamUnavailable when the term is over."""
        if not self.holds:
            raise UpstreamUnavailable(f"term {self.number} is over: another controller may lead")


class FencedJournal:
    def __init__(self, store: TermStore, term: Term) -> None:
        self._store = store
        self._term = term

    async def append(
        self, at_s: float, kind: str, model: str | None, payload: dict[str, Any]
    ) -> int:
        self._term.check()
        seq = await self._store.append_in_term(self._term.number, at_s, kind, model, payload)
        if seq is None:
            self._term.overtake()
        # It may have been held up for long: what is recorded is done by whoever leads now.
        self._term.check()
        assert seq is not None
        return seq

    async def read(
        self, after: int = 0, limit: int = 100, model: str | None = None, newest: bool = False
    ) -> "tuple[Entry, ...]":
        return await self._store.read(after, limit, model, newest)


class FencedServe:
    """A PUT names all applications: a late one would undo what a later leader has done."""

    def __init__(self, serve: ServeWriter, store: TermStore, term: Term) -> None:
        self._serve = serve
        self._store = store
        self._term = term

    async def put(self, specs: tuple[GroupSpec, ...]) -> None:
        await self._check_term()
        self._term.check()
        putting = asyncio.ensure_future(self._serve.put(specs))
        over = asyncio.ensure_future(self._term.over.wait())
        try:
            await asyncio.wait({putting, over}, return_when=asyncio.FIRST_COMPLETED)
            if putting.done():
                putting.result()
            self._term.check()
        finally:
            for task in (putting, over):
                task.cancel()
            await asyncio.gather(putting, over, return_exceptions=True)

    async def _check_term(self) -> None:
        try:
            async with asyncio.timeout(_LOOK_TIMEOUT_S):
                newest = await self._store.newest_term()
        except (UpstreamUnavailable, TimeoutError) as error:
            # What was decided stays valid while the store is away; the lease still counts.
            _log.warning("cannot read the newest term: %s", str(error) or "no answer")
            return
        if newest > self._term.number:
            self._term.overtake()
