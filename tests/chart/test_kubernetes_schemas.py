"""Every object against Kubernetes' own strict schemas, of each version that the chart is for."""

import copy
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate.utils  # type: ignore[import-untyped]
import pytest
import yaml
from tests.chart.rendering import CHART, EVERYTHING, PROFILES, Rendered, render

pytestmark = pytest.mark.integration

VERSIONS = tuple(f"1.{minor}" for minor in range(30, 37))
CASES = ("defaults", "everything", *(profile.stem for profile in PROFILES))
OF_OPERATORS = {"RayCluster", "ServiceMonitor", "PodMonitor", "PrometheusRule", "HTTPRoute"}
"""Their schemas are elsewhere: for a RayCluster in raycluster.schema.json."""
SINCE = {"gb200-nvl72": "1.32"}
"""Devices by claims (DRA) have had another form before."""


@pytest.fixture(scope="module", autouse=True)
def schemas_are_read_once() -> Iterator[None]:
    """Else the definitions of a version, some megabytes, are read anew for each object."""
    with pytest.MonkeyPatch.context() as patch:
        module = kubernetes_validate.utils
        patch.setattr(module, "schema_contents", cache(module.schema_contents))
        yield


@cache
def rendered(case: str) -> Rendered:
    if case == "everything":
        return render(values=EVERYTHING)
    profiles: dict[str, Path] = {profile.stem: profile for profile in PROFILES}
    return render(profile=profiles.get(case))


def checked_objects(rendered: Rendered) -> list[dict[str, Any]]:
    """Those of Kubernetes itself, and the pod templates of the RayCluster as what they become."""
    pods = [
        {"apiVersion": "v1", "kind": "Pod", **copy.deepcopy(template)}
        for where, template in rendered.pod_templates().items()
        if where.startswith("Ray")
    ]
    return [*(each for each in rendered.objects if each["kind"] not in OF_OPERATORS), *pods]


@pytest.mark.parametrize(
    ("case", "version"),
    [
        (case, version)
        for case in CASES
        for version in VERSIONS
        if version >= SINCE.get(case, VERSIONS[0])
    ],
)
def test_every_object_is_valid(case: str, version: str) -> None:
    check(rendered(case), version)


@pytest.mark.parametrize("part", EVERYTHING)
def test_each_part_that_is_off_by_default_is_valid_alone(part: str) -> None:
    check(render(values={part: EVERYTHING[part]}), VERSIONS[-1])


@pytest.mark.parametrize("profile", PROFILES, ids=lambda path: path.stem)
def test_every_part_goes_with_every_profile(profile: Path) -> None:
    check(render(profile=profile, values=EVERYTHING), VERSIONS[-1])


def check(rendered: Rendered, version: str) -> None:
    for each in checked_objects(rendered):
        try:
            used = kubernetes_validate.validate(each, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            place = "/".join(map(str, error.path))
            raise AssertionError(f"{each['kind']} {place}: {error.message}") from None
        assert used == version


def test_no_object_asks_for_an_operator_unless_it_is_chosen() -> None:
    kinds = {each["kind"] for each in render().objects}
    assert kinds & OF_OPERATORS == {"RayCluster"}
    assert "HorizontalPodAutoscaler" not in kinds


def test_everything_is_rendered_when_it_is_chosen() -> None:
    kinds = {each["kind"] for each in render(values=EVERYTHING).objects}
    assert kinds >= OF_OPERATORS - {"PrometheusRule"} | {
        "HorizontalPodAutoscaler", "Ingress", "Job", "NetworkPolicy", "PodDisruptionBudget",
        "PersistentVolumeClaim", "StatefulSet",
    }  # fmt: skip


def test_the_chart_asks_for_the_versions_that_are_checked() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["kubeVersion"] == f">={VERSIONS[0]}.0-0"


@pytest.mark.parametrize(
    "break_it",
    [
        lambda spec: spec["containers"][0].update(imagePullPolicey="Always"),
        lambda spec: spec["containers"][0]["env"].append({"name": "A", "value": 1}),
        lambda spec: spec.update(terminationGracePeriodSeconds="30"),
        lambda spec: spec.pop("containers"),
    ],
    ids=["an unknown key", "a number as a variable", "a string as a number", "no containers"],
)
def test_the_check_finds_mistakes(break_it: Any) -> None:
    deployment = copy.deepcopy(render().one("Deployment", "-controller"))
    break_it(deployment["spec"]["template"]["spec"])
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(deployment, VERSIONS[-1], strict=True)
