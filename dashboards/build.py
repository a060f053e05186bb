"""Write the dashboards' JSON: `python -m dashboards.build` in the repository root."""

import sys
from pathlib import Path

from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard

from dashboards import overview

GENERATED = Path(__file__).parent / "generated"


def dashboards() -> dict[str, Dashboard]:
    """By file name, without its ending."""
    return {"overview": overview.build()}


def to_json(dashboard: Dashboard) -> str:
    return str(JSONEncoder(sort_keys=True, indent=2).encode(dashboard)) + "\n"


def main() -> None:
    GENERATED.mkdir(exist_ok=True)
    for name, dashboard in dashboards().items():
        path = GENERATED / f"{name}.json"
        path.write_text(to_json(dashboard))
        sys.stdout.write(f"wrote {path.relative_to(Path.cwd())}\n")


if __name__ == "__main__":
    main()
