import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from expertmesh.cli.keys import keys_app
from expertmesh.cli.main import app
from expertmesh.cli.tenants import shown_limits, tenants_app
from expertmesh.core.domain.tenant import Limits


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    url = f"sqlite:///{tmp_path}/store.db"
    monkeypatch.setenv("EXPERTMESH_STORE_URL", url)
    return url


def _run(*arguments: str) -> Result:
    return CliRunner().invoke(tenants_app, arguments)


def _listed() -> list[dict[str, Any]]:
    result = _run("list", "--json")
    assert result.exit_code == 0
    tenants: list[dict[str, Any]] = json.loads(result.stdout)
    return tenants


def test_the_command_is_part_of_the_program() -> None:
    assert CliRunner().invoke(app, ("tenants", "set", "acme")).exit_code == 0
    assert CliRunner().invoke(app, ("tenants", "list")).exit_code == 0


def test_a_tenant_is_created_with_defaults_then_changed_bit_by_bit() -> None:
    assert _run("set", "acme").stdout == "acme: standard, weight 1, no limits\n"
    _run("set", "acme", "--priority", "interactive", "--usd-per-day", "12.5")
    changed = _run("set", "acme", "--weight", "0.5", "--requests-per-min", "6000")
    assert (changed.exit_code, changed.stdout) == (
        0,
        "acme: interactive, weight 0.5, 6,000 requests/min, $12.50/day\n",
    )
    cleared = _run("set", "acme", "--usd-per-day", "none", "--tokens-per-min", "9")
    assert cleared.exit_code == 0
    (tenant,) = _listed()
    assert tenant.pop("created_at_s") > 1_700_000_000
    assert tenant == {
        "name": "acme",
        "priority": "interactive",
        "weight": 0.5,
        "limits": {
            "requests_per_min": 6000,
            "tokens_per_min": 9,
            "concurrent_requests": None,
            "usd_per_day": None,
            "usd_per_month": None,
        },
        "disabled_at_s": None,
    }


def test_the_list_shows_limits_and_state() -> None:
    _run("set", "acme", "--priority", "batch", "--weight", "2", "--concurrent-requests", "4")
    _run("set", "zoo")
    _run("disable", "zoo")
    rows = {line.split()[1]: line for line in _run("list").stdout.splitlines() if "20" in line}
    assert re.search(r"acme .* batch .* 2 .* 4 at once .* active", rows["acme"])
    assert re.search(r"zoo .* standard .* 1 .* no limits .* disabled", rows["zoo"])


def test_disabling_lets_the_keys_rest_and_enabling_wakes_them() -> None:
    def states() -> list[str]:
        listed = CliRunner().invoke(keys_app, ("list", "--json"))
        return [key["state"] for key in json.loads(listed.stdout)]

    assert CliRunner().invoke(keys_app, ("create", "--tenant", "acme")).exit_code == 0
    disabled = _run("disable", "acme")
    assert (disabled.exit_code, disabled.stdout) == (0, "acme disabled\n")
    assert states() == ["tenant disabled"]
    refused = CliRunner().invoke(keys_app, ("create", "--tenant", "acme"))
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert refused.stderr == "error: tenant: 'acme': is disabled; enable it first\n"
    enabled = _run("enable", "acme")
    assert (enabled.exit_code, enabled.stdout) == (0, "acme enabled\n")
    assert states() == ["active"]


@pytest.mark.parametrize("command", ["disable", "enable"])
def test_an_unknown_tenant_cannot_be_switched(command: str) -> None:
    _run("set", "acme")
    refused = _run(command, "nobody")
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert "'nobody': no such tenant; see `expertmesh tenants list`" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "exit_code", "message"),
    [
        (("Acme",), 1, "error: name: 'Acme': use at most"),
        (("acme", "--weight", "0"), 1, "error: weight: 0.0: use a number above 0"),
        (("acme", "--weight", "1001"), 1, "error: weight: 1001.0: use a number above 0"),
        (("acme", "--weight", "nan"), 1, "error: weight: nan: use a number above 0"),
        (("acme", "--requests-per-min", "0"), 1, "error: limits.requests_per_min: 0: use"),
        (("acme", "--requests-per-min", "1.5"), 2, "'1.5': write a whole number, or none"),
        (("acme", "--tokens-per-min", "-1"), 2, "'-1': write a whole number, or none"),
        (("acme", "--usd-per-day", "nan"), 2, "'nan': write dollars such as 12.50, or none"),
        (("acme", "--usd-per-month", "0.0"), 1, "error: limits.usd_per_month: 0.0: use dollars"),
        (("acme", "--priority", "urgent"), 2, "interactive"),
    ],
)
def test_bad_settings_are_refused_and_change_nothing(
    arguments: tuple[str, ...], exit_code: int, message: str
) -> None:
    assert _run("set", "known").exit_code == 0
    refused = _run("set", *arguments)
    assert (refused.exit_code, refused.stdout) == (exit_code, "")
    assert message in " ".join(refused.stderr.replace("│", " ").split())
    assert [tenant["name"] for tenant in _listed()] == ["known"]


@pytest.mark.parametrize("arguments", [("list",), ("disable", "acme"), ("enable", "acme")])
def test_reading_does_not_create_a_store(arguments: tuple[str, ...], tmp_path: Path) -> None:
    refused = _run(*arguments)
    assert refused.exit_code == 1
    assert "store.db: does not exist; check the path" in refused.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("limits", "shown"),
    [
        (Limits(), "no limits"),
        (Limits(usd_per_day=0.1), "$0.10/day"),
        (Limits(usd_per_day=0.125), "$0.125/day"),
        (Limits(usd_per_month=1234567.5), "$1,234,567.50/month"),
        (Limits(1000, None, 2), "1,000 requests/min, 2 at once"),
    ],
)
def test_limits_in_words(limits: Limits, shown: str) -> None:
    assert shown_limits(limits) == shown
