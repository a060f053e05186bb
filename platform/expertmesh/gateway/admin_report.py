"""The usage report in a process of its own: a long ledger must not hold up the requests."""

import asyncio
import os
import subprocess
import sys

import msgspec

from expertmesh.core.metering.report import By, UsageReport
from expertmesh.errors import UpstreamUnavailable
from expertmesh.gateway import admin_report_child as child
from expertmesh.gateway.admin_errors import Refused
from expertmesh.gateway.api import ApiError

_TIMEOUT_S = 60.0


class ReportProcess:
    """A UsageSource. One report at a time; a client that goes away ends its own."""

    def __init__(self, store_url: str) -> None:
        self._store_url = store_url
        self._lock = asyncio.Lock()

    async def report(self, by: By, since_s: float | None, until_s: float | None) -> UsageReport:
        question = child.Question(self._store_url, by, since_s, until_s)
        async with self._lock:
            status, answer, errors = await _run(msgspec.json.encode(question))
        if status == child.REFUSED:
            raise UpstreamUnavailable(errors)
        if status != 0:
            raise RuntimeError(f"the usage report ended with status {status}: {errors}")
        return msgspec.json.decode(answer, type=UsageReport)


async def _run(question: bytes) -> tuple[int, bytes, str]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", child.__name__),
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            answer, errors = await process.communicate(question)
    except TimeoutError:
        raise Refused(
            ApiError(
                503,
                f"The report takes longer than {_TIMEOUT_S:.0f} s; ask for a shorter time with "
                "since and until, or use `expertmesh usage`.",
                code="report_too_long",
                retry_after_s=_TIMEOUT_S,
            )
        ) from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return process.returncode or 0, answer, errors.decode(errors="replace").strip()
