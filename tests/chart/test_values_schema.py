import json
from typing import Any

import jsonschema
import yaml
from helm.generate_reference import REFERENCE_FILE, render_reference
from helm.generate_schema import SCHEMA_FILE, build_schema, render_schema
from tests.chart.rendering import CHART, REPOSITORY, effective_values


def test_the_committed_schema_is_the_generated_one() -> None:
    assert SCHEMA_FILE.read_text() == render_schema(), "run: python -m helm.generate_schema"


def test_the_committed_reference_is_the_generated_one() -> None:
    assert REFERENCE_FILE.read_text() == render_reference(), (
        "run: python -m helm.generate_reference"
    )


def test_the_reference_tells_of_every_value() -> None:
    text = render_reference()

    def visit(path: str, value: object) -> list[str]:
        if path in ("platform", "models") or not isinstance(value, dict) or not value:
            return [path]
        return [each for key in value for each in visit(f"{path}.{key}", value[key])]

    # Of a map, its own keys need no line.
    paths = [each for key, value in effective_values().items() for each in visit(key, value)]
    missing = [
        path
        for path in paths
        if f"`{path}." not in text
        and not any(f"`{part}`" in text or f"## {part}\n" in text for part in _and_parents(path))
    ]
    assert missing == []


def _and_parents(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:count]) for count in range(len(parts), 1, -1)] or [path]


def test_every_object_with_known_keys_is_closed() -> None:
    open_objects = []

    def visit(path: str, node: object) -> None:
        if isinstance(node, dict):
            if "properties" in node and node.get("additionalProperties") is not False:
                open_objects.append(path)
            for key, value in node.items():
                visit(f"{path}/{key}", value)

    visit("", build_schema())
    assert open_objects == []


def test_every_reference_stays_inside_the_schema() -> None:
    schema = build_schema()
    text = json.dumps(schema)
    references = {part.split('"')[0] for part in text.split('"$ref": "')[1:]}
    assert references
    assert references <= {f"#/$defs/{name}" for name in schema["$defs"]}


def test_the_defaults_fit_the_schema() -> None:
    jsonschema.Draft202012Validator(build_schema()).validate(effective_values())


def test_values_yaml_spells_out_every_key_of_the_chart() -> None:
    """A key that only the schema knows would be one that nobody finds."""
    schema = build_schema()
    missing = []

    def visit(path: str, node: dict[str, Any], values: object) -> None:
        if "$ref" in node:
            node = schema["$defs"][node["$ref"].rsplit("/", 1)[1]]
        for key, inner in node.get("properties", {}).items():
            if path in (".platform", ".models"):
                continue
            if not isinstance(values, dict) or key not in values:
                missing.append(f"{path}.{key}")
            else:
                visit(f"{path}.{key}", inner, values[key])

    visit("", schema, effective_values())
    optional_of_pods = {
        "affinity", "annotations", "env", "labels", "nodeSelector", "tolerations", "volumes",
        "volumeMounts", "idleTimeoutSeconds", "image", "podSpec",
        "spotTerminationGracePeriodSeconds",
    }  # fmt: skip
    assert [
        key
        for key in missing
        if not (key.startswith(".ray.") and key.rsplit(".", 1)[1] in optional_of_pods)
        and not key.endswith((".requests", ".limits", ".claims"))
        and not key.startswith((".gateway.httpRoute.timeouts.", ".ray.workerDefaults.podSpec."))
    ] == []


def test_the_default_model_is_the_repository_s_own_manifest() -> None:
    manifest = yaml.safe_load((REPOSITORY / "deployments" / "tiny-moe.yaml").read_text())
    assert effective_values()["models"] == [manifest]
    assert (CHART / "Chart.yaml").exists()
