from pathlib import Path

import pytest
import typer
from tests.controller.running_system import RunningSystem, two_pools
from typer.testing import CliRunner

from expertmesh.cli.explain import explain
from expertmesh.cli.store import sqlite_url
from expertmesh.store.database import open_database
from expertmesh.store.journal import Journal

app = typer.Typer()
app.command()(explain)


@pytest.fixture
async def store(tmp_path: Path) -> str:
    """A burst on one model, recorded as the controller records it."""
    system = RunningSystem(two_pools(min_groups=1, usd_per_hour_budget=1.0))
    await system.pass_s(14)
    system.gateway.queued = 16
    await system.pass_s(6)
    url = sqlite_url(tmp_path / "store.db")
    database = await open_database(url)
    try:
        journal = Journal(database)
        for entry in system.journal.entries:
            await journal.append(entry.at_s, entry.kind, entry.model, entry.payload)
        await journal.append(2e6, "decision", "tiny", {"decision": {"reason": "in old words"}})
    finally:
        await database.close()
    return url


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, arguments)
    return result.exit_code, result.output


def test_the_last_decisions_are_one_line_each(store: str) -> None:
    code, text = run("--store", store)
    assert code == 0
    lines = text.splitlines()
    assert all("tiny: " in line for line in lines)
    assert "starting em-tiny-cheap-1: the cheapest pool with room, $0.60/h" in lines[0]
    assert lines[-1].endswith("in old words")
    assert len(run("--store", store, "--last", "2")[1].splitlines()) == 2
    assert run("--store", store, "--model", "other")[0] == 1


def test_one_decision_is_told_with_all_its_numbers(store: str) -> None:
    lines = run("--store", store)[1].splitlines()
    number = next(line.split()[0] for line in lines if "exceeds the budget" in line)
    code, text = run(number, "--store", store)
    assert code == 0
    for words in (
        "work      16 requests: 16 queued (oldest waits 0.0 s), 0 running",
        "reports   1 live gateway workers, 0 silent",
        "groups    2 needed, 2 wanted (before: 1)",
        "missing   pending: no room in pool cheap (0 of 2 workers free)",
        "a group in pool dear at $0.90/h exceeds the budget of $1.00/h",
        "group     em-tiny-cheap-1: ready",
        "pool      cheap: 2 workers on live nodes, 0 used by other models",
        "rules     1 to 4 groups, 8 requests each, up after 3 s",
        "budget $1.00/h",
    ):
        assert words in text


def test_a_decision_that_another_version_wrote_is_told_in_its_own_words(store: str) -> None:
    last = run("--store", store)[1].splitlines()[-1].split()[0]
    assert run(last, "--store", store) == (0, f"{last}  1970-01-24 03:33:20  tiny: in old words\n")


def test_an_unknown_number_is_an_error(store: str) -> None:
    code, text = run("9999", "--store", store)
    assert code == 1
    assert "9999: no such decision" in text
