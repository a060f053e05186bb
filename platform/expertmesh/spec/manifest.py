"""Base of the manifest models: unknown keys refused; errors name file, field, value, remedy."""

import difflib
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from expertmesh.errors import ManifestError


class ManifestModel(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)


def explain(file: str, model: type[BaseModel], error: ValidationError) -> ManifestError:
    """One line per problem, in the words of the manifest's author."""
    lines = [_explain_one(file, model, dict(problem)) for problem in error.errors()]
    return ManifestError("\n".join(lines))


def refuse(file: str, field: str, value: object, remedy: str) -> ManifestError:
    return ManifestError(f"{file}: {field}: {value!r}: {remedy}")


def _explain_one(file: str, model: type[BaseModel], problem: dict[str, Any]) -> str:
    path = tuple(problem["loc"])
    field = ".".join(str(part) for part in path)
    value = problem.get("input")
    if problem["type"] == "extra_forbidden":
        known = sorted(_known_keys(model, path[:-1]))
        close = difflib.get_close_matches(str(path[-1]), known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"
        return f"{file}: {field}: unknown key; {hint}"
    if problem["type"] == "missing":
        return f"{file}: {field}: missing; add it"
    if _may_be_a_secret(path, value):
        value = "…"
    shown = value if isinstance(value, str | int | float | bool | None) else type(value).__name__
    return f"{file}: {field}: {shown!r}: {problem['msg'].removeprefix('Value error, ')}"


def _may_be_a_secret(path: tuple[int | str, ...], value: object) -> bool:
    """A key written where its variable's name belongs, or a password in a URL."""
    name = str(path[-1]) if path else ""
    return isinstance(value, str) and (
        (name.endswith("_variable") and not value.isidentifier())
        or (name.endswith("_url") and "@" in value)
    )


def _known_keys(model: type[BaseModel], path: tuple[int | str, ...]) -> set[str]:
    current: Any = model
    for part in path:
        if isinstance(part, int) or not (
            isinstance(current, type) and issubclass(current, BaseModel)
        ):
            continue
        info = current.model_fields.get(part)
        if info is None:
            continue
        current = _model_within(info.annotation)
    if isinstance(current, type) and issubclass(current, BaseModel):
        return set(current.model_fields)
    return set()


def _model_within(annotation: Any) -> Any:
    """The manifest model inside `X | None`, `list[X]` or `tuple[X, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        found = _model_within(inner)
        if found is not None:
            return found
    return None
