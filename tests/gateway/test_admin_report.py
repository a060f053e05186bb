"""The usage report from a process of its own equals the one made here."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.store.records import NOON_S, capacity_hold, usage_record

from expertmesh.core.metering.report import By
from expertmesh.errors import UpstreamUnavailable
from expertmesh.gateway import admin_report
from expertmesh.gateway.admin_errors import Refused
from expertmesh.gateway.admin_report import ReportProcess
from expertmesh.store.database import open_database
from expertmesh.store.ledger import Ledger
from expertmesh.store.report import usage_report


@pytest.fixture
async def ledger(tmp_path: Path) -> AsyncIterator[Ledger]:
    database = await open_database(f"sqlite:///{tmp_path}/store.db")
    ledger = Ledger(database)
    await ledger.add_usage([usage_record("a"), usage_record("b", NOON_S + 30, tenant="zoo")])
    await ledger.hold_capacity([capacity_hold(usd_per_hour=0.1)])
    yield ledger
    await database.close()


async def test_the_report_is_the_same_to_the_last_digit(ledger: Ledger, tmp_path: Path) -> None:
    source = ReportProcess(f"sqlite:///{tmp_path}/store.db")
    for by, since_s in ((By.TENANT, None), (By.DAY, NOON_S + 10)):
        report = await source.report(by, since_s, None)
        assert report == await usage_report(ledger, by, since_s, None)
        assert report.total.requests > 0


async def test_a_store_that_cannot_be_used_is_unavailable(tmp_path: Path) -> None:
    with pytest.raises(UpstreamUnavailable, match=r"none\.db: does not exist"):
        await ReportProcess(f"sqlite:///{tmp_path}/none.db").report(By.DAY, None, None)


async def test_a_report_that_takes_too_long_is_ended(
    ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = _follow(monkeypatch)
    monkeypatch.setattr(admin_report, "_TIMEOUT_S", 0.01)
    source = ReportProcess(f"sqlite:///{tmp_path}/store.db")
    with pytest.raises(Refused) as refusal:
        await source.report(By.DAY, None, None)
    assert refusal.value.error.status == 503
    assert "ask for a shorter time" in refusal.value.error.message
    assert [process.returncode for process in started] == [-signal.SIGKILL]


async def test_a_client_that_goes_away_ends_its_report_and_the_next_one_runs(
    ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = _follow(monkeypatch)
    source = ReportProcess(f"sqlite:///{tmp_path}/store.db")
    task = asyncio.create_task(source.report(By.DAY, None, None))
    async with asyncio.timeout(10):
        while not started:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert started[0].returncode == -signal.SIGKILL
    with pytest.raises(ProcessLookupError):
        os.kill(started[0].pid, 0)
    assert (await source.report(By.DAY, None, None)).total.requests == 2


def _follow(monkeypatch: pytest.MonkeyPatch) -> list[asyncio.subprocess.Process]:
    started: list[asyncio.subprocess.Process] = []
    start = asyncio.create_subprocess_exec

    async def followed(*arguments: str, **options: object) -> asyncio.subprocess.Process:
        process = await start(*arguments, **options)  # type: ignore[arg-type]
        started.append(process)
        return process

    monkeypatch.setattr(asyncio, "create_subprocess_exec", followed)
    return started
