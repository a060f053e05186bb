"""The demo as a user runs it: exit code, streamed text, decisions, money, and nothing left."""

import re
from pathlib import Path

import pytest
from tests.integration.running_system import (
    REPOSITORY,
    pool,
    start_system,
    stop_system,
    wait_until_gone,
)

pytestmark = [pytest.mark.integration, pytest.mark.slow]


def test_the_demo_tells_its_whole_story(tmp_path: Path) -> None:
    scaling = {
        **{"target_in_flight_per_group": 8, "up_delay_s": 3, "down_delay_s": 15},
        "budget": {"usd_per_hour": 1.60},
    }
    pools = [
        pool("cheap", 0.30, market="spot"),
        pool("dear", 0.90, cpus_per_node=2),
    ]
    system = start_system(tmp_path, command="demo", groups=(1, 3), pools=pools, **scaling)
    try:
        assert system.process.wait(480) == 0, system.log("up")
    finally:
        stop_system(system)
    told = (tmp_path / "up.log").read_text()
    assert "Once upon a time" in told
    assert "2 groups at the peak" in told and "one group is left" in told
    reasons = re.findall(r"decision \d+: (.+)", told)
    assert any("starting em-tiny-moe-cheap-1" in reason for reason in reasons)
    assert any("starting em-tiny-moe-dear-2" in reason for reason in reasons)
    assert any("draining em-tiny-moe-dear-2" in reason for reason in reasons)
    budget = "a group in pool dear at $0.90/h exceeds the budget of $1.60/h"
    assert any(budget in reason for reason in reasons)
    notice = r"draining em-tiny-moe-cheap-1: a node of it will be taken away in \d+ s"
    assert any(re.search(notice, reason) for reason in reasons)
    assert any(re.search(r"starting em-tiny-moe-dear-[3-9]", reason) for reason in reasons)
    assert "a node of cheap is gone" in told
    moved = r"em-tiny-moe-cheap-1 had moved to pool dear as em-tiny-moe-dear-[3-9]; 0 requests"
    assert re.search(moved, told)
    sum_told = r"capacity ([\d.]+) \$ = ((?:(?: ?\+ )?[a-z ]+ [\d.]+ \$)+)"
    money = re.search(sum_told, " ".join(told.split()))
    assert money is not None
    capacity = int(money[1].replace(".", ""))
    parts = {
        name: int(amount.replace(".", ""))
        for name, amount in re.findall(r"([a-z][a-z ]+) ([\d.]+) \$", money[2])
    }
    assert capacity == sum(parts.values())
    # A second group was started for the burst, and drained after it.
    assert all(parts[name] > 0 for name in ("attributed", "idle", "starting", "draining"))
    assert wait_until_gone(system.state.marker, 0.0) == []


def test_the_makefile_runs_this_demo() -> None:
    makefile = (REPOSITORY / "Makefile").read_text()
    assert "demo $(MANIFESTS)" in makefile
    assert "-f deployments/local.yaml -f deployments/tiny-moe.yaml" in makefile
