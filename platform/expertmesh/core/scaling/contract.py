"""What the scaling core is given and what it gives back.

Plain values that travel as JSON: a journal of them replays to the same decisions.
"""

import json
import math
from dataclasses import dataclass, field
from enum import StrEnum

from expertmesh.core.domain.deployment import ScalingRules
from expertmesh.core.domain.fleet import (
    ExternalRoute,
    GroupSpec,
    GroupState,
    Parallelism,
    Rank,
)
from expertmesh.core.domain.hardware import Pool
from expertmesh.core.domain.option import GroupOption, option_name
from expertmesh.core.domain.slo import Slo
from expertmesh.core.scaling.demand import Demand, GatewaySeen, GroupDoing
from expertmesh.core.scaling.forecast import Forecaster
from expertmesh.core.scaling.learning import Learned
from expertmesh.core.scaling.peak import Peak
from expertmesh.core.scaling.spending import Spending
from expertmesh.core.scaling.spot import Zone
from expertmesh.core.scaling.work import Work

_SLOW_START = 4.0
"""Times the planned start; plans were within a factor of 3 of the starts that are published."""


@dataclass(frozen=True, slots=True)
class Timing:
    """How patient the controller is; the same for every model."""

    gateway_stale_s: float = 5.0
    """A gateway silent for longer keeps its last value and forbids scaling down."""
    gateway_forget_s: float = 60.0
    """A gateway silent for longer has ended: worker ids are never used again."""
    probe_failures: int = 3
    """Unanswered probes of one rank in a row that make its group lost."""
    start_deadline_s: float = 900.0
    """A group that is not ready by then has failed to start, unless its starts take long."""
    restart_grace_s: float = 60.0
    """Time for Serve to restart a broken gang; it notices a dead engine after about 26 s."""
    backoff_first_s: float = 10.0
    backoff_max_s: float = 600.0


@dataclass(frozen=True, slots=True)
class ScalingConfig:
    """One model deployment and the pools that it may use."""

    model: str
    source: str
    max_model_len: int
    rules: ScalingRules
    pools: tuple[Pool, ...]
    options: tuple[GroupOption, ...]
    timing: Timing = Timing()
    slo: Slo = field(default_factory=Slo)
    max_wait_s: float = 30.0
    external: tuple[ExternalRoute, ...] = ()

    def start_deadline_s(self, spec: GroupSpec) -> float:
        """A start that takes much longer than planned has failed, unless the manifest has a say."""
        if self.rules.start_deadline_s is not None:
            return self.rules.start_deadline_s
        planned = (
            option.start_s
            for option in self.options
            if (option.pool, option.parallelism) == (spec.pool, spec.parallelism)
        )
        return max(self.timing.start_deadline_s, _SLOW_START * next(planned, 0.0))

    def is_current(self, spec: GroupSpec) -> bool:
        """Whether its option would start it in the same way now: the same model, context length
        and engine arguments. Of a model without options all groups are as they should be."""
        name = option_name(spec.pool, spec.parallelism)
        option = next((each for each in self.options if each.name == name), None)
        if not self.options:
            return True
        if (spec.model_source, spec.max_model_len) != (self.source, self.max_model_len):
            return False
        # A spec that comes back from Serve has been through JSON.
        return (
            option is None
            or spec.engine == option.engine
            or (
                json.dumps(spec.engine, sort_keys=True) == json.dumps(option.engine, sort_keys=True)
            )
        )


def workers_of(parallelism: Parallelism) -> int:
    """Engine workers of one group."""
    return parallelism.data * parallelism.tensor


@dataclass(frozen=True, slots=True)
class GroupRecord:
    """What the controller remembers about one group until it is gone."""

    spec: GroupSpec
    state: GroupState
    since_s: float
    """When the group entered its state."""
    requested_at_s: float
    """When it was asked for: it costs from here on."""
    expected_ready_at_s: float | None = None
    message: str = ""
    ranks: tuple[Rank, ...] = ()
    """Addresses when it was last ready."""
    members: tuple[str, ...] = ()
    """`<node>/<process>` of each rank's replica when it was last ready: other ones mean that Serve
    restarted the gang."""
    served: bool = False
    """It has been ready before."""
    adopted: bool = False
    """Found running; the time of its start is not known."""
    failed_start: bool = False
    leaving_at_s: float | None = None
    """When a node of it will be taken away: the earliest time that was announced."""
    removed_at_s: float | None = None
    """Since when it is left out of the set of wanted applications."""


@dataclass(frozen=True, slots=True)
class Rise:
    """A need above what there is and is coming, and how long it has been so."""

    since_s: float
    load: float
    """The lowest such need since then."""
    held: float = 0.0
    """The lowest of the time before, once the need has lasted long enough; it counts already."""


@dataclass(frozen=True, slots=True)
class Backoff:
    failures: int
    until_s: float


@dataclass(frozen=True, slots=True)
class ModelState:
    wanted: int = 0
    """Groups that the policy holds on to, or would if it could have them."""
    next_n: int = 1
    """Number of the next group's name; never used twice."""
    groups: tuple[GroupRecord, ...] = ()
    seen_at_s: float | None = None
    """Time of the last decision."""
    idle_since_s: float | None = None
    """Since when nothing has come, waited or run."""
    rise: Rise | None = None
    peak: Peak = field(default_factory=Peak)
    """Of the need."""
    work: Work = field(default_factory=Work)
    forecast: Forecaster = field(default_factory=Forecaster)
    learned: dict[str, Learned] = field(default_factory=dict)
    """By option: what its groups have shown that they can do."""
    zones: dict[str, Zone] = field(default_factory=dict)
    """Spot zones that it uses or has used."""
    spending: Spending = field(default_factory=Spending)
    backoff: dict[str, Backoff] = field(default_factory=dict)
    """By pool: starts failed there lately."""
    start_s: dict[str, float] = field(default_factory=dict)
    """By option: moving average of the time from asking for a group to its being ready."""


@dataclass(frozen=True, slots=True)
class ReplicaSeen:
    state: str
    """Serve's word."""
    member: str | None
    """`<node>/<process>`, or None while it has no process."""
    node_alive: bool | None
    """None while it has no node, or when the nodes could not be listed."""


@dataclass(frozen=True, slots=True)
class ApplicationSeen:
    status: str
    """Serve's word."""
    message: str
    replicas: tuple[ReplicaSeen, ...]


@dataclass(frozen=True, slots=True)
class RankSeen:
    base_url: str
    failures: int
    """Probes in a row that this address has not answered."""
    index: int | None = None
    """As the rank says; None when it did not answer, or answered for another group."""
    world_size: int | None = None


@dataclass(frozen=True, slots=True)
class GroupSeen:
    name: str
    application: ApplicationSeen | None
    ranks: tuple[RankSeen, ...] = ()
    placement_group: bool | None = None
    """Whether its placement group exists; None when that was not asked or not answered."""
    spec: GroupSpec | None = None
    """As Serve has it; given only where the state does not say the same."""
    held_since_s: float | None = None
    """Start of its open entry in the ledger, for a group that is adopted."""
    doing: GroupDoing | None = None
    """None: not known."""
    leaving_at_s: float | None = None
    """When a node of it will be taken away, as its provider has announced."""
    leaving_workers: int = 0
    """Of its workers, those on such nodes."""


@dataclass(frozen=True, slots=True)
class PoolSeen:
    name: str
    live_workers: int | None
    """Workers that fit on the nodes that Ray has now; None when they could not be listed."""
    used_elsewhere: int
    """Workers of other models' groups."""
    staying_elsewhere: int = 0
    """The part of them that is not being removed."""


@dataclass(frozen=True, slots=True)
class Grant:
    """What a model may take where several compete for a pool or for the platform's budget."""

    workers: dict[str, int]
    """By pool, of all its groups there; a pool that is missing is not contested."""
    usd_per_hour: float | None = None
    """None: the platform has no budget, or it is not contested."""
    why: str = ""
    """Who has the rest, and why."""


@dataclass(frozen=True, slots=True)
class Observation:
    groups: tuple[GroupSeen, ...] = ()
    pools: tuple[PoolSeen, ...] = ()
    gateways: tuple[GatewaySeen, ...] = ()
    serve_answers: bool = True
    """False: nothing about applications is known, so nothing is started, drained or removed."""
    journal_writes: bool = True
    """False: a decision could not be recorded, so nothing is started, drained or removed."""
    first_look: bool = False
    """The first time that this controller sees Serve: groups may have ended before it started."""
    settled: bool = True
    """False just after the controller's start: gateways may not have reported yet."""
    names_elsewhere: tuple[str, ...] = ()
    """Names of applications that are not groups of this model."""
    grant: Grant | None = None
    """None: nothing is contested."""


class ActionKind(StrEnum):
    START = "start"
    DRAIN = "drain"
    RECALL = "recall"
    """Route to a draining group again: cheaper than a cold start."""
    REMOVE = "remove"


@dataclass(frozen=True, slots=True)
class Action:
    kind: ActionKind
    group: str
    why: str
    spec: GroupSpec | None = None
    """For a start."""


@dataclass(frozen=True, slots=True)
class Transition:
    group: str
    pool: str
    before: GroupState | None
    """None: adopted or asked for."""
    after: GroupState
    why: str


class Binding(StrEnum):
    """What keeps the number of groups from being another one."""

    LOAD = "load"
    """There are as many groups as the load needs."""
    MIN_GROUPS = "min_groups"
    MAX_GROUPS = "max_groups"
    BUDGET = "budget"
    """Of the model, by the hour or by the day."""
    GRANT = "grant"
    """Other models have the rest of a pool or of the platform's budget."""
    ROOM = "room"
    BACKOFF = "backoff"
    """Starts have failed lately, or the zone has just been lost."""
    HOLD = "hold"
    """There are more than the load needs, held for as long as starting them again would take."""
    DELAY = "delay"
    """The need has not lasted long enough yet."""
    UNSEEN = "unseen"
    """What cannot be seen is no reason to scale down."""
    MODE = "mode"
    """It only observes or advises."""
    EXTERNAL = "external"
    """A provider serves the load for less."""


@dataclass(frozen=True, slots=True)
class Load:
    """In units of what one group of the model's first option can do."""

    now: float = 0.0
    expected: float = 0.0
    """When a group that is asked for now is ready."""
    spare: float = 0.0
    """Kept in hand above what is expected."""
    needed: float = 0.0
    """With the margin and what it takes to work off the queue."""
    held: float = 0.0
    """The highest need of the last while."""
    ready: float = 0.0
    """What the ready groups can do."""
    coming: float = 0.0
    """What those that are on the way will do."""
    backlog_s: float = 0.0
    """Time of one group that the queued requests need."""
    by_tokens: bool = False
    """Measured in tokens and learned rates; otherwise in requests at once."""

    @property
    def wait_s(self) -> float:
        """Predicted for a request that comes now: until the ready groups have worked off what is
        queued; infinite when they fall behind."""
        if self.backlog_s <= 0 and self.now <= self.ready:
            return 0.0
        spare = self.ready - self.now
        return self.backlog_s / spare if spare > 0 else math.inf


@dataclass(frozen=True, slots=True)
class Decision:
    model: str
    state: ModelState
    actions: tuple[Action, ...]
    transitions: tuple[Transition, ...]
    demand: Demand
    load: Load
    need: int
    """Groups that the load asks for, within min and max."""
    target: dict[str, int]
    """Groups wanted, by option."""
    binding: Binding
    pending: str | None
    """`pending: …` when fewer groups can be had than are wanted."""
    reason: str
    """One sentence with the numbers that it rests on."""
    wake_at_s: float
    """When time alone would change the decision; observe again by then."""
    advice: tuple[Action, ...] = ()
    """What it would do if the model's mode let it."""
