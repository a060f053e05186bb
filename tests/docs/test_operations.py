"""docs/operations.md names only commands, options, values, files and objects that exist."""

import functools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from benchmarks.sizing import DOCUMENT, planned_files, plans, sizing_figure
from tests.chart.rendering import CHART, render

from expertmesh.cli.main import app

REPOSITORY = Path(__file__).parents[2]
PAGE = (REPOSITORY / "docs" / "operations.md").read_text()
BLOCKS = re.findall(r"(?ms)^```(\w*)\n(.*?)^```$", PAGE)
PROSE = re.sub(r"(?ms)^```.*?^```$", "", PAGE)
INLINE = re.findall(r"`([^`\n]+)`", PROSE)
SHELL = "\n".join(text for language, text in BLOCKS if language in ("", "sh")).replace("\\\n", " ")

# The page's own words for `kubectl exec … -- expertmesh`.
_COMMAND = re.compile(r"(?:^|[\s(])(?:em|controller|expertmesh) +([a-z][^\n]*)")
_OTHER = re.compile(r"\s*(?:kubectl|helm|docker|kind|cp|pg_|psql)\b")
_PLACEHOLDERS = {"SEQ": "1"}
_OBJECT = re.compile(r"\b(deployment|statefulset|service|raycluster)/([a-z][a-z0-9-]*)")
_FILE = re.compile(r"(?<![\w./-])((?:helm|deployments|benchmarks|dashboards|docs)/[\w./-]*\w)")


def written_commands() -> Iterator[str]:
    """What follows `expertmesh`, without comments, pipes and redirections."""
    for line in SHELL.splitlines():
        typed = line.removeprefix("$ ")
        found = _COMMAND.search(typed)
        if found and "()" not in typed and not _OTHER.match(typed):
            yield re.split(r"\)?\s+[#|>&]|\)$", found[1])[0].strip()
    for text in INLINE:
        if found := re.fullmatch(r"(?:em|controller|expertmesh) ([a-z].*)", text):
            yield found[1]


def parse(text: str) -> list[str]:
    """Of one command line: what is wrong with it. Only the form counts, not whether files exist."""
    words = [_PLACEHOLDERS.get(word, word) for word in shlex.split(text)]
    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands"):
        child = command.commands.get(words[0]) if words else None
        if child is None:
            return [f"no command {words[0]!r}"] if words else ["a command is missing"]
        command, words = child, words[1:]
    try:
        command.make_context(command.name, list(words))
    except Exception as error:
        # A command may be named alone, without what it needs.
        if words or type(error).__name__ != "MissingParameter":
            return [f"{type(error).__name__}: {getattr(error, 'message', error)}"]
    return []


COMMANDS = sorted(set(written_commands()))


def test_the_page_shows_each_command_of_daily_work() -> None:
    first = {command.split()[0] for command in COMMANDS}
    wanted = {"controller", "explain", "gateway", "keys", "plan", "replay", "simulate", "status"}
    assert wanted | {"tenants", "up", "usage"} <= first
    assert len(COMMANDS) > 25


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_exists_with_its_options(command: str) -> None:
    assert parse(command) == []


@pytest.mark.parametrize(
    "command",
    [
        "statsu --once",
        "status --onze",
        "keys create --tenants acme",
        "keys delete ID",
        "controller -f a.yaml --lease zookeeper",
        "usage --by colour",
        "plan a b --users many",
    ],
)
def test_a_command_that_does_not_exist_is_found(command: str) -> None:
    assert parse(command) != []


# Values of the chart


@functools.cache
def values() -> dict[str, Any]:
    loaded = yaml.safe_load((CHART / "values.yaml").read_text())
    assert isinstance(loaded, dict)
    return loaded


def named_values(text: str) -> set[str]:
    """Dotted paths that begin as a value of the chart does; a metric or a file does not."""
    tops = "|".join(key for key in values() if key not in ("platform", "models"))
    path = rf"(?:{tops})(?:\.[A-Za-z][A-Za-z0-9]*)+"
    return {found for part in INLINE for found in re.findall(rf"^({path})(?=$|[:= ])", part)} | set(
        re.findall(rf"--set(?:-json)? ({path})=", text)
    )


def exists(path: str) -> bool:
    place: Any = values()
    for key in path.split("."):
        if not isinstance(place, dict) or key not in place:
            return False
        place = place[key]
    return True


def test_the_page_names_values() -> None:
    assert {"gateway.journal.persistent", "controller.spotNotices", "ray.redis.address"} <= (
        named_values(SHELL)
    )


@pytest.mark.parametrize("path", sorted(named_values(SHELL)))
def test_a_value_exists_in_the_chart(path: str) -> None:
    # A platform file has a part `gateway` too, which the page writes in the manifest's own form.
    assert exists(path), f"{path} is in no values.yaml; a key of the platform file: write platform."


def test_a_value_that_does_not_exist_is_found() -> None:
    assert not exists("gateway.journal.persistant")
    assert not exists("gateway.replicas.max")


# Targets, files, objects, sections


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"(?m)^([a-z-]+):", (REPOSITORY / "Makefile").read_text()))
    lines = [*INLINE, *SHELL.splitlines()]
    named = {m[1] for line in lines if (m := re.match(r"make ([a-z-]+)", line))}
    assert named
    assert named <= targets


def test_files_exist() -> None:
    named = set(_FILE.findall(SHELL)) | {f for text in INLINE for f in _FILE.findall(text)}
    assert "helm/expertmesh/profiles/kind-cpu.yaml" in named
    assert [name for name in sorted(named) if not (REPOSITORY / name).exists()] == []


def test_profiles_are_all_named() -> None:
    profiles = {file.stem for file in (CHART / "profiles").glob("*.yaml")}
    assert [name for name in sorted(profiles) if name not in PAGE] == []


@pytest.mark.integration
def test_objects_are_those_that_the_chart_renders() -> None:
    kinds = {"deployment", "statefulset", "service", "raycluster"}
    rendered = {
        (each["kind"].lower(), each["metadata"]["name"])
        for values in ({}, {"gateway.journal.persistent": True})
        for each in render(release="expertmesh", values=values).objects
        if each["kind"].lower() in kinds
    }
    named = set(_OBJECT.findall(PAGE))
    # KubeRay names the groups of nodes and its cluster by labels.
    cluster = {("raycluster", name) for name in re.findall(r"ray\.io/cluster=([\w-]+)", PAGE)}
    assert named
    assert named | cluster <= rendered


def test_links_lead_to_sections() -> None:
    headings = re.findall(r"(?m)^#+ (.+)$", re.sub(r"(?ms)^```.*?^```$", "", PAGE))
    anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    assert len(anchors) == len(headings)
    assert set(re.findall(r"\]\(#([\w-]+)\)", PROSE)) <= anchors


# The table of sizes


def test_the_table_has_every_model_that_needs_gpus() -> None:
    (table,) = re.findall(
        r"(?s)<!-- begin figures: sizing -->(.*)<!-- end figures: sizing -->", PAGE
    )
    models = set(re.findall(r"(?m)^\| ([a-z][\w-]*) \| H100", table))
    names = set()
    for file in planned_files():
        names |= {document["name"] for document in yaml.safe_load_all(file.read_text())}
    assert models == names
    assert len(re.findall(r"(?m)^\|[^|]*\| (?:H100|H200|B200) ", table)) == 3 * len(names)


def test_models_on_this_machine_or_at_providers_are_not_planned() -> None:
    planned = {file.stem for file in planned_files()}
    assert "qwen3-235b-a22b" in planned
    assert not {"tiny-moe", "qwen2-5-max", "local", "platform.example"} & planned


def test_the_table_is_what_the_planner_says() -> None:
    (file,) = (each for each in planned_files() if each.stem == "qwen2-5-72b")
    figure = sizing_figure(plans((file,)))
    model, gpu, *rest = figure.rows[0]
    assert (model, gpu, len(figure.rows)) == ("qwen2-5-72b", "H100", 3)
    assert f"| {model} | {gpu} | {' | '.join(rest)} |" in DOCUMENT.read_text()


def test_what_does_not_fit_is_said() -> None:
    pool = {"name": "L4", "usd_per_gpu_hour": 0.7, "price_note": "somebody"}
    figure = sizing_figure([{"model": "large", "pool": pool, "fits": False}])
    assert figure.rows == (("large", "L4", "does not fit", *"-------"),)
    assert len(figure.rows[0]) == len(figure.columns)
