import asyncio
import csv
import io
import json
from decimal import Decimal
from pathlib import Path

import pytest
import typer
from rich.console import Console
from tests.store.records import NOON_S, capacity_hold, node_hold, usage_record
from typer.testing import CliRunner, Result

from expertmesh.cli.usage import usage
from expertmesh.cli.usage_view import render_usage
from expertmesh.core.metering.capacity import WHOLE_POOL
from expertmesh.core.metering.report import By, UsageReport, UsageRow
from expertmesh.store.database import open_database
from expertmesh.store.focus import COLUMNS, MANDATORY
from expertmesh.store.ledger import Ledger

app = typer.Typer()
app.command("usage")(usage)

_REPORT = UsageReport(
    By.MODEL,
    NOON_S,
    NOON_S + 60,
    {
        "big": UsageRow(
            1_234, 56_789, 1_000, 4_321, Decimal("1.5"), 1_500_000_000_001, 2, 30, 400, 5_000
        ),
        "tiny-moe": UsageRow(
            *(2, 30, 0, 40, Decimal("0.0000148"), 999_999_999, 1),
            prefill_nano_usd=333_333_333,
            decode_nano_usd=666_666_666,
            energy_uj=3_600_000_000,
        ),
    },
)


@pytest.fixture
def store(tmp_path: Path) -> str:
    url = f"sqlite:///{tmp_path}/store.db"

    async def fill() -> None:
        database = await open_database(url)
        ledger = Ledger(database)
        # A group that takes half of its node, and 20 s to start.
        await ledger.hold_capacity(
            [capacity_hold(usd_per_hour=0.36, start_s=20)],
            [node_hold(WHOLE_POOL, usd_per_hour=0), node_hold(usd_per_hour=0.72)],
        )
        await ledger.add_usage([usage_record("a", tenant="acme"), usage_record("b", tenant="zoo")])
        await database.close()

    asyncio.run(fill())
    return url


def _run(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def _render(report: UsageReport, width: int = 220) -> list[str]:
    console = Console(width=width, no_color=True)
    with console.capture() as capture:
        console.print(render_usage(report))
    return [line.rstrip() for line in capture.get().splitlines()]


def test_the_table_shows_every_digit_and_a_sum_that_adds_up() -> None:
    lines = _render(_REPORT)
    assert any("2026-01-01 12:00:00 to 2026-01-01 12:01:00 UTC" in line for line in lines)
    rows = {line.split()[0]: line.split()[1:] for line in lines if line.strip()}
    assert rows["big"] == [
        *("1,234", "56,789", "(1,000)", "4,321", "1.50", "1,500.000005433", "1,500.000000001"),
        *("0.000000002", "0.000000030", "0.000000400", "0.000005000"),
        *("-1,498.5000", "24,545.90", "0.0"),
    ]
    assert rows["tiny-moe"] == [
        *("2", "30", "(0)", "40", "0.0000148", "1.000000000", "0.999999999"),
        *("0.000000001", "0.000000000", "0.000000000", "0.000000000"),
        *("-1.0000", "14,285.71", "(11,111.11,", "16,666.67)", "1.0"),
    ]
    assert rows["total"][:11] == [
        *("1,236", "56,819", "(1,000)", "4,361", "1.5000148", "1,501.000005433", "1,501.000000000"),
        *("0.000000003", "0.000000030", "0.000000400", "0.000005000"),
    ]
    sentence = (
        "capacity 1,501.000005433 $ = attributed 1,501.000000000 $ + idle 0.000000003 $ + "
        "starting 0.000000030 $ + draining 0.000000400 $ + idle nodes 0.000005000 $"
    )
    assert any(sentence in line for line in lines)


@pytest.mark.parametrize("width", [80, 120, 149, 150])
def test_a_narrow_terminal_costs_no_digit(width: int) -> None:
    lines = _render(_REPORT, width=width)
    assert max(len(line) for line in lines) <= width
    assert not any("…" in line for line in lines)
    for amount in ("1,500.000000001", "0.999999999", "1,501.000005433", "0.0000148"):
        assert any(amount in line for line in lines)
    if width < 150:
        assert any("0.000005432" in line for line in lines)


def test_bars_show_what_was_dear_and_what_of_it_was_used() -> None:
    report = UsageReport(
        By.POOL,
        NOON_S,
        NOON_S + 60,
        {
            "a": UsageRow(attributed_nano_usd=1_000_000_000, idle_nano_usd=1_000_000_000),
            "b": UsageRow(attributed_nano_usd=4_500_000_000, idle_nano_usd=1_500_000_000),
            "free": UsageRow(requests=1),
        },
    )
    lines = [line.split() for line in _render(report)]
    full, light = "\N{FULL BLOCK}", "\N{LIGHT SHADE}"
    assert lines[0][:3] == ["capacity", "by", "pool:"]
    assert lines[1] == ["b", full * 22 + light * 8, "6.00", "$,", "75%", "used"]
    assert lines[2] == ["a", full * 5 + light * 5, "2.00", "$,", "50%", "used"]
    assert lines[3][:1] != ["free"]


def test_an_empty_report_says_so() -> None:
    text = "\n".join(_render(UsageReport(By.DAY, None, None, {})))
    assert "nothing recorded yet" in text


@pytest.mark.parametrize(
    ("by", "keys"),
    [
        ("tenant", ["(idle)", "acme", "zoo"]),
        ("key", ["(idle)", "key_1"]),
        ("model", ["(idle)", "tiny-moe"]),
        ("pool", ["cpu"]),
        ("day", ["2026-01-01"]),
    ],
)
def test_json_by_each_grouping_adds_up(store: str, by: str, keys: list[str]) -> None:
    done = _run("--by", by, "--json", "--store", store)
    assert done.exit_code == 0
    report = json.loads(done.stdout)
    assert [row[by] for row in report["rows"]] == keys
    total = report["total"]
    assert total == {
        "requests": 2,
        "prompt_tokens": 200,
        "cached_tokens": 80,
        "completion_tokens": 40,
        "tariff_usd": "0.0000296",
        "capacity_usd": "0.012000000",
        "attributed_usd": "0.000100000",
        "idle_usd": "0.004000000",
        "starting_usd": "0.001900000",
        "draining_usd": "0.000000000",
        "idle_nodes_usd": "0.006000000",
        "external_usd": "0.000000000",
        "margin_usd": "-0.011970400",
        "usd_per_mtok": "50.000000",
        "usd_per_mtok_in": None,
        "usd_per_mtok_out": None,
        "energy_wh": None,
    }
    for name in (name for name in total if name.endswith("_usd")):
        assert sum(Decimal(row[name]) for row in report["rows"]) == Decimal(total[name])


def test_the_table_in_a_pipe_keeps_its_lines_whole(store: str) -> None:
    done = _run("--store", store)
    assert done.exit_code == 0
    _, row = (line for line in done.stdout.splitlines() if line.split()[:1] == ["tiny-moe"])
    assert row.split()[1:] == [
        *("2", "200", "(80)", "40", "0.0000296", "0.006000000", "0.000100000", "0.004000000"),
        *("0.001900000", "0.000000000", "0.000000000", "-0.0060", "25.00", "-"),
    ]


@pytest.mark.parametrize(
    ("window", "requests", "capacity_usd"),
    [
        (("--until", "2026-01-01"), 0, "0.000000000"),
        (("--since", "2026-01-01", "--until", "2026-01-01T12:00:30"), 2, "0.006000000"),
        (("--since", "2026-01-01T13:00:30+01:00"), 0, "0.006000000"),
        (("--since", "5000w"), 2, "0.012000000"),
    ],
    ids=["before", "first half", "second half, another zone", "a long time ago"],
)
def test_windows(store: str, window: tuple[str, ...], requests: int, capacity_usd: str) -> None:
    report = json.loads(_run("--json", *window, "--store", store).stdout)
    assert (report["total"]["requests"], report["total"]["capacity_usd"]) == (
        requests,
        capacity_usd,
    )


@pytest.mark.parametrize("text", ["yesterday", "", "2026-13-01", "7"])
def test_an_unreadable_time_is_refused(store: str, text: str) -> None:
    refused = _run("--since", text, "--store", store)
    assert refused.exit_code == 2
    assert "2026-01-31" in refused.stderr


def test_an_unknown_grouping_is_refused(store: str) -> None:
    refused = _run("--by", "week", "--store", store)
    assert refused.exit_code == 2
    assert "'week'" in refused.stderr


def test_a_missing_store_is_refused_and_not_created(tmp_path: Path) -> None:
    refused = _run("--store", f"sqlite:///{tmp_path}/store.db")
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert "store.db: does not exist; check the path" in refused.stderr
    assert list(tmp_path.iterdir()) == []


def test_csv_has_the_same_rows_as_json(store: str) -> None:
    done = _run("--by", "tenant", "--csv", "--store", store)
    assert done.exit_code == 0
    rows = list(csv.DictReader(io.StringIO(done.stdout)))
    wanted = json.loads(_run("--by", "tenant", "--json", "--store", store).stdout)["rows"]
    assert rows == [
        {name: "" if value is None else str(value) for name, value in row.items()} for row in wanted
    ]


def test_json_and_csv_at_once_are_refused(store: str) -> None:
    refused = _run("--json", "--csv", "--store", store)
    assert refused.exit_code == 2
    assert "choose one" in refused.stderr


@pytest.mark.parametrize("window", [(), ("--until", "2026-01-01T12:00:30")])
def test_focus_bills_what_the_report_says(store: str, window: tuple[str, ...]) -> None:
    done = _run("--focus", *window, "--store", store)
    assert done.exit_code == 0
    rows = list(csv.DictReader(io.StringIO(done.stdout)))
    assert tuple(rows[0]) == COLUMNS and set(MANDATORY) <= set(rows[0])
    total = json.loads(_run("--json", *window, "--store", store).stdout)["total"]
    assert sum(Decimal(row["BilledCost"]) for row in rows) == Decimal(total["capacity_usd"])
    named = json.loads(_run("--focus", "--json", *window, "--store", store).stdout)
    assert named["FocusVersion"] == "1.2"
    assert [row["BilledCost"] for row in named["Rows"]] == [row["BilledCost"] for row in rows]
    assert named["Rows"][0]["ChargeClass"] is None


def test_focus_of_an_empty_store_is_a_header(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/store.db"

    async def create() -> None:
        await (await open_database(url)).close()

    asyncio.run(create())
    assert _run("--focus", "--store", url).stdout.splitlines() == [",".join(COLUMNS)]
    assert json.loads(_run("--focus", "--json", "--store", url).stdout)["Rows"] == []
