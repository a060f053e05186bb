"""What a scaling policy sees of a simulated fleet, and what it may ask for.

The platform's own policy and the baselines see the same.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from expertmesh.core.domain.fleet import GroupState
from expertmesh.simulator.scenario import Scenario


@dataclass(frozen=True, slots=True)
class GroupView:
    name: str
    option: int
    """Index into the scenario's options."""
    state: GroupState
    since_s: float
    requested_at_s: float
    in_flight: float = 0.0
    """Requests at the group, in its batch or waiting for it."""
    waiting: float = 0.0
    """Of them, not in its batch yet."""
    kv_usage: float = 0.0
    """0 to 1."""
    prompt_tokens_per_s: float = 0.0
    """Uncached prompt tokens done, over the last `View.window_s`."""
    output_tokens_per_s: float = 0.0
    ttft_s: float | None = None
    """Means of the requests that finished in the window, without the wait in the gateway; None
    when none did."""
    tpot_s: float | None = None


@dataclass(frozen=True, slots=True)
class View:
    now_s: float
    window_s: float
    """All rates are means over this long, which ended `Scenario.metric_delay_s` ago."""
    groups: tuple[GroupView, ...]
    """Without those that are gone."""
    room: tuple[int, ...]
    """By option, groups that could be started now beside those that are there."""
    notices: Mapping[str, float] = field(default_factory=dict)
    """Groups whose spot nodes will be taken, and when."""
    queued: float = 0.0
    """Requests that wait in the gateway."""
    queued_prompt_tokens: float = 0.0
    oldest_wait_s: float = 0.0
    arrivals_per_s: float = 0.0
    arrived_prompt_tokens_per_s: float = 0.0
    finished_per_s: float = 0.0
    finished_prompt_tokens: float = 0.0
    """Mean uncached prompt tokens of the requests that finished in the window; 0 when none did."""
    finished_output_tokens: float = 0.0


@dataclass(frozen=True, slots=True)
class Start:
    option: int


@dataclass(frozen=True, slots=True)
class Drain:
    """Also ends a start at once; a group that serves finishes what it has first."""

    group: str


@dataclass(frozen=True, slots=True)
class Recall:
    """Route to a draining group again."""

    group: str


Move = Start | Drain | Recall


class ScalingPolicy(Protocol):
    """One for each run: it may keep state."""

    @property
    def name(self) -> str: ...

    def decide(self, view: View) -> tuple[Move, ...]: ...


class PolicyMaker(Protocol):
    def __call__(self, scenario: Scenario) -> ScalingPolicy: ...
