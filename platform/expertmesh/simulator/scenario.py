"""What is simulated: the ways to run groups, their true behaviour, the targets and the mishaps."""

from dataclasses import dataclass
from enum import StrEnum

from expertmesh.core.domain.hardware import Market
from expertmesh.core.domain.option import GroupOption
from expertmesh.core.domain.slo import Slo
from expertmesh.simulator.service_time import ServiceTime


@dataclass(frozen=True, slots=True)
class StartTime:
    """From asking for a group to its being ready: the slowest of its nodes, each lognormal."""

    median_s: float
    """Of one node."""
    sigma: float = 0.15
    """Standard deviation of the logarithm, of one node."""
    failure_probability: float = 0.0
    """Of a whole start; it is noticed when the group should have been ready."""


class Victims(StrEnum):
    """Whose nodes a spot zone takes first."""

    RANDOM = "random"
    OLDEST = "oldest"


@dataclass(frozen=True, slots=True)
class Availability:
    """Of a spot zone over time, as steps: from `at_s[i]` on it has `nodes[i]` nodes."""

    at_s: tuple[float, ...]
    nodes: tuple[int, ...]
    notice_s: float = 120.0
    """How long before nodes are taken their groups are told."""
    victims: Victims = Victims.RANDOM


@dataclass(frozen=True, slots=True)
class SimulatedOption:
    option: GroupOption
    """What the policy is told."""
    service: ServiceTime
    """What groups really do."""
    start: StartTime
    nodes: int
    """Of one group; 0 or a fraction of a node is rounded up."""
    market: Market
    max_groups: int
    availability: Availability | None = None
    """None: always `max_groups` groups' nodes. Options of one pool share its nodes."""


@dataclass(frozen=True, slots=True)
class Scenario:
    name: str
    options: tuple[SimulatedOption, ...]
    slo: Slo
    max_wait_s: float
    """A request that has waited this long in the gateway is refused."""
    min_groups: int = 0
    budget_usd_per_hour: float | None = None
    tick_s: float = 10.0
    """Between two decisions."""
    metric_delay_s: float = 5.0
    """Age of what a policy sees."""
    drain_deadline_s: float = 600.0
    initial_groups: tuple[int, ...] = ()
    """By option, ready at the start; empty: none."""
    seed: int = 1
    output_cv2: float = 1.0
    """Variance of the requests' output lengths over the square of their mean: 1 where lengths are
    memoryless. Long answers stay longer, so with more the batch holds more context."""
