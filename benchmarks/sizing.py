"""What the models of deployments/ need on rented GPUs, by the planner.

python -m benchmarks.sizing [--write-docs]
"""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from benchmarks.figures import Figure, Row, show, write_block
from rich.console import Console
from typer.testing import CliRunner

from expertmesh.cli.main import app
from expertmesh.errors import SetupError
from expertmesh.spec.deployment import DeploymentManifest
from expertmesh.spec.load import read_manifests

REPOSITORY = Path(__file__).parents[1]
DEPLOYMENTS = REPOSITORY / "deployments"
DOCUMENT = REPOSITORY / "docs" / "operations.md"
BLOCK = "sizing"
GPUS = ("H100", "H200", "B200")
_COLUMNS = (
    "model",
    "GPU",
    "group",
    "GPUs",
    "nodes",
    "users",
    "tokens/s",
    "$/h",
    "$/Mtok out",
    "starts in s",
)


def planned_files(folder: Path = DEPLOYMENTS) -> tuple[Path, ...]:
    """The manifests of models that run on GPUs: in pools that are no processes of one machine."""
    files = []
    for file in sorted(folder.glob("*.yaml")):
        models = [m for m in read_manifests(file) if isinstance(m, DeploymentManifest)]
        # A model in a local folder is this repository's own, for the CPU.
        if any(m.pools and m.local_source(file.parent) is None for m in models):
            files.append(file)
    return tuple(files)


def plans(files: tuple[Path, ...]) -> list[dict[str, Any]]:
    """As `expertmesh plan FILE… --pool … --json` answers. Raises SetupError."""
    arguments = ["plan", *map(str, files), "--json"]
    for gpu in GPUS:
        arguments += ["--pool", gpu]
    result = CliRunner().invoke(app, arguments)
    # 1: some model fits in none of the pools, which the table then says.
    if result.exit_code not in (0, 1):
        raise SetupError(f"expertmesh plan: ended with {result.exit_code}: {result.stderr.strip()}")
    answers: list[dict[str, Any]] = json.loads(result.stdout)["plans"]
    return answers


def sizing_figure(answers: list[dict[str, Any]]) -> Figure:
    rows, named = [], set()
    for answer in answers:
        model = answer["model"]
        rows.append(("" if model in named else model, *_cells(answer)))
        named.add(model)
    prices = {
        answer["pool"]["name"]: (
            f"{answer['pool']['name']} {answer['pool']['usd_per_gpu_hour']:.2f} "
            f"({answer['pool']['price_note']})"
        )
        for answer in answers
    }
    return Figure(
        "One group of each model of `deployments/`",
        _COLUMNS,
        tuple(rows),
        (
            "Each manifest's own context, latency targets and cache format; requests of 2,000 "
            "tokens in and 500 out; nodes of eight GPUs; the cheapest group for a token.",
            "`users`: requests at once within the targets. Ranges: where four in five published "
            "measurements lie around the prediction. `starts in s`: on nodes that are there, with "
            "weights read at 2 GB/s a node.",
            f"Dollars an hour of a GPU, on demand: {', '.join(prices.values())}.",
        ),
    )


def _cells(answer: dict[str, Any]) -> Row:
    gpu = answer["pool"]["name"]
    if not answer["fits"]:
        return (gpu, "does not fit", *("-" for _ in _COLUMNS[3:]))
    group, option = answer["groups"][0], answer["options"]
    starts = f"{option[0]['start_s']:.0f}" if option else "-"
    return (
        gpu,
        _layout(group),
        str(group["gpus"]),
        str(group["nodes"]),
        f"{group['users']:,}",
        _span(answer["tokens_per_s"], ",.0f", 100),
        f"{answer['usd_per_hour']:.2f}",
        _span(answer["usd_per_mtok_out"], ".2f"),
        starts,
    )


def _layout(group: dict[str, Any]) -> str:
    """In the words of `expertmesh plan`."""
    parts = [f"TP{group['tensor']}"]
    if group["data"] > 1:
        parts.append(f"DP{group['data']}")
    if group["expert"] > 1:
        parts.append(f"EP{group['expert']}")
    if group["redundant_experts"]:
        parts.append(f"+{group['redundant_experts']}")
    return " ".join(parts)


def _span(values: dict[str, float], form: str, step: float = 0.0) -> str:
    low, high = values["low"], values["high"]
    if step:
        low, high = round(low / step) * step, round(high / step) * step
    return f"{low:{form}}-{high:{form}}"


def main(
    write_docs: Annotated[
        bool, typer.Option("--write-docs", help="Write the table into docs/operations.md.")
    ] = False,
) -> None:
    figures = [sizing_figure(plans(planned_files()))]
    show(Console(width=140), figures)
    if write_docs:
        write_block(DOCUMENT, BLOCK, figures)


if __name__ == "__main__":
    typer.run(main)
