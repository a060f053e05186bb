"""A decision with all that it rests on, as it goes into the journal, and the way back."""

from dataclasses import dataclass
from typing import Any

import msgspec

from expertmesh.core.scaling.contract import Decision, ModelState, Observation, ScalingConfig
from expertmesh.core.scaling.policy import decide


@dataclass(frozen=True, slots=True)
class DecisionRecord:
    now_s: float
    config: ScalingConfig
    before: ModelState
    observation: Observation
    decision: Decision

    def to_payload(self) -> dict[str, Any]:
        payload = msgspec.to_builtins(self)
        assert isinstance(payload, dict)
        return payload


def read_record(payload: dict[str, Any]) -> DecisionRecord:
    """Raises msgspec.ValidationError for a payload that another version wrote."""
    return msgspec.convert(payload, DecisionRecord)


@dataclass(frozen=True, slots=True)
class Replayed:
    recorded: Decision
    again: Decision

    @property
    def equal(self) -> bool:
        return self.recorded == self.again


def replay(record: DecisionRecord) -> Replayed:
    """Decide again from what was recorded; a journal entry needs no other entry for this."""
    again = decide(record.config, record.before, record.observation, record.now_s)
    return Replayed(record.decision, again)
