"""What a local system hands to its gateway; that it runs is for the integration tests."""

from pathlib import Path

import pytest
import typer

from expertmesh.cli.gateway import gateway as gateway_command
from expertmesh.launch.local import LocalSystem
from expertmesh.spec.load import load_system

PLATFORM = """
kind: Platform
name: here
pools:
  - {name: small, market: local, usd_per_node_hour: 0.3, nodes: {min: 2, max: 2}}
gateway: {port: 9000, workers: 3}
"""
MODEL = """
kind: ModelDeployment
name: tiny
model: {source: someone/tiny-moe, max_model_len: 1024}
parallelism: {expert: 2}
pools: [small]
"""


@pytest.fixture
def local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalSystem:
    monkeypatch.chdir(tmp_path)
    files = [Path("tiny.yaml"), Path("platform.yaml")]
    files[0].write_text(MODEL)
    files[1].write_text(PLATFORM)
    return LocalSystem(load_system(files), files, print)


def test_the_gateway_gets_the_platform_file_a_folder_and_its_workers(local: LocalSystem) -> None:
    arguments = local.gateway_arguments
    given = dict(zip(arguments[::2], arguments[1::2], strict=True))
    assert given == {
        "--controller-url": "http://127.0.0.1:8090",
        "--host": "127.0.0.1",
        "--port": "9000",
        "--config": str(Path.cwd() / "platform.yaml"),
        "--state-dir": str(Path.cwd() / ".expertmesh" / "here" / "gateway"),
        "--workers": "3",
        "--allow-origin": "http://127.0.0.1:8090",
    }
    app = typer.Typer()
    app.command()(gateway_command)
    known = {option for each in typer.main.get_command(app).params for option in each.opts}
    assert given.keys() <= known


def test_the_gateway_s_folder_exists_before_it_starts(local: LocalSystem) -> None:
    local.state.create()
    assert local.state.gateway.is_dir()
    assert local.state.logs.is_dir()
