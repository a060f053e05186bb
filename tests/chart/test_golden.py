"""A few renders as they are committed, so that a change of the chart shows what it changes.

Run `EXPERTMESH_WRITE_GOLDEN=1 python -m pytest tests/chart/test_golden.py` after a wanted change.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.chart.rendering import CHART, EVERYTHING, Rendered, render

pytestmark = pytest.mark.integration

GOLDEN = Path(__file__).parent / "golden"


def index(rendered: Rendered) -> list[str]:
    """Every object that exists."""
    return sorted(f"{each['kind']} {each['metadata']['name']}" for each in rendered.objects)


def controller(rendered: Rendered) -> dict[str, Any]:
    spec: dict[str, Any] = rendered.one("Deployment", "-controller")["spec"]
    del spec["template"]["metadata"]["annotations"]  # checksums
    return spec


def worker_groups(rendered: Rendered) -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = rendered.one("RayCluster")["spec"]["workerGroupSpecs"]
    return groups


NO_FILES = {"monitoring.dashboards.enabled": False}
"""Dashboards have tests and files of their own."""
CASES: dict[str, Callable[[], Any]] = {
    "objects-defaults": lambda: index(render()),
    "objects-everything": lambda: index(render(values={**EVERYTHING, **NO_FILES})),
    "controller-defaults": lambda: controller(render()),
    "workers-eks-spot": lambda: worker_groups(render(profile=CHART / "profiles/eks-spot.yaml")),
}


@pytest.mark.parametrize("name", CASES)
def test_a_render_is_the_committed_one(name: str) -> None:
    file = GOLDEN / f"{name}.yaml"
    text = yaml.safe_dump(CASES[name](), sort_keys=True, width=120)
    if os.environ.get("EXPERTMESH_WRITE_GOLDEN") == "1":
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    assert text == file.read_text(), f"{file.name}: if this is wanted, write the files again"
