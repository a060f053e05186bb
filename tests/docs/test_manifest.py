"""docs/manifest.md describes every key of the manifests as the models that read them do."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from expertmesh.spec.deployment import DeploymentManifest
from expertmesh.spec.platform import PlatformManifest

PAGE = Path(__file__).parents[2] / "docs/manifest.md"
MODELS: dict[str, type[BaseModel]] = {
    "ModelDeployment": DeploymentManifest,
    "Platform": PlatformManifest,
}

Schema = dict[str, Any]
Row = tuple[str, str, str]
"""Key, type and default, as the page writes them."""


def rows(model: type[BaseModel]) -> list[Row]:
    schema = model.model_json_schema()
    return list(_rows(schema, schema.get("$defs", {}), ""))


def _rows(schema: Schema, definitions: dict[str, Schema], prefix: str) -> Iterator[Row]:
    for name, field in schema["properties"].items():
        key = prefix + name
        choices = [_resolved(choice, definitions) for choice in field.get("anyOf", [field])]
        nested = next((choice for choice in choices if "properties" in choice), None)
        item = _resolved(choices[0].get("items", {}), definitions)
        alone = len(choices) == 1
        if not (nested and alone):
            words = " or ".join(_words(choice, definitions) for choice in choices)
            required = name in schema.get("required", ())
            yield key, words, "required" if required else _default(field.get("default", {}))
        if nested:
            yield from _rows(nested, definitions, f"{key}.")
        elif "properties" in item:
            yield from _rows(item, definitions, f"{key}[].")


def _resolved(schema: Schema, definitions: dict[str, Schema]) -> Schema:
    if "$ref" in schema:
        return _resolved(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    if len(schema.get("allOf", ())) == 1:
        return _resolved(schema["allOf"][0], definitions)
    return schema


def _words(schema: Schema, definitions: dict[str, Schema]) -> str:
    schema = _resolved(schema, definitions)
    if "enum" in schema or "const" in schema:
        values = schema.get("enum", [schema.get("const")])
        return ", ".join(f"`{value}`" for value in values)
    kind = schema.get("type", "anything")
    if kind == "array":
        item = _resolved(schema["items"], definitions)
        least = schema.get("minItems", 0)
        of = "mappings" if "properties" in item else _plural(_words(item, definitions))
        return f"list of {of}" + (f", at least {least}" if least else "")
    words = {
        "object": "mapping",
        "null": "none",
        "number": "number",
        "integer": "whole number",
        "string": "string",
        "boolean": "true or false",
    }[kind]
    if schema.get("format") == "date":
        words = "date"
    bounds = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits: list[str] = []
    for bound, sign in bounds.items():
        if bound in schema:
            limits.append(f"{sign} {_number(schema[bound])}")
    if "maxLength" in schema:
        words += f" of up to {schema['maxLength']}"
    return " ".join([words, " and ".join(limits)]).strip()


def _plural(words: str) -> str:
    return words.replace("string", "strings", 1)


def _number(value: float) -> str:
    return str(int(value) if value == int(value) else value)


def _default(value: Any) -> str:
    if value is None:
        return "none"
    if value in ([], {}):
        return "empty"
    return f"`{value}`" if isinstance(value, str) else _number(value)


def sections() -> dict[str, str]:
    parts = re.split(r"^## (.+)$", PAGE.read_text(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def written(section: str) -> list[tuple[str, ...]]:
    """Cells of its tables, without their heads."""
    lines = re.findall(r"^\| `(.+) \|$", section, re.MULTILINE)
    return [tuple(cell.strip() for cell in f"`{line}".split(" | ")) for line in lines]


def examples(section: str) -> list[dict[str, Any]]:
    found = re.findall(r"^```yaml\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    return [document for text in found for document in yaml.safe_load_all(text)]


@pytest.mark.parametrize("kind", MODELS)
def test_each_key_is_described_with_its_type_and_default(kind: str) -> None:
    cells = written(sections()[kind])
    assert all(len(row) == 4 and row[3] for row in cells)
    said = [(key.strip("`"), kinds, default) for key, kinds, default, _ in cells]
    assert said == rows(MODELS[kind])


@pytest.mark.parametrize("kind", MODELS)
def test_the_examples_are_valid_and_use_each_key(kind: str) -> None:
    used: set[str] = set()
    for example in examples(sections()[kind]):
        manifest = MODELS[kind].model_validate(example)
        used |= _keys(manifest.model_dump(exclude_unset=True))
    keys = {key for key, _, _ in rows(MODELS[kind])}
    assert sorted(keys - used) == []


def _keys(value: Any, prefix: str = "") -> set[str]:
    found: set[str] = set()
    for name, inner in value.items():
        found.add(prefix + name)
        if isinstance(inner, dict):
            found |= _keys(inner, f"{prefix}{name}.")
        elif isinstance(inner, list | tuple):
            for item in inner:
                if isinstance(item, dict):
                    found |= _keys(item, f"{prefix}{name}[].")
    return found


def test_a_key_that_is_missing_or_wrong_would_be_noticed() -> None:
    class Inner(BaseModel):
        size: int = 3

    class Outer(BaseModel):
        name: str
        inner: Inner = Inner()
        many: tuple[Inner, ...] = ()
        maybe: Inner | None = None

    assert rows(Outer) == [
        ("name", "string", "required"),
        ("inner.size", "whole number", "3"),
        ("many", "list of mappings", "empty"),
        ("many[].size", "whole number", "3"),
        ("maybe", "mapping or none", "none"),
        ("maybe.size", "whole number", "3"),
    ]


def test_the_shipped_files_that_the_page_names_exist() -> None:
    named = re.findall(r"`(deployments/[a-z0-9.-]+\.yaml)`", PAGE.read_text())
    assert named
    assert [name for name in named if not (PAGE.parents[1] / name).exists()] == []


def test_the_parsers_of_the_shipped_models_are_on_the_page() -> None:
    text = sections()["ModelDeployment"]
    used: set[str] = set()
    for file in (PAGE.parents[1] / "deployments").glob("*.yaml"):
        engine = yaml.safe_load(file.read_text()).get("engine", {})
        used |= {engine[key] for key in ("tool_call_parser", "reasoning_parser") if key in engine}
    assert len(used) > 5
    assert [name for name in sorted(used) if f"`{name}`" not in text] == []
