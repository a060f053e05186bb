"""`expertmesh simulate`: what a person and a program get, and what is refused."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner, Result

from expertmesh.cli import simulate_run
from expertmesh.cli.simulate import simulate
from expertmesh.simulator.synthetic import steps

app = typer.Typer()
app.command("simulate")(simulate)

SCENARIO = """
kind: Scenario
name: small
typical_request: {prompt_tokens: 400, output_tokens: 100}
slo: {ttft_s: 5, tpot_s: 0.05}
min_groups: 1
options:
  - pool: od
    market: on-demand
    parallelism: {expert: 8}
    nodes: 1
    max_groups: 8
    initial_groups: 1
    usd_per_hour: 36
    start: {median_s: 60, sigma: 0}
    service: {alpha_s: 0.02, beta_s: 2.0e-5, gamma_s: 2.0e-7, kv_tokens: 400000, max_seqs: 200,
              max_batched_tokens: 4096}
"""


@pytest.fixture
def scenario(tmp_path: Path) -> Path:
    file = tmp_path / "small.yaml"
    file.write_text(SCENARIO)
    return file


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """10 minutes at 10 requests a second, and 10 at 60."""
    requests = steps([(600.0, 10.0), (600.0, 60.0)], prompt_tokens=400, output_tokens=100)
    rows = zip(requests.at_s, requests.prompt_tokens, requests.output_tokens, strict=True)
    lines = [f"{at_s:.3f},{prompt},{output}" for at_s, prompt, output in rows]
    file = tmp_path / "steps.csv"
    file.write_text("\n".join(["at_s,prompt_tokens,output_tokens", *lines]))
    return file


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def answer(*arguments: object) -> Any:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def refusal(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    return result.stderr


def test_policies_are_compared_with_the_oracle(scenario: Path, trace: Path) -> None:
    result = run(scenario, "--trace", trace, "--policy", "static", "--policy", "keda-waiting")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    oracle, static = (
        next(line.split() for line in lines if line.strip().startswith(name))
        for name in ("oracle", "static:groups=")
    )
    assert oracle[2] == "1.00"
    assert float(static[2]) > 1.0
    assert any(line.strip().startswith("keda-waiting") for line in lines)
    assert "steps.csv" in result.stdout


def test_all_policies_run_when_none_is_named(scenario: Path, trace: Path) -> None:
    named = {
        row["policy"].partition(":")[0] for row in answer(scenario, "--trace", trace)["policies"]
    }
    baselines = {"static", "keda-waiting", "keda-running", "knative", "wva-v1", "wva-v2", "dynamo"}
    assert named >= baselines | {"skyserve"}


def test_json_has_money_attainment_and_starts(scenario: Path, trace: Path) -> None:
    told = answer(scenario, "--trace", trace, "--policy", "static:groups=2")
    row = told["policies"][0]
    # 20 minutes of two groups, one of them from the start.
    assert row["usd"] == pytest.approx(24.0)
    assert row["times_oracle"] == pytest.approx(24.0 / told["oracle"]["usd"])
    assert (row["starts"], row["peak_groups"]) == (1, 2)
    assert 0.0 <= row["worst_10min"]["both"] <= row["attainment"]["both"] <= 1.0


def test_more_requests_cost_the_oracle_more(scenario: Path, trace: Path) -> None:
    one, two = (
        answer(scenario, "--trace", trace, "--policy", "static:groups=1", "--scale", scale)
        for scale in (1, 2)
    )
    assert two["requests"] == 2 * one["requests"]
    assert two["oracle"]["usd"] > one["oracle"]["usd"]


def test_a_part_of_the_trace(scenario: Path, trace: Path) -> None:
    part = ("--policy", "static:groups=1", "--from", "5m", "--to", "10m")
    told = answer(scenario, "--trace", trace, *part)
    assert told["span_s"] == 300.0
    assert told["requests"] == pytest.approx(3000, rel=0.1)


def test_the_same_seed_gives_the_same_answer(scenario: Path, trace: Path) -> None:
    arguments = (scenario, "--trace", trace, "--policy", "dynamo", "--scale", "1.5")
    assert answer(*arguments, "--seed", "5") == answer(*arguments, "--seed", "5")
    assert answer(*arguments, "--seed", "5") != answer(*arguments, "--seed", "6")


def test_event_mode_follows_each_request(scenario: Path, trace: Path) -> None:
    part = ("--policy", "static:groups=2", "--mode", "event", "--to", "2m")
    told = answer(scenario, "--trace", trace, *part)
    assert told["policies"][0]["mode"] == "event"
    assert told["policies"][0]["attainment"]["both"] == 1.0


def test_no_progress_without_a_terminal(scenario: Path, trace: Path) -> None:
    assert run(scenario, "--trace", trace, "--policy", "static:groups=1").stderr == ""


def test_progress_on_a_terminal(
    scenario: Path, trace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = io.StringIO()

    def terminal(**_: object) -> Console:
        return Console(file=screen, force_terminal=True, width=100)

    monkeypatch.setattr(simulate_run, "Console", terminal)
    part = ("--policy", "static:groups=1", "--json")
    assert run(scenario, "--trace", trace, *part).exit_code == 0
    assert "static:groups=1" in screen.getvalue()


def test_a_plot(scenario: Path, trace: Path, tmp_path: Path) -> None:
    file = tmp_path / "runs.png"
    part = ("--policy", "static:groups=1", "--plot", file)
    assert run(scenario, "--trace", trace, *part).exit_code == 0
    assert file.read_bytes().startswith(b"\x89PNG")
    missing = tmp_path / "none" / "runs.png"
    assert str(missing) in refusal(scenario, "--trace", trace, *part[:2], "--plot", missing)


def test_a_plot_without_its_library(
    scenario: Path, trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "expertmesh.simulator.plots", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    part = ("--policy", "static:groups=1", "--plot", tmp_path / "runs.png")
    error = refusal(scenario, "--trace", trace, *part)
    assert "needs matplotlib: install expertmesh[simulate]" in error


def test_other_commands_do_without_numpy(scenario: Path, trace: Path) -> None:
    code = (
        "import sys; sys.modules['numpy'] = None\n"
        "import typer; from expertmesh.cli.simulate import simulate\n"
        "app = typer.Typer(); app.command()(simulate); app()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, scenario, "--trace", trace],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": "platform"},
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr == "error: needs numpy; install expertmesh[simulate]\n"


def test_no_oracle_where_no_fleet_is_enough(scenario: Path, trace: Path) -> None:
    part = ("--policy", "static:groups=1", "--scale", "50")
    assert answer(scenario, "--trace", trace, *part)["oracle"] is None
    assert "no oracle" in run(scenario, "--trace", trace, *part).stdout
    assert "cannot serve the peak" in refusal(
        scenario, "--trace", trace, "--policy", "static", "--scale", "50"
    )


def test_a_missing_or_bad_trace(scenario: Path, tmp_path: Path) -> None:
    missing = tmp_path / "none.csv"
    assert str(missing) in refusal(scenario, "--trace", missing)
    bad = tmp_path / "bad.csv"
    bad.write_text("at_s,prompt_tokens,output_tokens\n0,ten,5\n")
    error = refusal(scenario, "--trace", bad)
    assert "line 2" in error
    assert "'ten'" in error


def test_an_unknown_policy_names_those_that_are_known(scenario: Path, trace: Path) -> None:
    error = refusal(scenario, "--trace", trace, "--policy", "kedda")
    assert "'kedda'" in error
    assert "keda-waiting, keda-running, knative" in error


@pytest.mark.parametrize(
    ("part", "said"),
    [
        (("--from", "2h"), "the trace is 20.0 min long"),
        (("--from", "10m", "--to", "5m"), "must end after it begins"),
        (("--scale", "0"), "above 0"),
        (("--scale", "nan"), "above 0"),
    ],
)
def test_a_part_without_requests(
    scenario: Path, trace: Path, part: tuple[str, ...], said: str
) -> None:
    assert said in refusal(scenario, "--trace", trace, *part)


def test_a_silent_part(scenario: Path, tmp_path: Path) -> None:
    file = tmp_path / "gap.csv"
    file.write_text("at_s,prompt_tokens,output_tokens\n0,1,1\n3600,1,1\n")
    assert "no requests from 10m up to 20m" in refusal(
        scenario, "--trace", file, "--from", "10m", "--to", "20m"
    )


def test_a_manifest_is_no_scenario(trace: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.yaml"
    file.write_text("kind: ModelDeployment\nname: small\n")
    assert "no measured service times" in refusal(file, "--trace", trace)


def test_a_mistake_in_the_scenario_names_file_and_field(scenario: Path, trace: Path) -> None:
    scenario.write_text(SCENARIO.replace("usd_per_hour: 36", "usd_per_hor: 36"))
    error = refusal(scenario, "--trace", trace)
    assert "options.0.usd_per_hor: unknown key; did you mean 'usd_per_hour'?" in error
    assert str(scenario) in error
