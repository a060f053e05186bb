"""`expertmesh dashboards push` against a mock of the endpoints that it uses, not a Grafana."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.clients.grafana_server import TOKEN, GrafanaState, grafana_server
from typer.testing import CliRunner, Result

from expertmesh.cli.dashboards import TOKEN_VARIABLE, URL_VARIABLE, dashboards_app

GENERATED = Path(__file__).parents[2] / "dashboards/generated"
ALL = ("--prometheus-url", "http://prometheus:9090", "--contact-email", "ops@example.com")


@pytest.fixture
def grafana() -> Iterator[GrafanaState]:
    with grafana_server() as state:
        yield state


def push(state: GrafanaState, *options: str, answer: str = "", token: str = TOKEN) -> Result:
    return CliRunner().invoke(
        dashboards_app,
        ["push", "--from", str(GENERATED), *options],
        input=answer,
        env={URL_VARIABLE: state.url, TOKEN_VARIABLE: token},
    )


def test_everything_is_set_up_and_a_second_run_writes_nothing(grafana: GrafanaState) -> None:
    first = push(grafana, "--yes", *ALL)
    assert first.exit_code == 0, first.output
    assert {path.stem for path in GENERATED.glob("*.json")} == {
        uid.removeprefix("expertmesh-") for uid in grafana.dashboards
    }
    assert grafana.folders["expertmesh"]["title"] == "ExpertMesh"
    for stored in grafana.dashboards.values():
        assert stored["meta"]["folderUid"] == "expertmesh"
    (source,) = grafana.data_sources.values()
    assert (source["type"], source["url"]) == ("prometheus", "http://prometheus:9090")
    (contact,) = grafana.contacts.values()
    assert (contact["type"], contact["settings"]) == ("email", {"addresses": "ops@example.com"})
    assert contact["provenance"] == "", "people may change it in Grafana"
    grafana.writes.clear()
    second = push(grafana, "--yes", *ALL)
    assert second.exit_code == 0 and "all is as it should be" in second.output
    assert grafana.writes == []


def test_only_what_differs_is_shown_and_written(grafana: GrafanaState) -> None:
    push(grafana, "--yes", *ALL)
    grafana.writes.clear()
    grafana.dashboards["expertmesh-cost"]["dashboard"]["title"] = "changed by hand"
    grafana.dashboards["expertmesh-group"]["meta"]["folderUid"] = "elsewhere"
    grafana.contacts["expertmesh-contact"]["settings"] = {"addresses": "old@example.com"}
    shown = push(grafana, "--yes", *ALL).output
    assert "changed: dashboard expertmesh-cost" in shown
    assert '-  "title": "changed by hand"' in shown and '+  "title": "ExpertMesh: cost"' in shown
    assert '-  "folder": "elsewhere"' in shown
    assert '-    "addresses": "old@example.com"' in shown
    assert len(grafana.writes) == 3
    assert grafana.dashboards["expertmesh-cost"]["dashboard"]["version"] == 2
    (contact,) = grafana.contacts.values()
    assert contact["provenance"] == "" and contact["settings"]["addresses"] == "ops@example.com"


def test_a_panel_that_was_added_or_taken_away_by_hand_is_a_difference(
    grafana: GrafanaState,
) -> None:
    push(grafana, "--yes", *ALL)
    grafana.writes.clear()
    panels = grafana.dashboards["expertmesh-cost"]["dashboard"]["panels"]
    taken = panels.pop()
    assert "changed: dashboard expertmesh-cost" in push(grafana, "--dry-run", *ALL).output
    panels += [taken, taken]
    assert "changed: dashboard expertmesh-cost" in push(grafana, "--yes", *ALL).output
    assert grafana.writes == ["POST /api/dashboards/db"]
    del grafana.dashboards["expertmesh-cost"]["dashboard"]["panels"][0]["title"]
    assert "changed: dashboard expertmesh-cost" in push(grafana, "--yes", *ALL).output


def test_a_dry_run_and_a_no_write_nothing(grafana: GrafanaState) -> None:
    dry = push(grafana, "--dry-run", *ALL)
    assert dry.exit_code == 0 and "nothing was written" in dry.output
    assert "new: folder expertmesh" in dry.output
    refused = push(grafana, *ALL, answer="n\n")
    assert refused.exit_code == 1
    assert grafana.writes == [] and grafana.dashboards == {}
    assert push(grafana, answer="y\n").exit_code == 0 and grafana.dashboards


def test_what_somebody_else_has_set_stays(grafana: GrafanaState) -> None:
    push(grafana, "--yes", *ALL)
    grafana.data_sources["expertmesh-prometheus"] |= {
        "url": "http://old:9090",
        "jsonData": {"timeInterval": "15s"},
    }
    push(grafana, "--yes", *ALL)
    source = grafana.data_sources["expertmesh-prometheus"]
    assert source["url"] == "http://prometheus:9090"
    assert source["jsonData"] == {"timeInterval": "15s"}


def test_a_wrong_token_is_named(grafana: GrafanaState) -> None:
    result = push(grafana, "--yes", token="wrong")
    assert result.exit_code == 2
    assert "does not take the token" in result.output and "wrong" not in result.output


@pytest.mark.parametrize(
    ("status", "words"), [(403, "may not do this"), (400, "refuses it"), (500, "500")]
)
def test_a_refusal_says_why(grafana: GrafanaState, status: int, words: str) -> None:
    grafana.refuse_writes = status
    result = push(grafana, "--yes")
    assert result.exit_code == 2 and words in result.output
    assert grafana.dashboards == {}


@pytest.mark.parametrize(
    ("options", "environment", "words"),
    [
        ((), {}, "GRAFANA_URL: missing"),
        ((), {URL_VARIABLE: "http://127.0.0.1:1"}, "GRAFANA_TOKEN: missing"),
        ((), {URL_VARIABLE: "http://127.0.0.1:1", TOKEN_VARIABLE: "t"}, "http://127.0.0.1:1"),
        (("--url", "grafana"), {TOKEN_VARIABLE: "t"}, "no URL of a Grafana"),
        (("--url", "http://a:b@host"), {TOKEN_VARIABLE: "t"}, "holds a password"),
        (
            ("--contact-email", "a@b", "--contact-webhook", "http://c"),
            {URL_VARIABLE: "http://127.0.0.1:1", TOKEN_VARIABLE: "t"},
            "choose one",
        ),
    ],
)
def test_what_is_missing_or_wrong_is_said(
    options: tuple[str, ...], environment: dict[str, str], words: str
) -> None:
    empty = {URL_VARIABLE: None, TOKEN_VARIABLE: None}
    result = CliRunner().invoke(
        dashboards_app,
        ["push", "--yes", "--from", str(GENERATED), *options],
        env={**empty, **environment},
    )
    assert result.exit_code == 2 and words in result.output, result.output


def test_a_folder_without_dashboards_and_a_broken_one_are_refused(
    grafana: GrafanaState, tmp_path: Path
) -> None:
    empty = push(grafana, "--from", str(tmp_path))
    assert empty.exit_code == 2 and "holds no dashboards" in empty.output
    (tmp_path / "a.json").write_text(json.dumps({"title": "no uid"}))
    broken = push(grafana, "--from", str(tmp_path))
    assert broken.exit_code == 2 and "a.json: is no dashboard" in broken.output
    assert grafana.writes == []


def test_build_writes_everything_and_leads_alerts_to_your_runbooks(tmp_path: Path) -> None:
    shutil.copytree(GENERATED.parent, tmp_path / "dashboards", ignore=_not_the_generated)
    program = Path(sys.executable).with_name("expertmesh")

    def build(*options: str) -> str:
        done = subprocess.run(
            [program, "dashboards", "build", *options], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    shown = build()
    assert "wrote dashboards/generated/cost.json" in shown
    for path in GENERATED.iterdir():
        made = tmp_path / "dashboards/generated" / path.name
        assert made.read_text() == path.read_text(), path.name
    build("--runbooks", "https://docs.example.com/operations")
    rules = (tmp_path / "helm/expertmesh/files/alerts.yaml").read_text()
    urls = re.findall(r"runbook_url: (\S+)", rules)
    assert len(urls) >= 10
    assert all(re.fullmatch(r"https://docs.example.com/operations#expertmesh\w+", u) for u in urls)


def _not_the_generated(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if name in ("generated", "__pycache__")]


def test_build_needs_the_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(dashboards_app, ["build"])
    assert result.exit_code == 2 and "root of the repository" in result.output
