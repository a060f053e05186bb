"""API key to caller, from memory; the store is asked every second whether anything changed.

A key that nobody has seen yet may be a moment old: its request waits for one more look at the
store, which all such requests share.
"""

import asyncio
import contextlib
import hashlib
import hmac
import logging
import time
from collections.abc import Mapping
from typing import Final, Protocol

from expertmesh.core.domain.tenant import Caller
from expertmesh.store.keys import is_well_formed

_log = logging.getLogger(__name__)

_VERSION_TIMEOUT_S = 5.0
_READ_TIMEOUT_S = 60.0
"""A store that hangs counts as away, so that its return is noticed."""
_LOOK_GAP_S: Final = 0.25
"""Between two looks, however many unknown keys come."""
_MOST_LOOK_WAIT_S: Final = 0.9
"""Of one request; most looks take milliseconds."""
_MOST_WAITING: Final = 128
"""Requests with unknown keys; each holds a connection and what has come of its body."""


class KeySource(Protocol):
    """Keys by the SHA-256 hex digest of the secret."""

    async def version(self) -> int:
        """Grows with every change of a key or tenant."""
        ...

    async def active(self, now_s: float) -> Mapping[str, Caller]:
        """All keys that are neither revoked nor expired, of tenants that are not disabled."""
        ...

    async def changed(self, after: int, now_s: float) -> Mapping[str, Caller | None]:
        """Those that changed after a version; None for a key that is no longer active."""
        ...


class KeyRing:
    """Keeps the last keys while the store does not answer."""

    def __init__(self, source: KeySource, period_s: float) -> None:
        self._source: Final = source
        self._period_s: Final = period_s
        self._keys: dict[bytes, tuple[bytes, Caller]] = {}
        self._version = 0
        self._failing = False
        self._wanted = asyncio.Event()
        self._waiting: list[asyncio.Future[None]] = []
        """For the next look; the one under way may have begun before their keys were made."""
        self._promised = 0
        """Futures that are not done, those of the look under way included."""
        self.loaded = False

    def find(self, secret: bytes, now_s: float) -> Caller | None:
        """None for a key that is unknown, revoked or expired."""
        digest = hashlib.sha256(secret).digest()
        entry = self._keys.get(digest)
        if entry is None or not hmac.compare_digest(entry[0], digest):
            return None
        caller = entry[1]
        if caller.expires_at_s is not None and caller.expires_at_s <= now_s:
            return None
        return caller

    def next_look(self, secret: bytes) -> asyncio.Future[None] | None:
        """Done when the store has been asked once more, or has not answered for too long; then
        `find` knows. None when there is nothing to hope for: no such key was ever made, it is
        known and not good, the store is away, or too many wait already."""
        if (
            not self.loaded
            or self._failing
            or self._promised >= _MOST_WAITING
            or not is_well_formed(secret)
            or hashlib.sha256(secret).digest() in self._keys
        ):
            return None
        loop = asyncio.get_running_loop()
        look: asyncio.Future[None] = loop.create_future()
        given_up = loop.call_later(_MOST_LOOK_WAIT_S, _end, look)
        look.add_done_callback(lambda _: self._kept(given_up))
        self._promised += 1
        self._waiting.append(look)
        self._wanted.set()
        return look

    def _kept(self, given_up: asyncio.TimerHandle) -> None:
        self._promised -= 1
        given_up.cancel()

    async def refresh(self) -> None:
        try:
            await self._read(time.time())
        except Exception as error:
            # Whatever the store's driver raises: requests go on with the keys known so far.
            if not self._failing:
                _log.warning(
                    "keys: the store does not answer, keeping the known ones: %s",
                    str(error) or type(error).__name__,
                )
            self._failing = True
            return
        if self._failing:
            _log.info("keys: the store answers again")
        self._failing = False
        self.loaded = True

    async def run(self) -> None:
        gap_s = min(_LOOK_GAP_S, self._period_s)
        while True:
            waiting, self._waiting = self._waiting, []
            self._wanted.clear()
            await self.refresh()
            for look in waiting:
                _end(look)
            await asyncio.sleep(gap_s)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._period_s - gap_s):
                    await self._wanted.wait()

    async def _read(self, now_s: float) -> None:
        async with asyncio.timeout(_VERSION_TIMEOUT_S):
            # Before the keys: what changes while they are read is read again.
            version = await self._source.version()
        if self.loaded and version == self._version:
            return
        async with asyncio.timeout(_READ_TIMEOUT_S):
            if self.loaded and version > self._version:
                self._apply(await self._source.changed(self._version, now_s))
            else:
                # The first time, or the store was put back to an earlier state.
                keys: dict[bytes, tuple[bytes, Caller]] = {}
                for sha256, caller in (await self._source.active(now_s)).items():
                    digest = bytes.fromhex(sha256)
                    keys[digest] = (digest, caller)
                self._keys = keys
        self._version = version

    def _apply(self, changes: Mapping[str, Caller | None]) -> None:
        for sha256, caller in changes.items():
            digest = bytes.fromhex(sha256)
            if caller is None:
                self._keys.pop(digest, None)
            else:
                self._keys[digest] = (digest, caller)


def _end(look: asyncio.Future[None]) -> None:
    if not look.done():
        look.set_result(None)
