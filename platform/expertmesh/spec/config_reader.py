"""Look-ups in a config.json that say what is missing."""

from collections.abc import Mapping, Sequence
from typing import Any

from expertmesh.errors import ManifestError


class ConfigReader:
    """The text part of a model's config, under the names that the model families use."""

    def __init__(self, architecture: str, text: Mapping[str, Any]) -> None:
        self.architecture = architecture
        self.text = text

    def count(self, *keys: str, default: int | None = None) -> int:
        """The first of the keys that is set. Raises ManifestError without one or a default."""
        for key in keys:
            value = self.text.get(key)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise self.refuse(f"{key}: {value!r} is no count; write a whole number")
            return value
        if default is None:
            raise self.refuse(f"{' or '.join(keys)} is missing; add it, or give it as an override")
        return default

    def positive(self, *keys: str) -> int:
        value = self.count(*keys)
        if value == 0:
            raise self.refuse(f"{' or '.join(keys)} is 0; write a number above 0")
        return value

    def flag(self, key: str, default: bool = False) -> bool:
        return bool(self.text.get(key, default))

    def per_layer(self, key: str, layers: int) -> tuple[Any, ...] | None:
        """A list with one entry a layer; entries past the last layer are for other heads."""
        value = self.text.get(key)
        if not isinstance(value, Sequence) or isinstance(value, str):
            return None
        if len(value) < layers:
            raise self.refuse(f"{key} has {len(value)} entries for {layers} layers")
        if not all(isinstance(entry, str | int) for entry in value):
            raise self.refuse(f"{key}: an entry is neither a word nor a number")
        return tuple(value[:layers])

    def numbers(self, key: str) -> tuple[int, ...]:
        """A list of whole numbers; empty when it is not set."""
        value = self.text.get(key)
        if value is None:
            return ()
        if not isinstance(value, Sequence) or not all(isinstance(entry, int) for entry in value):
            raise self.refuse(f"{key}: {value!r} is no list of whole numbers")
        return tuple(value)

    def section(self, key: str) -> "ConfigReader":
        """A mapping within; empty when it is not set."""
        value = self.text.get(key)
        if value is not None and not isinstance(value, Mapping):
            raise self.refuse(f"{key}: {value!r} is no mapping")
        return ConfigReader(f"{self.architecture}, {key}", value or {})

    def refuse(self, what: str) -> ManifestError:
        return ManifestError(f"config.json of {self.architecture}: {what}")
