"""The RayCluster against KubeRay's own definition, where one is at hand, and ours against it.

KubeRay's text is not in this repository. Let EXPERTMESH_KUBERAY_CRD name its file
`ray.io_rayclusters.yaml` of the version that you run; without it, raycluster.schema.json alone
counts.
"""

import json
import os
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from tests.chart.closed_schema import closed_schema
from tests.chart.rendering import EVERYTHING, PROFILES, render

pytestmark = pytest.mark.integration

GIVEN = os.environ.get("EXPERTMESH_KUBERAY_CRD", "")
OURS = json.loads(Path(__file__).with_name("raycluster.schema.json").read_text())
with_kuberay = pytest.mark.skipif(not GIVEN, reason="EXPERTMESH_KUBERAY_CRD names no file")

Json = dict[str, Any]
SMALL: Json = yaml.safe_load("""
spec:
  versions:
    - name: v1alpha1
      schema: {openAPIV3Schema: {type: object, properties: {spec: {type: string}}}}
    - name: v1
      schema:
        openAPIV3Schema:
          type: object
          properties:
            metadata: {type: object, properties: {name: {type: string}}}
            status: {type: object, properties: {state: {type: string}}}
            spec:
              type: object
              required: [size]
              properties:
                size: {type: integer, format: int32}
                mode: {type: string, enum: [a, b]}
                until: {type: string, nullable: true}
                free:
                  type: object
                  x-kubernetes-preserve-unknown-fields: true
                  properties: {x: {type: string}}
                labels: {type: object, additionalProperties: {type: string}}
                groups:
                  type: array
                  x-kubernetes-list-type: atomic
                  items:
                    type: object
                    properties:
                      cpu:
                        anyOf: [{type: integer}, {type: string}]
                        pattern: ^[0-9]+m?$
                        x-kubernetes-int-or-string: true
""")


def takes(spec: Json) -> bool:
    body = {"metadata": {"name": "a", "labels": {}}, "spec": spec}
    return bool(jsonschema.Draft202012Validator(closed_schema(SMALL, "v1")).is_valid(body))


@pytest.mark.parametrize(
    ("spec", "good"),
    [
        ({"size": 1}, True),
        ({}, False),
        ({"size": "1"}, False),
        ({"size": 1, "sise": 1}, False),
        ({"size": 1, "mode": "c"}, False),
        ({"size": 1, "until": None}, True),
        ({"size": None}, False),
        ({"size": 1, "free": {"anything": 1}}, True),
        ({"size": 1, "labels": {"a": "b"}}, True),
        ({"size": 1, "labels": {"a": 1}}, False),
        ({"size": 1, "groups": [{"cpu": "500m"}, {"cpu": 1}]}, True),
        ({"size": 1, "groups": [{"cpu": "half"}]}, False),
        ({"size": 1, "groups": [{"cpus": 1}]}, False),
    ],
)
def test_a_closed_schema_takes_what_the_definition_names(spec: Json, good: bool) -> None:
    assert takes(spec) is good


def test_a_status_is_the_operator_s() -> None:
    body = {"spec": {"size": 1}, "status": {"state": "ready"}}
    assert not jsonschema.Draft202012Validator(closed_schema(SMALL, "v1")).is_valid(body)


def kuberay() -> Json:
    return closed_schema(yaml.load(Path(GIVEN).read_text(), yaml.CSafeLoader), "v1")


@with_kuberay
def test_kuberay_knows_every_field_of_the_rendered_clusters() -> None:
    validator = jsonschema.Draft202012Validator(kuberay())
    rendered = [render(), render(values=EVERYTHING), *(render(profile=each) for each in PROFILES)]
    for each in rendered:
        validator.validate(each.one("RayCluster"))


@with_kuberay
def test_our_schema_names_no_field_that_kuberay_does_not_know() -> None:
    unknown = []

    def visit(path: str, own: Json, theirs: Json) -> None:
        reference = own.get("$ref", "").rpartition("/")[2]
        own = OURS["$defs"][reference] if reference else own
        for name, inner in own.get("properties", {}).items():
            if name not in theirs.get("properties", {}):
                unknown.append(f"{path}.{name}")
            else:
                visit(f"{path}.{name}", inner, theirs["properties"][name])
        if "items" in own and "items" in theirs:
            visit(f"{path}[]", own["items"], theirs["items"])

    visit("", OURS["properties"]["spec"], kuberay()["properties"]["spec"])
    assert unknown == []
