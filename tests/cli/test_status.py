"""`expertmesh status` against real servers with controllers made up, as leader and as follower."""

import asyncio
import contextlib
import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import typer
from rich.console import Console
from tests.console.fake_view import (
    QWEN,
    TODAY,
    FakeRole,
    FakeToday,
    FakeView,
    busy_view,
    empty_view,
    failing_view,
)
from tests.console.stand import TOKEN, Stand
from typer.testing import CliRunner, Result

from expertmesh.cli.status import status
from expertmesh.cli.status_view import render_status
from expertmesh.controller.overview import ControllerState, Overview

app = typer.Typer()
app.command("status")(status)


@contextlib.contextmanager
def serving(stand: Stand) -> Iterator[Stand]:
    """In a loop of its own, as the command has one too."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        asyncio.run_coroutine_threadsafe(stand.start(), loop).result(10)
        yield stand
    finally:
        asyncio.run_coroutine_threadsafe(stand.stop(), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def _run(stand: Stand, *arguments: str, token: str = TOKEN) -> Result:
    return CliRunner().invoke(
        app,
        ["--controller-url", stand.url, *arguments],
        env={"EXPERTMESH_MESH_TOKEN": token},
    )


def _stand(view: FakeView | None = None, **rest: Any) -> Stand:
    return Stand(view or busy_view(), FakeToday(TODAY), **rest)


def test_a_pipe_gets_it_once_and_plain() -> None:
    with serving(_stand()) as stand:
        result = _run(stand)
    assert result.exit_code == 0
    assert "\x1b" not in result.stdout
    lines = result.stdout.splitlines()
    assert "somewhere" in lines[0] and "now $118.80/h" in lines[0]
    assert "today $3,456.79 capacity, $5,120.50 revenue" in lines[0]
    rows = {line.split()[0]: line for line in lines if line.split()}
    assert stand.view.shown is not None
    for group in stand.view.shown.groups:
        line = rows[group.name]
        assert group.state in line and f"{group.usd_per_hour:.2f}" in line
    (past,) = (line for line in lines if "24.0 h" in line)
    assert past.split() == [QWEN, "24.0", "h", "$1,743.36", "$1,210.10"]
    assert "ready in about 140 s" in rows[f"em-{QWEN}-h200-spot-5"]
    assert "5/8" in rows["h200-od"] and "18.16" in rows["h200-od"]
    assert "812" in rows and f"start em-{QWEN}-h200-spot-5" in rows["812"]


def test_json_is_all_that_the_controller_says() -> None:
    with serving(_stand()) as stand:
        shown = json.loads(_run(stand, "--json").stdout)
    assert (shown["controller"], shown["note"]) == (stand.url, "")
    picture = shown["overview"]["state"]["picture"]
    assert [group["name"] for group in picture["groups"]] == [
        group.name
        for group in busy_view().shown.groups  # type: ignore[union-attr]
    ]
    assert shown["overview"]["today"]["capacity_usd"] == TODAY.capacity_usd
    assert shown["overview"]["decisions"][0]["seq"] == 812
    assert shown["overview"]["heat"][f"em-{QWEN}-h200-od-1"]["lately"] is True


def test_a_follower_sends_on_to_its_leader_and_says_so() -> None:
    with serving(_stand()) as leader:
        role = FakeRole(leads=False, leader_url=leader.url)
        with serving(_stand(FakeView(), role=role)) as follower:
            text = _run(follower, "--once").stdout
            shown = json.loads(_run(follower, "--json").stdout)
    assert f"{follower.url} follows {leader.url}; this is what the leader says" in text
    assert f"em-{QWEN}-h200-od-1" in text
    assert shown["controller"] == leader.url


def test_a_follower_whose_leader_is_gone_still_tells_the_decisions() -> None:
    role = FakeRole(leads=False, leader_url="http://127.0.0.1:1")
    with serving(_stand(FakeView(made=busy_view().made), role=role)) as follower:
        result = _run(follower)
    assert result.exit_code == 0
    assert "which cannot be asked" in result.stdout
    assert "812" in result.stdout and "a follower" in result.stdout


def test_what_fails_is_told() -> None:
    with serving(_stand(failing_view())) as stand:
        text = _run(stand).stdout
    assert "failing: journal: failed 12 times in a row" in text
    assert "the journal does not answer: store: connection refused" in text
    assert "?/8" in text


@pytest.mark.parametrize(
    ("token", "words"), [("wrong", "401"), (TOKEN, "no answer")], ids=["token", "nobody there"]
)
def test_errors_are_for_a_person(token: str, words: str) -> None:
    with serving(_stand()) as stand:
        if token == "wrong":
            result = _run(stand, token=token)
    if token != "wrong":
        result = _run(stand, token=token)
    assert result.exit_code == 2
    assert words in result.stderr and "Traceback" not in result.output


def test_a_link_opens_the_console() -> None:
    view = empty_view()
    with serving(_stand(view)) as stand:
        text = _run(stand, "--link").stdout.strip()
    assert text.startswith(f"{stand.url}/console/#ticket=emt1.mesh.")
    assert TOKEN not in text


def test_only_one_form_at_a_time() -> None:
    result = CliRunner().invoke(app, ["--once", "--json"])
    assert result.exit_code == 2 and "choose one" in result.output


def _shown(overview: Overview, width: int = 120, **rest: Any) -> str:
    console = Console(width=width, no_color=True)
    with console.capture() as capture:
        console.print(render_status(overview, **rest))
    return capture.get()


def _overview(view: FakeView, **state: Any) -> Overview:
    at = ControllerState(view.now_s, "somewhere", None, {}, False, True, None, view.shown)
    return Overview(replace(at, **state), view.made)


def test_old_values_are_called_old() -> None:
    overview = _overview(busy_view())
    assert "OLD" not in _shown(overview)
    assert "THIS IS 17 s OLD" in _shown(overview, note="no answer", silent_s=17.2)
    late = replace(overview, state=replace(overview.state, at_s=overview.state.at_s + 60))
    assert "THIS IS 60 s OLD" in _shown(late)


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_it_fits_the_terminal(width: int) -> None:
    text = _shown(_overview(busy_view()), width)
    assert max(len(line) for line in text.splitlines()) <= width
    assert "…" not in text


def test_before_the_first_decision() -> None:
    text = _shown(_overview(FakeView()))
    assert "no decision has been made yet" in text
