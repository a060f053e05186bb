"""What the planner answers: the plan with its reasons, or why there is none and what is nearest."""

from dataclasses import dataclass

from expertmesh.core.domain.fleet import Parallelism
from expertmesh.core.domain.option import GroupRates
from expertmesh.core.perf.efficiency import Range
from expertmesh.core.perf.energy import Energy
from expertmesh.core.perf.layout import Layout
from expertmesh.core.perf.memory import MemoryPlan
from expertmesh.core.planner.availability import Availability
from expertmesh.core.planner.balance import Balance
from expertmesh.core.planner.candidates import Backend, Constraint, Role, RuledOut
from expertmesh.core.planner.question import Checkpoint, GpuPool, Objective, Serving, Targets
from expertmesh.core.planner.redundancy import RedundancyOption


@dataclass(frozen=True, slots=True)
class GroupPlan:
    """One group, of which the plan has `count`. Figures are of one group."""

    role: Role
    count: int
    layout: Layout
    backend: Backend
    batched_tokens: int | None
    """Of a rank in one step, where vLLM's default would not do."""
    nodes: int
    memory: MemoryPlan
    kv_tokens: int
    """Over all attention ranks."""
    max_concurrency: int
    """Sequences of the whole context at once."""
    batch_per_rank: int
    users: int
    """At the targets; 0 for a group that only prefills."""
    tokens_per_s: Range
    """Of output; of prompts for a group that only prefills."""
    tpot_s: Range
    ttft_s: Range
    limit: str
    """What keeps the batch from growing: `tpot`, `ttft`, `kv cache` or `sequences`."""
    time_limit: str
    """What takes most of a step: memory, compute, network, fixed or prefill."""
    overlapped: bool
    """A step is faster in two halves (vLLM's DBO)."""
    usd_per_hour: float
    rates: GroupRates
    start_s: float
    """On nodes that are there already."""
    balance: Balance | None
    """Of its experts; None without expert parallelism."""
    copies: tuple[RedundancyOption, ...]
    """Numbers of redundant experts that were weighed; none where vLLM cannot copy experts."""

    @property
    def gpus(self) -> int:
        return self.layout.world_size

    @property
    def parallelism(self) -> Parallelism:
        return Parallelism(
            tensor=self.layout.tensor, data=self.layout.data, expert=self.layout.expert
        )


@dataclass(frozen=True, slots=True)
class RunnerUp:
    """Meets the targets as well, and loses by `constraint`."""

    name: str
    source: str
    serving: Serving
    gpus: int
    users: int
    usd_per_mtok: float
    lone_tpot_s: float
    constraint: Constraint
    why: str


@dataclass(frozen=True, slots=True)
class Plan:
    pool: GpuPool
    checkpoint: Checkpoint
    targets: Targets
    objective: Objective
    serving: Serving
    groups: tuple[GroupPlan, ...]
    """One kind, or with `apart` those that prefill and those that decode."""
    users: int
    """At the targets, of all groups but the spare ones."""
    tokens_per_s: Range
    """Of output, of all groups but the spare ones, with `users`."""
    usd_per_hour: float
    usd_per_mtok: Range
    """Of a million tokens of output, prompts included."""
    energy: Energy | None
    """Of a token of output; None when the GPU's draw is not published."""
    availability: Availability
    why: str
    """Why it won, in one sentence."""
    notes: tuple[str, ...]
    runners_up: tuple[RunnerUp, ...]
    ruled_out: tuple[RuledOut, ...]
    """The nearest of each constraint."""
    considered: int

    @property
    def gpus(self) -> int:
        return sum(group.count * group.gpus for group in self.groups)

    @property
    def nodes(self) -> int:
        """Whole ones; groups smaller than a node share it."""
        return -(-self.gpus // self.pool.gpus_per_node)

    @property
    def serving_group(self) -> GroupPlan:
        """The one that users get their tokens from."""
        return self.groups[-1]

    @property
    def limits(self) -> str:
        """What a person would have to change to serve more, in words."""
        group = self.serving_group
        return f"{_LIMITS[group.limit]}; a step is mostly {_TIMES[group.time_limit]}"


@dataclass(frozen=True, slots=True)
class NoPlan:
    pool: GpuPool
    targets: Targets
    constraint: Constraint
    problem: str
    """With by how much."""
    nearest: tuple[str, ...]
    """What would be possible, one sentence each."""
    ruled_out: tuple[RuledOut, ...] = ()
    considered: int = 0

    def __str__(self) -> str:
        return "; ".join((self.problem, *self.nearest))


_LIMITS = {
    "tpot": "more users would miss the TPOT target",
    "ttft": "more users would miss the TTFT target",
    "kv cache": "the KV cache is full",
    "sequences": "the engine batches no more sequences",
}
_TIMES = {
    "memory": "reading memory",
    "compute": "arithmetic",
    "network": "exchange between GPUs",
    "fixed": "fixed cost of launches and scheduling",
    "prefill": "reading prompts",
}
