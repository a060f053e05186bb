import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from expertmesh.cli.keys import keys_app

_SECRET = re.compile(r"sk-em-[A-Za-z0-9_-]{43}\n")
_PLATFORM = str(Path(__file__).parents[2] / "platform")


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with nothing in the environment that names a store."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("EXPERTMESH_STORE_URL", raising=False)
    return tmp_path


@pytest.fixture
def store(empty_folder: Path) -> str:
    return f"sqlite:///{empty_folder}/store.db"


def _run(*arguments: str) -> Result:
    return CliRunner().invoke(keys_app, arguments)


def _key_id(created: Result) -> str:
    return created.stderr.split()[0]


def test_create_prints_the_secret_alone_and_explains_on_the_side(store: str) -> None:
    created = _run("create", "--tenant", "acme", "--name", "batch", "--store", store)
    assert created.exit_code == 0
    assert _SECRET.fullmatch(created.stdout)
    assert re.match(r"key_\w+ for tenant acme, valid until revoked\.", created.stderr)
    assert created.stdout.strip() not in created.stderr


def test_a_shell_can_take_the_secret(store: str) -> None:
    program = f"import sys; sys.path.insert(0, {_PLATFORM!r})\n"
    program += "from expertmesh.cli.keys import keys_app; keys_app()"
    shell = 'KEY=$("$0" -c "$1" create --tenant me --store "$2") && printf %s "$KEY"'
    done = subprocess.run(
        ("sh", "-c", shell, sys.executable, program, store),
        capture_output=True,
        text=True,
        check=True,
    )
    assert _SECRET.fullmatch(done.stdout + "\n")


def test_list_shows_every_key_with_its_state_and_no_secret(store: str) -> None:
    active = _run("create", "--tenant", "acme", "--name", "batch", "--store", store)
    expiring = _run("create", "--tenant", "zoo", "--expires", "30d", "--store", store)
    revoked = _run("create", "--tenant", "zoo", "--store", store)
    assert _run("revoke", _key_id(revoked), "--store", store).exit_code == 0

    listed = _run("list", "--store", store)
    assert listed.exit_code == 0
    rows = {line.split()[1]: line for line in listed.stdout.splitlines() if "key_" in line}
    assert set(rows) == {_key_id(key) for key in (active, expiring, revoked)}
    assert re.search(r"acme .* batch .* never .* active", rows[_key_id(active)])
    assert re.search(
        r"zoo .* 20\d\d-\d\d-\d\d .* 20\d\d-\d\d-\d\d .* active", rows[_key_id(expiring)]
    )
    assert "revoked" in rows[_key_id(revoked)]
    for key in (active, expiring, revoked):
        assert key.stdout.strip() not in listed.stdout


def test_scopes_and_limits_are_stored_and_listed(store: str) -> None:
    scoped = _run(
        *("create", "--tenant", "acme", "--models", "tiny-moe, org/big", "--store", store),
        *("--requests-per-min", "60", "--tokens-per-min", "100000"),
        *("--concurrent-requests", "4", "--usd-per-day", "0.3", "--usd-per-month", "12.5"),
    )
    admin = _run("create", "--tenant", "ops", "--admin", "--store", store)
    plain = _run("create", "--tenant", "zoo", "--models", "tiny-moe", "--store", store)
    assert [key.exit_code for key in (scoped, admin, plain)] == [0, 0, 0]

    listed = _run("list", "--store", store).stdout
    # The cell folds; its words stay in order.
    assert re.search(r"2 models,.* 60\b", listed)
    assert "admin API, no limits" in listed and "tiny-moe, no limits" in listed

    keys = json.loads(_run("list", "--json", "--store", store).stdout)
    assert [(key["tenant"], key["admin"], key["models"], key["state"]) for key in keys] == [
        ("acme", False, ["org/big", "tiny-moe"], "active"),
        ("ops", True, None, "active"),
        ("zoo", False, ["tiny-moe"], "active"),
    ]
    assert keys[0]["limits"] == {
        "requests_per_min": 60,
        "tokens_per_min": 100_000,
        "concurrent_requests": 4,
        "usd_per_day": 0.3,
        "usd_per_month": 12.5,
    }
    for key in (scoped, admin, plain):
        assert key.stdout.strip()[:12] not in json.dumps(keys) + listed


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--requests-per-min", "0"), "error: limits.requests_per_min: 0: use a whole number"),
        (("--usd-per-day", "nan"), "error: limits.usd_per_day: nan: use dollars above 0"),
        (("--models", ""), "error: models: '': use at most"),
        (("--models", "a,,b"), "error: models: '': use at most"),
        (("--admin", "--models", "a"), "error: admin: True: such a key opens only the admin API"),
    ],
)
def test_a_bad_scope_or_limit_is_refused(store: str, option: tuple[str, ...], message: str) -> None:
    refused = _run("create", "--tenant", "acme", *option, "--store", store)
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert refused.stderr.startswith(message)
    assert json.loads(_run("list", "--json", "--store", store).stdout) == []


def test_the_way_back_in_without_an_admin_key_is_in_the_help() -> None:
    shown = " ".join(_run("create", "--help").stdout.replace("│", " ").split())
    assert "When the last such key is gone, this command makes the next one." in shown


def test_revoking_twice_or_an_unknown_key_fails(store: str) -> None:
    key = _run("create", "--tenant", "acme", "--store", store)
    first = _run("revoke", _key_id(key), "--store", store)
    assert (first.exit_code, first.stdout) == (0, f"{_key_id(key)} revoked\n")
    for key_id in (_key_id(key), "key_unknown"):
        again = _run("revoke", key_id, "--store", store)
        assert (again.exit_code, again.stdout) == (1, "")
        assert f"error: '{key_id}': no such key, or revoked already" in again.stderr


@pytest.mark.parametrize("expires", ["30", "d", "0d", "-1d", "1.5h", "30 days", ""])
def test_an_unreadable_lifetime_is_refused_before_anything_is_stored(
    store: str, empty_folder: Path, expires: str
) -> None:
    refused = _run("create", "--tenant", "acme", "--expires", expires, "--store", store)
    assert refused.exit_code == 2
    assert "e.g. 30d" in refused.stderr
    assert list(empty_folder.iterdir()) == []


def test_a_bad_tenant_is_refused(store: str) -> None:
    refused = _run("create", "--tenant", "Acme Corp", "--store", store)
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert refused.stderr.startswith("error: tenant: 'Acme Corp': use at most")


def test_the_store_of_the_only_system_here_is_found(empty_folder: Path) -> None:
    (empty_folder / ".expertmesh" / "local").mkdir(parents=True)
    (empty_folder / ".expertmesh" / "local" / "store.db").touch()
    assert _run("create", "--tenant", "acme").exit_code == 0
    assert "acme" in _run("list").stdout


def test_the_environment_names_the_store_and_the_option_overrules_it(
    store: str, empty_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EXPERTMESH_STORE_URL", store)
    assert _run("create", "--tenant", "from-environment").exit_code == 0
    other = f"sqlite:///{empty_folder}/other.db"
    assert _run("create", "--tenant", "from-option", "--store", other).exit_code == 0
    assert "from-environment" in _run("list").stdout
    assert "from-option" not in _run("list").stdout
    assert "from-option" in _run("list", "--store", other).stdout


def test_without_a_store_the_error_says_how_to_name_one() -> None:
    refused = _run("list")
    assert refused.exit_code == 1
    assert "no .expertmesh/*/store.db in this folder" in refused.stderr
    assert "--store URL or EXPERTMESH_STORE_URL" in refused.stderr


def test_with_two_systems_the_error_names_both(empty_folder: Path) -> None:
    for name in ("one", "two"):
        (empty_folder / ".expertmesh" / name).mkdir(parents=True)
        (empty_folder / ".expertmesh" / name / "store.db").touch()
    refused = _run("create", "--tenant", "acme")
    assert refused.exit_code == 1
    assert ".expertmesh/one/store.db, .expertmesh/two/store.db" in refused.stderr


@pytest.mark.parametrize("command", [("list",), ("revoke", "key_1")], ids=["list", "revoke"])
def test_reading_does_not_create_a_store(
    store: str, empty_folder: Path, command: tuple[str, ...]
) -> None:
    refused = _run(*command, "--store", store)
    assert refused.exit_code == 1
    assert "store.db: does not exist; check the path" in refused.stderr
    assert list(empty_folder.iterdir()) == []
