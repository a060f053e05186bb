"""A decision with all that it rests on, as it goes into the journal, and the way back.

An entry needs no other one to be decided again. It is kept short: what is empty is left out, and of
the state after the decision only what differs from the one before is written.
"""

from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from typing import Any

import msgspec

from expertmesh.core.scaling.contract import Decision, ModelState, Observation, ScalingConfig
from expertmesh.core.scaling.policy import decide

_PARTS = frozenset({"peak", "work", "forecast", "spending"})
"""Of a state, that are values of several fields."""


@dataclass(frozen=True, slots=True)
class DecisionRecord:
    now_s: float
    config: ScalingConfig
    before: ModelState
    observation: Observation
    decision: Decision

    def to_payload(self) -> dict[str, Any]:
        decision = _short(self.decision)
        decision["state"] = _difference(self.before, self.decision.state)
        decision["state"]["groups"] = _changed_groups(self.before, self.decision.state)
        return {
            "now_s": self.now_s,
            "config": msgspec.to_builtins(self.config),
            "before": _short(self.before),
            "observation": _short(self.observation),
            "decision": decision,
        }


def read_record(payload: dict[str, Any]) -> DecisionRecord:
    """Raises msgspec.ValidationError for a payload that another version wrote."""
    return msgspec.convert(_whole(payload), DecisionRecord)


@dataclass(frozen=True, slots=True)
class Replayed:
    recorded: Decision
    again: Decision

    @property
    def equal(self) -> bool:
        return self.recorded == self.again

    @property
    def first_difference(self) -> str | None:
        """Where, and both values; None when they are equal."""
        if self.equal:
            return None
        found = _first_difference(
            msgspec.to_builtins(self.recorded), msgspec.to_builtins(self.again), "decision"
        )
        return found or "decision: the values are of different types"


def replay(record: DecisionRecord) -> Replayed:
    """Decide again from what was recorded; a journal entry needs no other entry for this."""
    again = decide(record.config, record.before, record.observation, record.now_s)
    return Replayed(record.decision, again)


def _first_difference(recorded: Any, again: Any, path: str) -> str | None:
    if isinstance(recorded, dict) and isinstance(again, dict):
        for key in [*recorded, *(key for key in again if key not in recorded)]:
            found = _first_difference(recorded.get(key), again.get(key), f"{path}.{key}")
            if found is not None:
                return found
        return None
    if isinstance(recorded, list | tuple) and isinstance(again, list | tuple):
        for index, (one, other) in enumerate(zip(recorded, again, strict=False)):
            found = _first_difference(one, other, f"{path}[{index}]")
            if found is not None:
                return found
        if len(recorded) != len(again):
            return f"{path}: recorded {len(recorded)} values, again {len(again)}"
        return None
    return None if recorded == again else f"{path}: recorded {recorded!r}, again {again!r}"


# Short, and whole again


def _short(value: Any) -> Any:
    """Plain values; a field that is empty, as it is by default, is left out."""
    if is_dataclass(value):
        return {
            field.name: _short(held)
            for field in fields(value)
            if not _is_empty_default(field, held := getattr(value, field.name))
        }
    if isinstance(value, tuple | list):
        return [_short(each) for each in value]
    if isinstance(value, dict):
        return {key: _short(each) for key, each in value.items()}
    return msgspec.to_builtins(value)


def _is_empty_default(field: "Field[Any]", value: Any) -> bool:
    """Nothing else is left out: defaults that mean something may change with the version."""
    if value is None or value is False or (isinstance(value, int | float) and value == 0):
        return field.default is not MISSING and field.default == value
    if isinstance(value, tuple | dict | str) and not value:
        made = field.default_factory() if field.default_factory is not MISSING else field.default
        return made is not MISSING and made == value
    return False


def _difference(before: Any, after: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for field in fields(after):
        old, new = getattr(before, field.name), getattr(after, field.name)
        if old == new:
            continue
        part = field.name in _PARTS
        found[field.name] = _difference(old, new) if part else _short(new)
    return found


def _changed_groups(before: ModelState, after: ModelState) -> list[Any]:
    """Those that are as before by their names alone."""
    known = {record.spec.name: record for record in before.groups}
    return [
        record.spec.name if known.get(record.spec.name) == record else _short(record)
        for record in after.groups
    ]


def _whole(payload: dict[str, Any]) -> dict[str, Any]:
    before, decision = payload.get("before"), payload.get("decision")
    state = decision.get("state") if isinstance(decision, dict) else None
    if not (isinstance(before, dict) and isinstance(decision, dict) and isinstance(state, dict)):
        return payload
    whole = {**before, **state}
    for part in _PARTS:
        old, new = before.get(part), state.get(part)
        if isinstance(old, dict) and isinstance(new, dict):
            whole[part] = {**old, **new}
    groups = {
        group["spec"]["name"]: group
        for group in before.get("groups", ())
        if isinstance(group, dict) and isinstance(group.get("spec"), dict)
    }
    whole["groups"] = [
        groups.get(group, group) if isinstance(group, str) else group
        for group in state.get("groups", ())
    ]
    return {**payload, "decision": {**decision, "state": whole}}
