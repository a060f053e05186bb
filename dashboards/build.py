"""Write dashboards and rules: `python -m dashboards.build` in the repository root."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard

from dashboards import alerts, autoscaler, cost, experts, gateway, group, latency, overview

GENERATED = Path(__file__).parent / "generated"
CHART = Path(__file__).parents[1] / "helm" / "expertmesh" / "files"
"""The chart may only read files of its own folder: these are copies."""


def dashboards() -> dict[str, Dashboard]:
    """By file name, without its ending."""
    boards = (overview, cost, latency, autoscaler, experts, gateway, group)
    return {board.__name__.rpartition(".")[2]: board.build() for board in boards}


def to_json(dashboard: Dashboard) -> str:
    return str(JSONEncoder(sort_keys=True, indent=2).encode(dashboard)) + "\n"


def rules_text(runbooks: str = alerts.RUNBOOKS) -> str:
    text: str = yaml.safe_dump(alerts.rules(runbooks), sort_keys=False, width=100)
    return f"# Written by python -m dashboards.build; change dashboards/alerts.py.\n{text}"


def files(runbooks: str = alerts.RUNBOOKS) -> dict[Path, str]:
    """All that is written, with the copies. `runbooks`: the page to whose sections alerts lead."""
    made = {f"{name}.json": to_json(board) for name, board in dashboards().items()}
    written = {GENERATED / name: text for name, text in made.items()}
    written |= {CHART / "dashboards" / name: text for name, text in made.items()}
    written |= {folder / "alerts.yaml": rules_text(runbooks) for folder in (GENERATED, CHART)}
    return written


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--runbooks",
        metavar="URL",
        default=alerts.RUNBOOKS,
        help="the page to whose sections alerts lead, by default %(default)s",
    )
    options = parser.parse_args(arguments)
    for path, text in files(options.runbooks).items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        sys.stdout.write(f"wrote {path.relative_to(Path.cwd())}\n")


if __name__ == "__main__":
    main()
