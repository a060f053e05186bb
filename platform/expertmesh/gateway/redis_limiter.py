"""Limits in Redis, for several gateways."""

import asyncio
import contextlib
import hashlib
import logging
import secrets
import time
from collections import deque
from collections.abc import Sequence
from itertools import islice
from typing import Final

import msgspec
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import NoScriptError
from redis.maint_notifications import MaintNotificationsConfig

from expertmesh.core.admission.reservation import (
    Estimate,
    Headroom,
    LimitKind,
    Refused,
    Reserved,
    pico_of_usd,
)
from expertmesh.core.admission.window import day_of, day_start_s, month_of
from expertmesh.core.domain.tenant import Account, Limits
from expertmesh.gateway.limiter import OnUnavailable, SpendSource, spend_so_far, unavailable
from expertmesh.gateway.redis_scripts import CALLS, KEEP, SEED

_log = logging.getLogger(__name__)

_PICO_PER_NANO = 1_000
_MOST_NANO = 2**53 - 1
_BATCH = 128
"""Calls of one kind in one script; Redis serves nobody else for some milliseconds then."""
_MOST_UNSETTLED = 100_000
_RETRY_PAUSE_S = 0.25
_PERIOD_S = 1.0
_SEED_BATCH = 500
_MOST_LIMITS = 10_000

_UNLIMITED = Reserved(None)
_KINDS = (
    LimitKind.UNAVAILABLE,
    LimitKind.REQUESTS_PER_MIN,
    LimitKind.TOKENS_PER_MIN,
    LimitKind.CONCURRENT_REQUESTS,
    LimitKind.USD_PER_DAY,
    LimitKind.USD_PER_MONTH,
)
_LOST = -1
"""A settlement found no open reservation."""

_Future = asyncio.Future[Reserved | Refused]


_Call = tuple[str, int, int, float, int, int, int, int, float, list["_Limits"]]
"""Reservation, tokens, nano-dollars, now, day, month, ends of both, deadline, accounts."""
_Limits = tuple[str, int, int, int, int, int]
"""Account, requests/min, tokens/min, concurrent, nano-dollars a day and a month; -1 for none."""


class _Ask(msgspec.Struct, frozen=True, eq=False):
    future: _Future
    accounts: tuple[Account, ...]
    call: _Call

    @property
    def reservation_id(self) -> str:
        return self.call[0]


class _Settlement(msgspec.Struct, frozen=True, array_like=True):
    reservation_id: str
    tokens: int
    nano_usd: int
    now_s: float


class _Answers(msgspec.Struct, frozen=True, array_like=True):
    seeded: int
    settled: list[int]
    answers: list[list[int | float]]


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(_Answers).decode
# Redis names scripts so; nothing is kept secret by it.
_CALLS_SHA = hashlib.sha1(CALLS.encode(), usedforsecurity=False).hexdigest()


class RedisLimiter:
    """One script for all calls that wait.

    A Redis that lost its data is seeded from the ledger again before anything is granted. It must
    not evict keys (`maxmemory-policy noeviction`), and is no Redis Cluster.
    """

    def __init__(
        self,
        url: str,
        source: SpendSource | None,
        on_unavailable: OnUnavailable,
        *,
        timeout_s: float = 0.25,
        reservation_s: float = 3600.0,
        lease_s: float = 10.0,
        prefix: str = "expertmesh:limits:",
    ) -> None:
        """`url` may hold a password; it is not logged. A reservation that is not settled within
        `reservation_s` stays as estimated, and takes no place among the concurrent ones any more.
        So do all those of a gateway that has not been heard of for `lease_s`: it is lost.
        """
        self._redis: Final[Redis] = Redis.from_url(
            url,
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            retry=Retry(NoBackoff(), 0),
            protocol=2,
            # One question less on every new connection.
            maint_notifications_config=MaintNotificationsConfig(enabled=False),
        )
        self._source: Final = source
        self._unavailable: Final = unavailable(on_unavailable)
        self._timeout_s: Final = timeout_s
        self._reservation_s: Final = reservation_s
        self._lease_s: Final = lease_s
        self._gateway: Final = secrets.token_hex(8)
        self._gateways_key: Final = prefix + "gateways"
        self._open_prefix: Final = prefix + "open:"
        self._open_key: Final = self._open_prefix + self._gateway
        self._held_key: Final = prefix + "held"
        self._marker_key: Final = prefix + "seeded"
        self._account_prefix: Final = prefix + "account:"
        self._asks: deque[_Ask] = deque()
        self._unsettled: deque[_Settlement] = deque()
        self._counted: set[str] = set()
        """Reservations that Redis knows of and that are not settled."""
        self._limits: dict[str, tuple[Limits, _Limits]] = {}
        """Of accounts, as they were last seen and as Redis gets them."""
        self._sending: asyncio.Task[None] | None = None
        self._looking: asyncio.Task[None] | None = None
        self._ready = False
        self._ready_since_s = 0.0
        """Monotonic."""
        self._failing = False
        self._wake = asyncio.Event()
        self._day = -1
        self._month_first_day = 0
        self._month_end_day = 0
        self.unavailable_calls = 0
        self.dropped_settlements = 0
        self.clipped_nano_usd = 0

    @property
    def connected(self) -> bool:
        return self._ready

    def reserve(
        self,
        reservation_id: str,
        accounts: tuple[Account, ...],
        estimate: Estimate,
        now_s: float,
    ) -> Reserved | Refused | _Future:
        if not accounts:
            return _UNLIMITED
        if not self._ready:
            self.unavailable_calls += 1
            return self._unavailable
        day = day_of(now_s)
        if day != self._day:
            self._day = day
            self._month_first_day, self._month_end_day = month_of(day)
        call: _Call = (
            reservation_id,
            min(estimate.tokens, _MOST_NANO),
            _nano_up(estimate.pico_usd),
            now_s,
            day,
            self._month_first_day,
            day_start_s(day + 1),
            day_start_s(self._month_end_day),
            now_s + self._reservation_s,
            [self._limits_of(account) for account in accounts],
        )
        future: _Future = asyncio.get_running_loop().create_future()
        self._asks.append(_Ask(future, accounts, call))
        self._send_soon()
        return future

    def settle(self, reservation_id: str, tokens: int, pico_usd: int, now_s: float) -> None:
        """What Redis does not know of has nothing to settle there: unlimited, or let in while it
        was away."""
        if reservation_id in self._counted:
            self._counted.discard(reservation_id)
            self._keep(
                _Settlement(reservation_id, min(tokens, _MOST_NANO), _nano_up(pico_usd), now_s)
            )

    async def run(self) -> None:
        while True:
            self._wake.clear()
            # In a task of its own: the Redis client may swallow a cancellation.
            self._looking = asyncio.create_task(self._look())
            await asyncio.wait((self._looking,))
            if self._ready:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_PERIOD_S):
                        await self._wake.wait()
            else:
                await asyncio.sleep(_RETRY_PAUSE_S)

    async def wait_connected(self, timeout_s: float) -> bool:
        """For a worker that opens its port only when limits can be read."""
        deadline_s = time.monotonic() + timeout_s
        while not self._ready:
            if time.monotonic() > deadline_s:
                return False
            await asyncio.sleep(0.01)
        return True

    async def close(self) -> None:
        """Waits for what was settled to be written, for a second at most."""
        deadline_s = time.monotonic() + 1.0
        while self._unsettled and self._ready and time.monotonic() < deadline_s:
            self._send_soon()
            await asyncio.sleep(0.01)
        self._ready = False
        tasks = [task for task in (self._looking, self._sending) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._ready = False
        self._answer_all_unavailable(())
        if self._unsettled:
            _log.warning(
                "limits: %d settlements did not reach Redis; they stay as estimated",
                len(self._unsettled),
            )
        await self._redis.aclose()

    async def _look(self) -> None:
        try:
            if not self._ready:
                await self._begin()
            await self._give_up_lost()
        except Exception as error:
            # Whatever Redis or the source of the spend raises: both are asked again.
            self._fail(error)

    async def _begin(self) -> None:
        """Reach Redis; seed it if it is new, or has lost what it knew."""
        async with asyncio.timeout(4 * self._timeout_s):
            known = await self._redis.exists(self._marker_key)
        if self._source is not None and not known:
            await self._seed_from(self._source, time.time())
        # Before anything is granted, or nobody would ever miss this gateway.
        await self._keep_lease(False)
        if self._failing:
            _log.info("limits: Redis answers again")
        self._failing = False
        self._ready = True
        self._ready_since_s = time.monotonic()
        self._send_soon()

    async def _seed_from(self, source: SpendSource, now_s: float) -> None:
        spent = await spend_so_far(source, now_s)
        day = day_of(now_s)
        month_first_day, _ = month_of(day)
        rows = iter(spent.items())
        while batch := list(islice(rows, _SEED_BATCH)):
            arguments: list[str | int] = [day, month_first_day]
            for account, (day_pico, month_pico) in batch:
                arguments += (
                    self._account_prefix + account,
                    _nano_up(day_pico),
                    _nano_up(month_pico),
                )
            await self._redis.eval(SEED, 0, *arguments)
        await self._redis.set(self._marker_key, repr(now_s))
        _log.info("limits: Redis has been told what %d accounts have spent", len(spent))

    async def _give_up_lost(self) -> None:
        # Where Redis itself was away, no gateway could be heard of: all get the time to come back.
        judges = time.monotonic() - self._ready_since_s >= self._lease_s
        while True:
            late, orphans = await self._keep_lease(judges)
            if late:
                _log.warning("limits: %d reservations were never settled; kept as estimated", late)
            if orphans:
                _log.warning(
                    "limits: %d reservations of a gateway that is gone; kept as estimated", orphans
                )
            if late < _BATCH and orphans < _BATCH:
                return

    async def _keep_lease(self, judges: bool) -> tuple[int, int]:
        """How many reservations were given up: too old, and of gateways that are gone."""
        async with asyncio.timeout(4 * self._timeout_s):
            late, orphans = await self._redis.eval(
                KEEP,
                2,
                self._gateways_key,
                self._held_key,
                self._open_prefix,
                self._gateway,
                repr(time.time()),
                repr(self._lease_s),
                _BATCH,
                int(judges),
            )
        return late, orphans

    def _keep(self, settlement: _Settlement) -> None:
        if len(self._unsettled) >= _MOST_UNSETTLED:
            self._unsettled.popleft()
            self.dropped_settlements += 1
        self._unsettled.append(settlement)
        self._send_soon()

    def _send_soon(self) -> None:
        if self._ready and (self._sending is None or self._sending.done()):
            # It starts when this turn of the loop is over, and takes all that came in it.
            self._sending = asyncio.get_running_loop().create_task(self._send())

    async def _send(self) -> None:
        while self._ready and (self._unsettled or self._asks):
            settlements = list(islice(self._unsettled, _BATCH))
            asks = [self._asks.popleft() for _ in range(min(_BATCH, len(self._asks)))]
            try:
                async with asyncio.timeout(self._timeout_s):
                    answers = await self._call(settlements, asks)
                if not answers.seeded:
                    # Redis has lost its data: nothing is granted until it is told of them again.
                    self._fail(None)
                    self._answer_all_unavailable(())
                    for ask in asks:
                        self._finish(ask, self._unavailable)
                    return
                self._settled(settlements, answers.settled)
                self._asked(asks, answers.answers)
            except asyncio.CancelledError:
                self._answer_all_unavailable(asks)
                raise
            except Exception as error:
                # Also what is no answer of these scripts.
                self._fail(error)
                self._answer_all_unavailable(asks)

    async def _call(self, settlements: list[_Settlement], asks: list[_Ask]) -> _Answers:
        packed = _encode(
            (
                self._source is not None,
                self._account_prefix,
                settlements,
                [ask.call for ask in asks],
            )
        )
        arguments = (3, self._open_key, self._held_key, self._marker_key, packed)
        try:
            answer = await self._redis.evalsha(_CALLS_SHA, *arguments)
        except NoScriptError:
            await self._redis.script_load(CALLS)
            answer = await self._redis.evalsha(_CALLS_SHA, *arguments)
        return _decode(answer)

    def _settled(self, settlements: list[_Settlement], clipped: list[int]) -> None:
        for settlement, nano_usd in zip(settlements, clipped, strict=True):
            # `_keep` may have dropped the oldest meanwhile.
            if self._unsettled and self._unsettled[0] is settlement:
                self._unsettled.popleft()
            if nano_usd != _LOST:
                self.clipped_nano_usd += nano_usd

    def _asked(self, asks: list[_Ask], answers: list[list[int | float]]) -> None:
        for ask, answer in zip(asks, answers, strict=True):
            if not answer[0]:
                self._finish(ask, _refused(ask.accounts, answer))
                continue
            self._counted.add(ask.reservation_id)
            if ask.future.done():
                # The caller went away: nothing was used.
                self.settle(ask.reservation_id, 0, 0, time.time())
            else:
                headroom = _headroom(answer)
                ask.future.set_result(_UNLIMITED if headroom is None else Reserved(headroom))

    def _limits_of(self, account: Account) -> _Limits:
        known = self._limits.get(account.name)
        limits = account.limits
        if known is not None and known[0] is limits:
            return known[1]
        made = (
            account.name,
            _or_none(limits.requests_per_min),
            _or_none(limits.tokens_per_min),
            _or_none(limits.concurrent_requests),
            _nano_or_none(limits.usd_per_day),
            _nano_or_none(limits.usd_per_month),
        )
        if len(self._limits) >= _MOST_LIMITS:
            self._limits.clear()
        self._limits[account.name] = (limits, made)
        return made

    def _finish(self, ask: _Ask, answer: Reserved | Refused) -> None:
        if not ask.future.done():
            ask.future.set_result(answer)

    def _answer_all_unavailable(self, sent: Sequence[_Ask]) -> None:
        """Nobody knows whether those that were sent were granted, so they are settled as unused."""
        for ask in sent:
            if not ask.future.done() or ask.future.cancelled():
                self._counted.discard(ask.reservation_id)
                self._keep(_Settlement(ask.reservation_id, 0, 0, time.time()))
        for ask in (*sent, *self._asks):
            if not ask.future.done():
                self.unavailable_calls += 1
                ask.future.set_result(self._unavailable)
        self._asks.clear()

    def _fail(self, error: Exception | None) -> None:
        if not self._failing:
            reason = "its data are gone" if error is None else _reason(error)
            _log.warning("limits: Redis is away: %s", reason)
        self._failing = True
        self._ready = False
        self._wake.set()


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _nano_up(pico_usd: int) -> int:
    """Rounded up, so that what is counted is never less than what is spent."""
    return min(-(-pico_usd // _PICO_PER_NANO), _MOST_NANO)


def _or_none(limit: int | None) -> int:
    return -1 if limit is None else limit


def _nano_or_none(usd: float | None) -> int:
    return -1 if usd is None else min(pico_of_usd(usd) // _PICO_PER_NANO, _MOST_NANO)


def _refused(accounts: tuple[Account, ...], answer: list[int | float]) -> Refused:
    kind = _KINDS[int(answer[1])]
    account = accounts[int(answer[2]) - 1]
    limit: int | float | None = getattr(account.limits, kind.value)
    return Refused(kind, account.name, limit or 0, float(answer[3]), _headroom(answer))


def _headroom(answer: list[int | float]) -> Headroom | None:
    limit_requests, left_requests, reset_requests_s = answer[4:7]
    limit_tokens, left_tokens, reset_tokens_s = answer[7:10]
    by_requests, by_tokens = limit_requests >= 0, limit_tokens >= 0
    if not by_requests and not by_tokens:
        return None
    return Headroom(
        int(limit_requests) if by_requests else None,
        int(left_requests) if by_requests else None,
        float(reset_requests_s) if by_requests else None,
        int(limit_tokens) if by_tokens else None,
        int(left_tokens) if by_tokens else None,
        float(reset_tokens_s) if by_tokens else None,
    )
