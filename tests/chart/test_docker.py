"""The images are built elsewhere; here, what their Dockerfiles name must exist."""

import re
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.chart.rendering import CHART, REPOSITORY, effective_values

DOCKER = REPOSITORY / "deployments" / "docker"
DOCKERFILES = tuple(
    sorted(each for each in DOCKER.glob("Dockerfile.*") if each.suffix != ".dockerignore")
)


@dataclass(frozen=True, slots=True)
class Dockerfile:
    instructions: tuple[tuple[str, str], ...]

    def all(self, instruction: str) -> tuple[str, ...]:
        return tuple(rest for name, rest in self.instructions if name == instruction)

    def copied_sources(self) -> tuple[str, ...]:
        """Paths of the build context; what comes from an earlier stage is not among them."""
        sources: list[str] = []
        for rest in self.all("COPY"):
            words = rest.split()
            if any(word.startswith("--from=") for word in words):
                continue
            paths = [word for word in words if not word.startswith("--")]
            sources += paths[:-1]
        return tuple(sources)


def read(path: Path) -> Dockerfile:
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    text = "\n".join(lines).replace("\\\n", " ")
    parts = (line.split(maxsplit=1) for line in text.splitlines() if line.strip())
    return Dockerfile(tuple((name, rest) for name, rest in parts))


def project() -> dict[str, Any]:
    loaded: dict[str, Any] = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    return loaded


@pytest.fixture(params=DOCKERFILES, ids=lambda path: path.name)
def path(request: pytest.FixtureRequest) -> Path:
    chosen: Path = request.param
    return chosen


def test_both_images_are_here() -> None:
    assert [each.name for each in DOCKERFILES] == ["Dockerfile.gateway", "Dockerfile.ray"]


def test_every_copied_path_exists_and_is_sent_to_the_builder(path: Path) -> None:
    sources = read(path).copied_sources()
    assert sources
    allowed = [
        line[1:]
        for line in path.with_name(f"{path.name}.dockerignore").read_text().splitlines()
        if line.startswith("!")
    ]
    for source in sources:
        assert (REPOSITORY / source).exists(), f"{path.name}: COPY {source}: no such path"
        assert any(source == each or source.startswith(f"{each}/") for each in allowed), source


def test_every_extra_is_one_of_the_project(path: Path) -> None:
    extras = {
        extra
        for run in read(path).all("RUN")
        for group in re.findall(r'"\.\[([\w,]+)\]"', run)
        for extra in group.split(",")
    }
    assert extras
    assert extras <= project()["optional-dependencies"].keys()


def test_the_entry_point_is_the_project_s_command() -> None:
    (entry,) = read(DOCKER / "Dockerfile.gateway").all("ENTRYPOINT")
    (command,) = yaml.safe_load(entry)
    assert command in project()["scripts"]
    module, _, attribute = project()["scripts"][command].partition(":")
    assert module.startswith("expertmesh.cli.")
    assert attribute


def test_the_gateway_image_is_slim_and_runs_as_the_chart_s_user() -> None:
    dockerfile = read(DOCKER / "Dockerfile.gateway")
    assert dockerfile.all("USER")[-1] == "10001:10001"
    templates = (CHART / "templates" / "_helpers.tpl").read_text()
    assert "runAsUser: 10001" in templates
    installs = " ".join(dockerfile.all("RUN"))
    assert '".[gateway,controller,redis,traces]"' in installs
    (workdir,) = dockerfile.all("WORKDIR")[-1:]
    assert f"sqlite+aiosqlite:///{workdir}/store.db" in templates


def test_ray_s_version_is_the_same_everywhere() -> None:
    (base,) = (arg for arg in read(DOCKER / "Dockerfile.ray").all("ARG") if "BASE_IMAGE" in arg)
    (version,) = re.findall(r"^BASE_IMAGE=rayproject/ray:(\d+\.\d+\.\d+)-", base)
    assert f"ray[serve]=={version}" in project()["optional-dependencies"]["serve"]
    assert effective_values()["ray"]["version"] == version


def test_the_default_model_stands_where_its_manifest_looks_for_it(path: Path) -> None:
    """The chart mounts the manifests at /opt/expertmesh/deployments."""
    source = effective_values()["models"][0]["model"]["source"]
    assert source == "../models/tiny-qwen3-moe"
    target = read(path).all("COPY")[-1].split()[-1]
    workdir = (read(path).all("WORKDIR") or ("/",))[-1]
    assert str(Path(workdir) / target) == "/opt/expertmesh/models/tiny-qwen3-moe"


def test_the_gateway_image_s_commands_need_nothing_that_it_lacks() -> None:
    """As the slim image would, without the packages of the other extras."""
    program = """
import sys
for name in ("anthropic", "numpy", "openai", "ray", "torch", "transformers", "vllm"):
    sys.modules[name] = None
from typer.testing import CliRunner
from expertmesh.cli.main import app
for command in ("gateway", "controller", "keys"):
    result = CliRunner().invoke(app, [command, "--help"])
    assert result.exit_code == 0, (command, result.output, result.exception)
import expertmesh.launch.gateway, expertmesh.launch.controller
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
