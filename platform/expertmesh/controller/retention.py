"""Forget decisions that are older than anybody wants to explain."""

import asyncio
import logging
from collections.abc import Callable
from typing import Protocol

from expertmesh.errors import UpstreamUnavailable

_log = logging.getLogger(__name__)

EVERY_S = 3600.0


class ForgetfulStore(Protocol):
    async def forget(self, before_s: float) -> int: ...


async def keep_decisions(
    store: ForgetfulStore, keep_s: float, now_s: Callable[[], float], stop: asyncio.Event
) -> None:
    """Every hour until `stop`; several controllers may do it at once."""
    while not stop.is_set():
        try:
            while deleted := await store.forget(now_s() - keep_s):
                _log.info(
                    "forgot %d entries of the journal, older than %g days", deleted, _d(keep_s)
                )
                await asyncio.sleep(0)
        except UpstreamUnavailable as error:
            _log.warning("the journal could not be shortened: %s", error)
        try:
            async with asyncio.timeout(EVERY_S):
                await stop.wait()
        except TimeoutError:
            continue


def _d(seconds: float) -> float:
    return seconds / 86_400.0
