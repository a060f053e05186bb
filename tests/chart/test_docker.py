"""The images are built elsewhere; here, what their Dockerfiles name must exist."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.specifiers import SpecifierSet
from tests.chart.rendering import CHART, REPOSITORY, effective_values, render

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
    dockerfile = read(DOCKER / "Dockerfile.ray")
    bases = dict(arg.split("=") for arg in dockerfile.all("ARG") if "IMAGE" in arg)
    assert set(bases) == {"RAY_LLM_IMAGE", "RAY_IMAGE"}
    versions = {
        re.fullmatch(r"rayproject/ray(?:-llm)?:(\d+\.\d+\.\d+)-\S+", base)[1]  # type: ignore[index]
        for base in bases.values()
    }
    (version,) = versions
    assert f"ray[serve]=={version}" in project()["optional-dependencies"]["serve"]
    assert effective_values()["ray"]["version"] == version
    checks = re.findall(r"assert [^;]*", " ".join(dockerfile.all("RUN")))
    assert len(checks) == 2 and all(f"'{version}'" in check for check in checks)
    (vllm,) = (each for each in project()["optional-dependencies"]["gpu"] if "vllm" in each)
    assert f"'{vllm.partition('==')[2]}'" in checks[1]


def test_a_dockerfile_s_list_is_no_narrower_than_the_other_builders(path: Path) -> None:
    def entries(file: Path) -> list[str]:
        return [line for line in file.read_text().splitlines() if not line.startswith("#")]

    own = entries(path.with_name(f"{path.name}.dockerignore"))
    assert own == entries(REPOSITORY / ".dockerignore")
    assert own[0] == "*"


def test_hadolint_finds_nothing(path: Path) -> None:
    labels = ("title", "description", "licenses", "version", "revision")
    required = [f"--require-label=org.opencontainers.image.{label}:text" for label in labels]
    program = Path(sys.executable).with_name("hadolint")
    done = subprocess.run(
        [program, "--no-color", "--strict-labels", *required, path],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_hadolint_is_able_to_find_something(tmp_path: Path) -> None:
    wrong = tmp_path / "Dockerfile"
    wrong.write_text("FROM python\nRUN pip install expertmesh\n")
    program = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([program, "--no-color", wrong], capture_output=True, text=True)
    assert done.returncode != 0
    assert "DL3006" in done.stdout


def test_no_image_runs_as_root(path: Path) -> None:
    """By number, as Kubernetes' runAsNonRoot cannot look a name up."""
    stages = path.read_text().split("\nFROM ")[1:]
    runs = [stage for stage in stages if "ENTRYPOINT" in stage or "ray" in path.name]
    assert runs
    for stage in runs:
        *_, last = re.findall(r"^USER (\S+)$", stage, re.MULTILINE)
        assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", last)


def test_ray_s_pods_run_as_the_images_user() -> None:
    values = effective_values()["ray"]
    users = {read(DOCKER / "Dockerfile.ray").all("USER")[-1]}
    for pods in (values["head"], values["workerDefaults"]):
        security = pods["podSecurityContext"]
        users.add(f"{security['runAsUser']}:{security['runAsGroup']}")
    assert users == {"1000:100"}


def test_every_base_image_has_a_version(path: Path) -> None:
    bases = [arg.split("=", 1)[1] for arg in read(path).all("ARG") if "IMAGE=" in arg]
    assert bases
    assert all(re.search(r":\d", base) for base in bases)


def test_every_base_image_has_a_python_that_the_project_takes(path: Path) -> None:
    wanted = SpecifierSet(project()["requires-python"])
    bases = [arg.split("=", 1)[1] for arg in read(path).all("ARG") if "IMAGE=" in arg]
    for base in bases:
        name, _, tag = base.partition(":")
        if name == "python":
            found = re.match(r"(\d)\.(\d+)", tag)
        else:
            found = re.search(r"-py(\d)(\d+)-", tag)
        assert found is not None, base
        assert f"{found[1]}.{found[2]}" in wanted, base


def test_a_base_image_is_an_argument_of_the_build(path: Path) -> None:
    """So that a release may pin it: its digest stands behind the tag."""
    dockerfile = read(path)
    names = {arg.split("=")[0] for arg in dockerfile.all("ARG") if "IMAGE=" in arg}
    used = {rest.split()[0] for rest in dockerfile.all("FROM")}
    assert used == {f"${{{name}}}" for name in names}
    # Docker's ARG before the first FROM counts there alone.
    first = next(n for n, (name, _) in enumerate(dockerfile.instructions) if name == "FROM")
    early = {rest.split("=")[0] for name, rest in dockerfile.instructions[:first] if name == "ARG"}
    assert names <= early


def copied_context(path: Path, folder: Path) -> None:
    """What the builder sees of the repository up to the installation."""
    for source in read(path).copied_sources():
        target = folder / source
        target.parent.mkdir(parents=True, exist_ok=True)
        if (REPOSITORY / source).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(REPOSITORY / source, target, ignore=ignored)
        else:
            shutil.copy(REPOSITORY / source, target)


@pytest.mark.slow
@pytest.mark.integration
def test_the_gateway_image_s_installation_runs_what_the_chart_starts(tmp_path: Path) -> None:
    """The Dockerfile's own pip command in a clean environment, by uv: it takes the same arguments,
    and links what the set-up has fetched instead of fetching it again."""
    path = DOCKER / "Dockerfile.gateway"
    copied_context(path, tmp_path)
    (install,) = (run for run in read(path).all("RUN") if "pip install" in run)
    words = shlex.split(install.split("&&")[1])
    environment = tmp_path / "venv"
    assert words[:3] == ["/opt/expertmesh/venv/bin/pip", "install", "--no-cache-dir"]
    # uv does not read pip's settings.
    links = [f"--find-links={place}" for place in os.environ.get("PIP_FIND_LINKS", "").split()]

    def uv(*arguments: str | Path) -> str:
        done = subprocess.run(
            [Path(sys.executable).with_name("uv"), *arguments],
            cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    uv("venv", "--python", sys.executable, environment)
    python = environment / "bin/python"
    uv("pip", "install", "--python", python, *links, *words[3:])
    clean = {"PATH": f"{environment}/bin:/usr/bin:/bin", "HOME": str(tmp_path)}

    def run(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [environment / "bin" / command[0], *command[1:]],
            cwd=tmp_path, env={**clean, **variables}, capture_output=True, text=True,
            timeout=120, check=False,
        )  # fmt: skip

    installed = uv("pip", "freeze", "--python", python).lower()
    pinned = (REPOSITORY / "requirements" / "platform.txt").read_text().lower()
    for name in ("sqlalchemy", "asyncpg", "redis"):
        (line,) = (each for each in pinned.splitlines() if each.startswith(f"{name}=="))
        assert line in installed.splitlines()
    for name in ("ray", "torch", "vllm", "transformers", "numpy"):
        assert f"\n{name}==" not in installed
    for name in ("gateway", "controller"):
        container = rendered_container(name)
        shown = run(*container["command"], container["args"][0], "--help", COLUMNS="200")
        assert shown.returncode == 0, shown.stderr
        for option in (each for each in container["args"] if each.startswith("-")):
            assert option in shown.stdout
    store = f"sqlite+aiosqlite:///{tmp_path}/store.db"
    migrated = run(*rendered_container("migrations")["command"], EXPERTMESH_STORE_URL=store)
    assert migrated.returncode == 0, migrated.stderr
    made = run("expertmesh", "keys", "create", "--tenant", "trial", EXPERTMESH_STORE_URL=store)
    assert made.returncode == 0, made.stderr
    # What the controller imports only where it is asked for.
    imports = "import expertmesh.launch.kubernetes, expertmesh.launch.gateway_workers, redis"
    assert run("python", "-c", imports).returncode == 0


def rendered_container(name: str) -> dict[str, Any]:
    rendered = render(values={"store.existingSecret": "expertmesh-store"})
    kind = "Job" if name == "migrations" else "Deployment"
    container: dict[str, Any] = rendered.one(kind, f"-{name}")["spec"]["template"]["spec"][
        "containers"
    ][0]
    return container


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
