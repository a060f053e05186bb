"""`expertmesh explain` and `replay` on a real store, of what a controller recorded."""

import asyncio
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import typer
from tests.controller.running_system import RunningSystem, two_pools
from typer.testing import CliRunner

from expertmesh.cli.explain import explain
from expertmesh.cli.replay import replay
from expertmesh.cli.store import sqlite_url
from expertmesh.core.domain.deployment import ScalingMode
from expertmesh.store.database import open_database
from expertmesh.store.journal import Journal

app = typer.Typer()
app.command()(explain)
app.command()(replay)


async def recorded(**rules: object) -> list[Any]:
    """A burst on one model, recorded as the controller records it."""
    system = RunningSystem(two_pools(min_groups=1, usd_per_hour_budget=1.0, **rules))
    await system.pass_s(14)
    system.gateway.queued = 16
    await system.pass_s(70)
    return list(system.journal.entries)


async def written(path: Path, entries: Sequence[Any], *more: dict[str, Any]) -> str:
    url = sqlite_url(path / "store.db")
    database = await open_database(url)
    try:
        journal = Journal(database)
        for entry in entries:
            await journal.append(entry.at_s, entry.kind, entry.model, entry.payload)
        for payload in more:
            await journal.append(2e6, "decision", "tiny", payload)
    finally:
        await database.close()
    return url


@pytest.fixture
def store(tmp_path: Path) -> str:
    return asyncio.run(_burst(tmp_path))


async def _burst(path: Path) -> str:
    return await written(path, await recorded(), {"decision": {"reason": "in old words"}})


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, arguments)
    return result.exit_code, result.stdout, result.stderr


def flat(text: str) -> str:
    """Without the line breaks of 80 columns."""
    return " ".join(text.split())


def number(store: str, words: str) -> str:
    lines = run("explain", "--store", store, "--limit", "50")[1].splitlines()
    return next(line.split()[0] for line in lines if words in line)


def test_the_last_decisions_are_one_line_each(store: str) -> None:
    code, text, _ = run("explain", "--store", store, "--limit", "50")
    assert code == 0
    lines = text.splitlines()
    assert all("tiny: " in line for line in lines)
    assert "starting em-tiny-cheap-1" in lines[0]
    assert lines[-1].endswith("in old words")
    assert len(run("explain", "--store", store, "--limit", "2")[1].splitlines()) == 2
    code, _, error = run("explain", "--store", store, "--model", "other", "--limit", "2")
    assert (code, error) == (1, "error: no decisions yet\n")


def test_without_a_number_the_newest_decision_that_acted_is_told(store: str) -> None:
    code, text, _ = run("explain", "--store", store)
    assert code == 0
    first = number(store, "starting em-tiny-cheap-1")
    assert f"decision {first}, 1970-01-12" in text
    assert flat(text).startswith("tiny: 0 queued and 0 running requests")
    assert "- start em-tiny-cheap-1:" in text


def test_one_decision_is_told_with_all_that_it_rests_on(store: str) -> None:
    code, text, _ = run("explain", number(store, "exceeds the budget"), "--store", store)
    assert code == 0
    assert max(map(len, text.splitlines())) <= 80
    assert "\x1b" not in text, "plain in a pipe"
    words = flat(text)
    for part in (
        "16 requests: 16 queued (oldest waits 0.0 s), 0 running",
        "2 groups needed",
        "gateway g1",
        "pool cheap - 2 workers, 0 used by other models",
        "a group in pool dear at $0.90/h exceeds the budget of $1.00/h",
        "bound by the budget of $1.00/h",
        "with a budget of $1.50/h or more (it is $1.00) it would have wanted",
        "expected - a load of 2.00 groups, as now",
        "happened",
    ):
        assert part in words, part


def test_the_json_says_the_same_and_more(store: str) -> None:
    seq = number(store, "exceeds the budget")
    code, text, _ = run("explain", seq, "--store", store, "--json")
    assert code == 0
    told = json.loads(text)
    assert (told["seq"], told["model"], told["binding"]) == (int(seq), "tiny", "budget")
    chosen, *others = told["candidates"]
    assert chosen["is_chosen"]
    assert all(each["why"] for each in others)
    assert {key: told["inputs"][0][key] for key in ("source", "age_s")} == {
        "source": "gateway g1",
        "age_s": 0.0,
    }
    assert told["replays"]
    listed = json.loads(run("explain", "--limit", "50", "--store", store, "--json")[1])
    assert listed[-1]["reason"] == "in old words"


def test_what_a_counterfactual_says_comes_out_of_what_if(store: str) -> None:
    seq = number(store, "exceeds the budget")
    told = json.loads(run("explain", seq, "--store", store, "--json")[1])
    (budget,) = (e for e in told["counterfactuals"] if (e["flips"] or "").startswith("budget="))
    code, text, _ = run("explain", seq, "--store", store, "--what-if", budget["flips"], "--json")
    assert code == 0
    after = json.loads(text)["changed"]
    assert after["candidates"][0]["groups"] == budget["target"]
    code, text, _ = run("explain", seq, "--store", store, "--what-if", budget["flips"])
    words = flat(text)
    assert words.startswith("tiny: with budget=1.50 it would be decided otherwise")
    assert max(map(len, text.splitlines())) <= 80
    same = flat(run("explain", seq, "--store", store, "--what-if", budget["keeps"])[1])
    assert "nothing else would be done" in same


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("budgt=3", "'budgt' cannot be changed; what can be:"),
        ("price=3", "'price' cannot be changed"),
        ("budget", "'budget': write KEY=VALUE, e.g. queue=2x"),
        ("queue=-1", "queue=-1: write a number that is not negative"),
        ("queue=nan", "queue=nan: write a number that is not negative"),
        ("queue=1e300", "write at most 1000000000"),
        ("price.gold=3", "no such pool or option; there is cheap, dear, cheap/t1d2e2"),
        ("notice.em-x=3", "no such group; there is em-tiny-cheap-1"),
        ("silent.g9=3", "no such gateway; there is g1"),
        ("min_groups=9", "min_groups 9 is above max_groups 4"),
        ("attainment=1", "write a share above 0 and below 1"),
        ("budget_per_day=2x", "there is none to multiply; write an amount in $"),
        ("arrivals=2x", "none arrive that could be multiplied"),
        ("mode=off", "no such mode; there is observe, advise, act"),
        ("tpot=0", "write a number above 0"),
    ],
)
def test_a_setting_that_means_nothing_is_refused(store: str, setting: str, words: str) -> None:
    seq = number(store, "exceeds the budget")
    code, text, error = run("explain", seq, "--store", store, "--what-if", setting)
    assert (code, text) == (1, "")
    assert words in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    "setting",
    [
        "queue=2x",
        "load=0x",
        "arrivals=3",
        "price.cheap=0.01",
        "price.dear/t1d2e2=0.5x",
        "start.cheap/t1d2e2=5",
        "nodes.cheap=40",
        "budget=none",
        "budget_per_day=1",
        "min_groups=2",
        "max_groups=1",
        "attainment=0.9",
        "ttft=1",
        "tpot=2x",
        "up_delay=0",
        "down_delay=auto",
        "mode=observe",
        "notice.em-tiny-cheap-1=60",
        "silent.g1=30",
    ],
)
def test_every_setting_can_be_tried(store: str, setting: str) -> None:
    code, text, error = run(
        "explain", number(store, "exceeds the budget"), "--store", store, "--what-if", setting
    )
    assert (code, error) == (0, "")
    assert f"with {setting}" in flat(text)


def test_a_notice_drains_the_group_and_wakes_another(store: str) -> None:
    seq = number(store, "exceeds the budget")
    setting = "notice.em-tiny-cheap-1=60"
    told = json.loads(run("explain", seq, "--store", store, "--what-if", setting, "--json")[1])
    assert ("drain", "em-tiny-cheap-1") in {
        (action["kind"], action["group"]) for action in told["changed"]["actions"]
    }


def test_a_decision_that_another_version_wrote_is_told_in_its_own_words(store: str) -> None:
    last = number(store, "in old words")
    code, text, _ = run("explain", last, "--store", store)
    assert (code, text) == (0, f"{last}  1970-01-24 03:33:20  tiny: in old words\n")
    code, _, error = run("explain", last, "--store", store, "--what-if", "queue=1")
    assert code == 1
    assert "another version wrote this decision" in error


def test_an_unknown_number_is_an_error(store: str) -> None:
    code, _, error = run("explain", "9999", "--store", store)
    assert code == 1
    assert "9999: no such decision" in error


def test_a_decision_of_mode_advise_shows_what_it_would_do(tmp_path: Path) -> None:
    async def prepared() -> str:
        return await written(tmp_path, await recorded(mode=ScalingMode.ADVISE))

    url = asyncio.run(prepared())
    text = flat(run("explain", "--store", url)[1])
    assert "did - nothing, since it only advises - would start em-tiny-cheap-1" in text
    assert "bound by mode advise: the groups are left as they are" in text


def test_calibration_compares_what_was_expected_with_what_was(store: str) -> None:
    code, text, _ = run("explain", "--calibration", "--since", "30d", "--store", store)
    assert code == 0
    assert "start of cheap/t1d2e2, s" in flat(text)
    arguments = ("--calibration", "--since", "30d", "--store", store, "--json")
    (told,) = json.loads(run("explain", *arguments)[1])
    (start,) = told["starts"]
    assert (start["took_s"]["count"], start["failed"]) == (1, 0)
    assert 10 <= start["took_s"]["p50"] <= 14
    assert told["load_error"] is None, "nothing is forecast by requests"


# Replay


def test_every_decision_replays_from_the_store_and_from_an_export(
    store: str, tmp_path: Path
) -> None:
    exported = tmp_path / "journal.jsonl"
    code, text, error = run("replay", "--store", store, "--export", str(exported))
    assert (code, error) == (0, "")
    assert re.fullmatch(
        r"(\d+) of \d+ decisions in the store replay to the last bit; 1 in another version's "
        r"form were not checked\n",
        text,
    )
    again = run("replay", str(exported))
    assert again[0] == 0
    assert again[1].split(" in ")[0] == text.split(" in ")[0]
    twice = tmp_path / "twice.jsonl"
    run("replay", str(exported), "--export", str(twice))
    assert twice.read_bytes() == exported.read_bytes()


def test_a_changed_entry_is_shown_and_ends_with_1(store: str, tmp_path: Path) -> None:
    exported = tmp_path / "journal.jsonl"
    run("replay", "--store", store, "--export", str(exported))
    lines = exported.read_text().splitlines()
    at = next(i for i, line in enumerate(lines) if "exceeds the budget" in line)
    entry = json.loads(lines[at])
    entry["payload"]["decision"]["load"]["now"] = 7.5
    lines[at] = json.dumps(entry)
    exported.write_text("\n".join(lines))
    code, _, error = run("replay", str(exported))
    assert code == 1
    assert f"1 differ; the first: decision {entry['seq']} of tiny, 1970-01-12" in error
    assert "decision.load.now: recorded 7.5, again 2.0" in error


def test_what_is_no_journal_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    assert "cannot be read" in run("replay", str(path))[2]
    path.write_text('{"seq": 1}\n')
    code, _, error = run("replay", str(path))
    assert code == 1
    assert f"error: {path}: line 1:" in error
    path.write_text("{not json\n")
    assert f"error: {path}: line 1:" in run("replay", str(path))[2]
    path.write_bytes(b"\xff\xfe")
    assert "cannot be read" in run("replay", str(path))[2]
    path.write_text("\n")
    assert run("replay", str(path))[2] == "error: nothing was checked\n"


def test_a_file_that_cannot_be_written_is_an_error(store: str, tmp_path: Path) -> None:
    code, _, error = run("replay", "--store", store, "--export", str(tmp_path / "no" / "file"))
    assert code == 1
    assert error.startswith("error: --export:")
