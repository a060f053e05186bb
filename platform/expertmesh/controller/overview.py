"""All that the console and `expertmesh status` show of one controller at one moment."""

from dataclasses import dataclass, field
from typing import Any

from expertmesh.controller.picture import ExpertHeat, Picture


@dataclass(frozen=True, slots=True)
class ControllerState:
    at_s: float
    """By the controller's clock."""
    platform: str
    gateway_url: str | None
    """As a browser reaches it; None: not known."""
    problems: dict[str, str]
    """By step of the loop that fails: why."""
    stuck: bool
    """The control loop does not turn."""
    leads: bool
    leader_url: str | None
    """Of another controller that leads, as far as is known."""
    picture: Picture | None
    """None: it follows, or has not decided yet."""


@dataclass(frozen=True, slots=True)
class Overview:
    state: ControllerState
    decisions: Any
    """The newest ones, newest first; or `{"error": …}`."""
    today: Any = None
    """See `Today`; or `{"error": …}`; None: there is no ledger."""
    heat: dict[str, ExpertHeat] = field(default_factory=dict)
