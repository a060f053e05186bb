"""API key to caller, from memory; the store is asked every second whether anything changed."""

import asyncio
import hashlib
import hmac
import logging
import time
from collections.abc import Mapping
from typing import Final, Protocol

from expertmesh.core.domain.tenant import Caller

_log = logging.getLogger(__name__)

_VERSION_TIMEOUT_S = 5.0
_READ_TIMEOUT_S = 60.0
"""A store that hangs counts as away, so that its return is noticed."""


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
        while True:
            await self.refresh()
            await asyncio.sleep(self._period_s)

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
