from pathlib import Path

import pytest
from tests.store.records import NOON_S, capacity_hold, node_hold, usage_record

from expertmesh.controller.today import TodayReader
from expertmesh.core.metering.capacity import WHOLE_POOL
from expertmesh.core.metering.report import By
from expertmesh.store.database import open_database
from expertmesh.store.ledger import Ledger
from expertmesh.store.report import usage_report
from expertmesh.store.spend import LedgerSpend

_DAY_S = 86_400.0


async def test_today_is_what_the_report_says(tmp_path: Path) -> None:
    database = await open_database(f"sqlite:///{tmp_path}/store.db")
    ledger = Ledger(database)
    clock = [NOON_S + 600]
    reader = TodayReader(ledger, LedgerSpend(database), lambda: clock[0])
    try:
        await ledger.hold_capacity(
            [capacity_hold(usd_per_hour=0.36, start_s=20)],
            [node_hold(WHOLE_POOL, usd_per_hour=0), node_hold(usd_per_hour=0.72)],
        )
        await ledger.add_usage([usage_record("a", tenant="acme"), usage_record("b", tenant="zoo")])
        today = await reader.read()
        report = (await usage_report(ledger, By.POOL)).total
        assert today.capacity_usd == pytest.approx(float(report.capacity_usd), abs=1e-9)
        assert today.tariff_usd == pytest.approx(float(report.tariff_usd), abs=1e-9)
        assert today.capacity_usd > today.idle_nodes_usd > 0
        assert sum(today.by_pool.values()) == pytest.approx(today.capacity_usd)
        assert today.day_start_s == NOON_S - 43_200

        await ledger.add_usage([usage_record("c", tenant="acme")])
        assert await reader.read() is today, "one reading serves for a while"
        clock[0] += 15
        assert (await reader.read()).tariff_usd > today.tariff_usd
        clock[0] += _DAY_S
        tomorrow = await reader.read()
        assert (tomorrow.capacity_usd, tomorrow.tariff_usd) == (0.0, 0.0)
    finally:
        await database.close()
