"""API key to tenant, from memory; the store is asked once a second."""

import asyncio
import hashlib
import logging
import time
from collections.abc import Mapping
from typing import Protocol

_log = logging.getLogger(__name__)


class Key(Protocol):
    @property
    def id(self) -> str: ...
    @property
    def tenant(self) -> str: ...
    @property
    def expires_at_s(self) -> float | None: ...


class KeySource(Protocol):
    async def active(self, now_s: float) -> Mapping[str, Key]:
        """Keys that are neither revoked nor expired, by the SHA-256 hex digest of the secret."""
        ...


class KeyRing:
    """Keeps the last keys while the store does not answer."""

    def __init__(self, source: KeySource, period_s: float) -> None:
        self._source = source
        self._period_s = period_s
        self._keys: Mapping[str, Key] = {}
        self._failing = False
        self.loaded = False

    def find(self, secret: bytes, now_s: float) -> Key | None:
        key = self._keys.get(hashlib.sha256(secret).hexdigest())
        if key is None or (key.expires_at_s is not None and key.expires_at_s <= now_s):
            return None
        return key

    async def refresh(self) -> None:
        try:
            self._keys = await self._source.active(time.time())
        except Exception as error:
            # Whatever the store's driver raises: requests go on with the keys known so far.
            if not self._failing:
                _log.warning("keys: the store does not answer, keeping the known ones: %s", error)
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
