"""The list of models, in the forms of both protocols; sleeping models are in it as well."""

from datetime import UTC, datetime
from typing import Any, Final

from expertmesh.core.domain.fleet import ServedModel
from expertmesh.core.domain.tenant import Caller
from expertmesh.gateway.api import ApiError, Protocol
from expertmesh.gateway.fleet_view import FleetView


class ModelList:
    def __init__(self, view: FleetView, created_at_s: int) -> None:
        """`created_at_s`: both protocols want a time for each model, and none is known."""
        self._view: Final = view
        self._created_at_s: Final = created_at_s

    def listed(self, protocol: Protocol, caller: Caller) -> dict[str, Any]:
        """Those that the key may use; a name and its aliases are entries of their own."""
        names = [name for name in sorted(self._view.models) if self._may_see(name, caller)]
        models = [self._describe(protocol, name) for name in names]
        if protocol is Protocol.OPENAI:
            return {"object": "list", "data": models}
        return {
            "data": models,
            "has_more": False,
            "first_id": names[0] if names else None,
            "last_id": names[-1] if names else None,
        }

    def one(self, protocol: Protocol, name: str, caller: Caller) -> dict[str, Any] | ApiError:
        if name in self._view.models and self._may_see(name, caller):
            return self._describe(protocol, name)
        return self.unknown(name, caller)

    def unknown(self, name: str, caller: Caller) -> ApiError:
        """The same for a model that does not exist and for one that the key may not use."""
        known = [each for each in sorted(self._view.models) if self._may_see(each, caller)]
        return ApiError(
            404,
            f"The model '{name[:200]}' does not exist, or this key may not use it; there are: "
            f"{', '.join(known) or 'none'}.",
            code="model_not_found",
            param="model",
        )

    def _may_see(self, name: str, caller: Caller) -> bool:
        """A key may be for a model, by all its names, or for one of its aliases alone."""
        return caller.may_use(self._view.models[name].name) or caller.may_use(name)

    def _describe(self, protocol: Protocol, name: str) -> dict[str, Any]:
        if protocol is Protocol.ANTHROPIC:
            created = datetime.fromtimestamp(self._created_at_s, UTC)
            return {
                "type": "model",
                "id": name,
                "display_name": name,
                "created_at": created.strftime("%Y-%m-%dT%H:%M:%SZ"),
            }
        model: ServedModel = self._view.models[name]
        return {
            "id": name,
            "object": "model",
            "created": self._created_at_s,
            "owned_by": "expertmesh",
            "root": model.name,
            "max_model_len": model.max_model_len,
        }
