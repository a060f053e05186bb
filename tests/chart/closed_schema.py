"""A CustomResourceDefinition's schema as a JSON schema that refuses what it does not name.

The API server drops unknown fields in silence; a test must not.
"""

from typing import Any

Json = dict[str, Any]


def closed_schema(definition: Json, version: str) -> Json:
    """Of one version. Rules in CEL (`x-kubernetes-validations`) are left out."""
    (found,) = (each for each in definition["spec"]["versions"] if each["name"] == version)
    schema = _closed(found["schema"]["openAPIV3Schema"])
    # Kubernetes itself checks these; `status` is the operator's.
    schema["properties"]["metadata"] = {"type": "object"}
    schema["properties"].pop("status", None)
    return schema


def _closed(node: Json) -> Json:
    closed = {key: value for key, value in node.items() if not key.startswith("x-kubernetes-")}
    closed.pop("format", None)
    if node.get("x-kubernetes-int-or-string"):
        closed.pop("anyOf", None)
        closed["type"] = ["integer", "string"]
    if "properties" in node:
        closed["properties"] = {name: _closed(each) for name, each in node["properties"].items()}
        if not node.get("x-kubernetes-preserve-unknown-fields"):
            closed["additionalProperties"] = False
    elif isinstance(node.get("additionalProperties"), dict):
        closed["additionalProperties"] = _closed(node["additionalProperties"])
    if "items" in node:
        closed["items"] = _closed(node["items"])
    if closed.pop("nullable", False):
        closed["type"] = [closed["type"], "null"]
    return closed
