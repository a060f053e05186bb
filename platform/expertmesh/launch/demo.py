"""The demo's story: a group where it is cheapest, a burst that earns a second one and meets the
budget, quiet that returns it, and a spot node that is taken away under the first."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

import aiohttp
from openai import APIStatusError, AsyncOpenAI

from expertmesh.core.domain.fleet import Group, GroupState
from expertmesh.core.domain.hardware import Market
from expertmesh.core.metering.report import By, UsageReport
from expertmesh.errors import UpstreamUnavailable
from expertmesh.launch.controller_view import ControllerView
from expertmesh.launch.local import LocalSystem
from expertmesh.store.database import open_database
from expertmesh.store.keys import KeyBook
from expertmesh.store.ledger import Ledger
from expertmesh.store.report import usage_report

QUESTIONS = (
    "Tell me a story about a fox.",
    "What is the sea?",
    "Tell me a story about a happy dog.",
    "Who are you?",
    "Tell me a story about a kite.",
    "What do bees make?",
)
_BURST_CLIENTS = 20
"""More than two groups should carry: what a third one costs is above the budget."""
_NOTICE_S = 60.0
"""Between the notice of a spot node's loss and the loss."""
_LOSS_CLIENTS = 2
_POLL_S = 0.5
_READY_TIMEOUT_S = 240.0
_SCALE_UP_TIMEOUT_S = 240.0
_SHARED_LOAD_S = 8.0
"""How long the burst goes on over both groups."""
_SCALE_DOWN_TIMEOUT_S = 180.0
_MOVE_TIMEOUT_S = 240.0


@dataclass(frozen=True, slots=True)
class BurstResult:
    answered: int
    failed: int
    groups_at_peak: int


class Demo:
    """Raises UpstreamUnavailable when the system does not do in time what the story tells."""

    def __init__(
        self, local: LocalSystem, report: Callable[[str], None], write: Callable[[str], None]
    ) -> None:
        """`report` takes whole lines, `write` the pieces of a streamed answer."""
        self._local = local
        self._report = report
        self._write = write
        self._model = local.system.models[0].name
        self._started_at_s = time.time()
        self._told_up_to = 0
        self._is_streaming = False
        """An answer is being written: nothing else is told in the middle of it."""

    async def run(self) -> UsageReport:
        async with self._client() as client, aiohttp.ClientSession() as http:
            view = ControllerView(http, self._local.controller_url, self._local.state.mesh_token())
            async with self._telling_decisions(view):
                self._report(f"waiting for the first group of {self._model}")
                await self._until_groups(view, 1, _READY_TIMEOUT_S)
                await self._stream_one(client)
                burst = await self._burst(client, view)
                self._report(
                    f"burst over: {burst.answered} answers, {burst.failed} failed, "
                    f"{burst.groups_at_peak} groups at the peak; now it is quiet"
                )
                await self._until_groups(view, 1, _SCALE_DOWN_TIMEOUT_S, exactly=True)
                self._report("one group is left")
                failed = burst.failed + await self._lose_a_spot_node(client, view)
        if failed:
            raise UpstreamUnavailable(f"{failed} requests failed; see {self._local.state.logs}")
        return await self._usage()

    @contextlib.asynccontextmanager
    async def _client(self) -> AsyncIterator[AsyncOpenAI]:
        database = await open_database(self._local.state.store_url)
        try:
            key = await KeyBook(database).create("demo", "demo", time.time(), time.time() + 3600)
        finally:
            await database.close()
        async with AsyncOpenAI(
            base_url=f"{self._local.gateway_url}/v1",
            api_key=key.secret,
            timeout=_READY_TIMEOUT_S,
            max_retries=0,
        ) as client:
            await self._until_key_is_known(client)
            yield client

    async def _until_key_is_known(self, client: AsyncOpenAI) -> None:
        """Gateways read new keys once a second."""
        for _ in range(50):
            with contextlib.suppress(APIStatusError):
                await client.models.list()
                return
            await asyncio.sleep(0.2)
        raise UpstreamUnavailable("the gateway did not take a new key within 10 s")

    async def _stream_one(self, client: AsyncOpenAI) -> None:
        question = QUESTIONS[0]
        self._report(f"asking through the gateway with the OpenAI client: {question}")
        sent_s = time.monotonic()
        first_s: float | None = None
        chunks = 0
        stream = await client.chat.completions.create(
            model=self._model,
            messages=[{"role": "user", "content": question}],
            max_tokens=120,
            temperature=0.0,
            stream=True,
        )
        self._is_streaming = True
        self._write("\n    ")
        async for chunk in stream:
            text = chunk.choices[0].delta.content if chunk.choices else None
            if text:
                first_s = first_s or time.monotonic() - sent_s
                chunks += 1
                self._write(text.replace("\n", "\n    "))
        self._write("\n\n")
        self._is_streaming = False
        duration_s = time.monotonic() - sent_s
        self._report(
            f"first text after {(first_s or duration_s) * 1000:.0f} ms, "
            f"{chunks / duration_s:.0f} tokens/s"
        )

    async def _lose_a_spot_node(self, client: AsyncOpenAI, view: ControllerView) -> int:
        """Requests that failed."""
        spot = {pool.name for pool in self._local.system.pools if pool.market is Market.SPOT}
        groups = [group for group in (await view.fleet()).groups if group.pool in spot]
        if not groups:
            return 0
        group = groups[0]
        due_s = time.monotonic() + _NOTICE_S
        node_id = self._local.announce_loss(group.pool, _NOTICE_S)
        self._report(
            f"the provider of {group.pool} announces that it takes a node of {group.name} "
            f"in {_NOTICE_S:.0f} s; {_LOSS_CLIENTS} clients go on asking"
        )
        async with self._asking(client, _LOSS_CLIENTS) as counts:
            taken = False

            async def has_moved() -> bool:
                nonlocal taken
                if not taken and time.monotonic() >= due_s:
                    self._local.take_node(node_id)
                    self._report(f"a node of {group.pool} is gone")
                    taken = True
                fleet = await view.fleet()
                states = {each.name: each.state for each in fleet.groups}
                return taken and group.name not in states and GroupState.READY in states.values()

            await self._until(view, has_moved, f"{group.name} has moved", _MOVE_TIMEOUT_S)
            left = next(g for g in (await view.fleet()).groups if g.state is GroupState.READY)
            await asyncio.sleep(_SHARED_LOAD_S / 2)
        self._report(
            f"{group.name} had moved to pool {left.pool} as {left.name}; "
            f"{counts[1]} requests failed, and it goes on answering"
        )
        return counts[1]

    async def _burst(self, client: AsyncOpenAI, view: ControllerView) -> BurstResult:
        self._report(f"a burst: {_BURST_CLIENTS} clients at once")
        async with self._asking(client, _BURST_CLIENTS) as counts:
            await self._until_groups(view, 2, _SCALE_UP_TIMEOUT_S)
            self._report("two groups share the burst")
            await asyncio.sleep(_SHARED_LOAD_S)
            peak = await self._ready_groups(view)
        return BurstResult(counts[0], counts[1], peak)

    @contextlib.asynccontextmanager
    async def _asking(self, client: AsyncOpenAI, clients: int) -> AsyncIterator[list[int]]:
        """Clients that ask one question after the other; the answers and the failures so far."""
        stop = asyncio.Event()
        counts = [0, 0]

        async def ask(number: int) -> None:
            while not stop.is_set():
                question = QUESTIONS[number % len(QUESTIONS)]
                try:
                    await client.chat.completions.create(
                        model=self._model,
                        messages=[{"role": "user", "content": question}],
                        max_tokens=100,
                        seed=number,
                    )
                    counts[0] += 1
                except APIStatusError as error:
                    counts[1] += 1
                    self._report(f"a request failed: {error}")

        tasks = [asyncio.create_task(ask(number)) for number in range(clients)]
        try:
            yield counts
            stop.set()
            await asyncio.gather(*tasks, return_exceptions=True)
        finally:
            # After Ctrl-C, requests that wait for a group are waited for no longer.
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _until_groups(
        self, view: ControllerView, count: int, timeout_s: float, exactly: bool = False
    ) -> None:
        async def enough() -> bool:
            groups = (await view.fleet()).groups
            ready = sum(group.state is GroupState.READY for group in groups)
            return ready >= count and (not exactly or len(groups) == count)

        await self._until(view, enough, f"{count} groups are ready", timeout_s)

    async def _until(
        self,
        view: ControllerView,
        check: Callable[[], Awaitable[bool]],
        what: str,
        timeout_s: float,
    ) -> None:
        deadline_s = time.monotonic() + timeout_s
        while True:
            self._local.tend()
            if await check():
                return
            if time.monotonic() > deadline_s:
                states = ", ".join(map(_shown, (await view.fleet()).groups))
                raise UpstreamUnavailable(
                    f"not within {timeout_s:.0f} s: {what} ({states}); see {self._local.state.logs}"
                )
            await asyncio.sleep(_POLL_S)

    async def _ready_groups(self, view: ControllerView) -> int:
        fleet = await view.fleet()
        return sum(group.state is GroupState.READY for group in fleet.groups)

    @contextlib.asynccontextmanager
    async def _telling_decisions(self, view: ControllerView) -> AsyncIterator[None]:
        """Prints each decision once, as it is made, with its reason."""
        task = asyncio.create_task(self._tell_decisions(view))
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def _tell_decisions(self, view: ControllerView) -> None:
        while True:
            with contextlib.suppress(UpstreamUnavailable):
                decisions = await view.decisions(20)
                for decision in sorted(decisions, key=lambda each: int(each["seq"])):
                    if decision["seq"] > self._told_up_to and not self._is_streaming:
                        self._told_up_to = decision["seq"]
                        self._report(f"  decision {decision['seq']}: {decision['reason']}")
            await asyncio.sleep(_POLL_S)

    async def _usage(self) -> UsageReport:
        # The gateway writes its ledger at least once a second, the controller every few seconds.
        await asyncio.sleep(2)
        database = await open_database(self._local.state.store_url)
        try:
            return await usage_report(Ledger(database), By.POOL, since_s=self._started_at_s)
        finally:
            await database.close()


def _shown(group: Group) -> str:
    return f"{group.name} {group.state} {group.message}".rstrip()
