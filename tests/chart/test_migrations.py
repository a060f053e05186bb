"""The Job that brings the store to the newest schema before pods start."""

import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from tests.chart.rendering import PROFILES, render

pytestmark = pytest.mark.integration

POSTGRESQL = {"store.existingSecret": "expertmesh-store"}


def test_it_runs_before_every_install_and_upgrade() -> None:
    job = render(values=POSTGRESQL).one("Job")
    annotations = job["metadata"]["annotations"]
    assert annotations["helm.sh/hook"] == "pre-install,pre-upgrade"
    # A Job cannot be changed: that of the last upgrade goes first.
    assert "before-hook-creation" in annotations["helm.sh/hook-delete-policy"]
    assert job["spec"]["activeDeadlineSeconds"] == 600


def test_it_needs_nothing_that_the_release_makes() -> None:
    """Hooks run first: there is no account, Secret, ConfigMap or claim of the chart yet."""
    spec = render(values=POSTGRESQL).one("Job")["spec"]["template"]["spec"]
    assert "serviceAccountName" not in spec
    assert [volume.keys() - {"name"} for volume in spec["volumes"]] == [{"emptyDir"}]
    (variable,) = spec["containers"][0]["env"]
    assert variable["valueFrom"]["secretKeyRef"] == {"name": "expertmesh-store", "key": "url"}


def test_sqlite_is_left_to_the_controller() -> None:
    """Its volume belongs to one node, and may not be there yet."""
    assert not render().all("Job")
    assert not render(values={**POSTGRESQL, "migrations.enabled": False}).all("Job")


@pytest.mark.parametrize("profile", PROFILES, ids=lambda path: path.stem)
def test_profiles_on_postgresql_have_it(profile: Path) -> None:
    rendered = render(profile=profile)
    assert bool(rendered.all("Job")) == (not rendered.all("PersistentVolumeClaim"))


def test_what_it_runs_migrates_a_store_and_does_so_again(tmp_path: Path) -> None:
    container = render(values=POSTGRESQL).one("Job")["spec"]["template"]["spec"]["containers"][0]
    program, *arguments = container["command"]
    assert program == "python"
    url = f"sqlite+aiosqlite:///{tmp_path}/store.db"
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, *arguments],
            env={**os.environ, "EXPERTMESH_STORE_URL": url},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert "newest schema" in done.stdout
    with closing(sqlite3.connect(tmp_path / "store.db")) as store:
        tables = {name for (name,) in store.execute("SELECT name FROM sqlite_master")}
    assert len(tables) > 3


def test_a_store_out_of_reach_fails_the_upgrade() -> None:
    container = render(values=POSTGRESQL).one("Job")["spec"]["template"]["spec"]["containers"][0]
    done = subprocess.run(
        [sys.executable, *container["command"][1:]],
        env={**os.environ, "EXPERTMESH_STORE_URL": "postgresql+asyncpg://em:secret@127.0.0.1:1/em"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode != 0
    assert "SetupError" in done.stderr or "UpstreamUnavailable" in done.stderr
