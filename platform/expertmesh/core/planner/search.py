"""The best plan for a model in a pool: every candidate is rated, and the objective picks one."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from math import inf, isfinite, log

from expertmesh.core.perf.efficiency import Efficiency, Range, efficiency
from expertmesh.core.perf.energy import energy
from expertmesh.core.perf.memory import widened
from expertmesh.core.perf.start import start_s
from expertmesh.core.perf.weights import expert_slot_bytes
from expertmesh.core.planner.availability import availability, groups_for
from expertmesh.core.planner.balance import Balance, Balances
from expertmesh.core.planner.candidates import (
    LARGEST_GROUP_GPUS,
    Candidate,
    Constraint,
    Role,
    RuledOut,
    candidates,
    movable_experts,
)
from expertmesh.core.planner.plan import GroupPlan, NoPlan, Plan, RunnerUp
from expertmesh.core.planner.question import GpuPool, Objective, Question, Serving, Targets
from expertmesh.core.planner.rating import Rated, memory_of, rate
from expertmesh.core.planner.redundancy import RedundancyOption, redundancy, redundant_counts

EQUAL_SHARE = 0.03
"""Prices that differ by less are equal: predictions are not that good, and less is lost with a
smaller group."""
MOST_EXTRA_SLOTS = 3
"""Of a GPU, for redundant experts."""
EQUAL_COPIES = 0.01
"""Copies that bring less are not worth their memory, which longer contexts can use."""
RUNNERS_UP = 5
_SIZES_APART = 8
"""Most groups that decode, and most kinds of groups to combine."""
SIZES = 3
"""Of groups in one pool: each more doubles what the controller has to weigh."""
QUICKER_SHARE = 0.2
"""Less of a gain in time to start is none: such times are not predicted that well."""
MOST_DEARER = 2.0
"""A size that costs more than so many times as much for the same work is of no use."""


@dataclass(frozen=True, slots=True)
class _Option:
    """Groups that serve together, with their counts."""

    parts: tuple[tuple[Rated, int], ...]
    spare_groups: int
    tokens_per_s: float
    users: int
    usd_per_hour: float
    copies: tuple[RedundancyOption, ...] = ()

    @property
    def rated(self) -> Rated:
        return self.parts[-1][0]

    @property
    def gpus(self) -> int:
        return sum(rated.gpus * count for rated, count in self.parts)

    @property
    def groups(self) -> int:
        return sum(count for _, count in self.parts)

    @property
    def largest_group(self) -> int:
        return max(rated.gpus for rated, _ in self.parts)

    @property
    def serving(self) -> Serving:
        return Serving.TOGETHER if len(self.parts) == 1 else Serving.APART

    @property
    def usd_per_mtok(self) -> float:
        return self.usd_per_hour / 3600 / self.tokens_per_s * 1e6

    @property
    def gpu_s_per_token(self) -> float:
        """Orders as price does, also where GPUs cost nothing."""
        return self.gpus / self.tokens_per_s

    @property
    def name(self) -> str:
        named = (
            (f"{count} x " if count > 1 else "") + str(rated.candidate)
            for rated, count in self.parts
        )
        return " and ".join(named)


def search(question: Question, pool: GpuPool) -> Plan | NoPlan:
    """Rates every candidate of every checkpoint; pure and deterministic."""
    refused = _nonsense(question, pool)
    if refused is not None:
        return refused
    balances = Balances(question.expert_load)
    found = _survey(question, pool, balances)
    allowed = [option for option in found.options if option.serving in question.serving]
    if not allowed:
        return _no_plan(question, pool, found)
    winner = _best(allowed, question.objective)
    winner = _with_copies(winner, question, pool, balances)
    return _plan(question, pool, winner, allowed, found, balances)


def search_sizes(
    question: Question, pools: Sequence[GpuPool], usd_per_hour: float = inf
) -> list[tuple[Plan, ...] | NoPlan]:
    """For each pool the sizes of a group that are of use beside one another, the best one first.

    At most three, all within `usd_per_hour` a group. The others are smaller and dearer for the same
    work, or larger, no dearer and quicker to start, as each node reads less. Pools that differ in
    price alone are searched once.
    """
    balances = Balances(question.expert_load)
    rated: dict[tuple[object, ...], tuple[list[Rated], list[RuledOut]]] = {}
    answers: list[tuple[Plan, ...] | NoPlan] = []
    for pool in pools:
        refused = _nonsense(question, pool)
        if refused is not None:
            answers.append(refused)
            continue
        kind = (pool.accelerator, pool.gpus_per_node, pool.max_nodes)
        if kind not in rated:
            rated[kind] = _rated(question, pool, Role.BOTH, balances)
        answers.append(_sizes(question, pool, usd_per_hour, balances, *rated[kind]))
    return answers


def plan_given(question: Question, pool: GpuPool, candidate: Candidate) -> Plan | NoPlan:
    """Of one candidate alone, as somebody has chosen it."""
    refused = _nonsense(question, pool)
    if refused is not None:
        return refused
    balances = Balances(question.expert_load)
    found = _survey(question, pool, balances, [candidate])
    if not found.options:
        return _no_plan(question, pool, found)
    return _plan(question, pool, found.options[0], found.options, found, balances)


def _sizes(
    question: Question,
    pool: GpuPool,
    usd_per_hour: float,
    balances: Balances,
    rated: list[Rated],
    ruled_out: list[RuledOut],
) -> tuple[Plan, ...] | NoPlan:
    found = _Survey([], list(ruled_out), len(rated) + len(ruled_out))
    _add_together(found, rated, pool, question.targets)
    if not found.options:
        return _no_plan(question, pool, _survey(question, pool, balances))
    prices = [option.usd_per_hour / option.groups for option in found.options]
    allowed = [
        option for option, price in zip(found.options, prices, strict=True) if price <= usd_per_hour
    ]
    if not allowed:
        return NoPlan(
            pool,
            question.targets,
            Constraint.PRICE,
            f"a group costs at least ${min(prices):.2f} an hour, and all groups together may cost "
            f"${usd_per_hour:.2f}",
            (f"a budget of ${min(prices):.2f} an hour is enough for one",),
        )
    best = _best(allowed, question.objective)
    more_copies = _with_copies(best, question, pool, balances)
    plans = [_plan(question, pool, more_copies, allowed, found, balances)]
    for option in _beside(best, allowed, pool):
        more = option.gpu_s_per_token / best.gpu_s_per_token - 1
        size = "smaller" if option.largest_group < best.largest_group else "quicker to start"
        why = f"{size} than the best, {more:+.0%} a token"
        option = _with_copies(option, question, pool, balances)
        plan = _plan(question, pool, option, allowed, found, balances)
        plans.append(replace(plan, why=why))
    return tuple(plans)


def _beside(best: _Option, options: list[_Option], pool: GpuPool) -> list[_Option]:
    """At most two: the smallest group that is worth its price, one between it and the best, or the
    smallest that starts so much quicker."""
    cheapest: dict[int, _Option] = {}
    for option in options:
        known = cheapest.get(option.largest_group)
        if known is None or option.gpu_s_per_token < known.gpu_s_per_token:
            cheapest[option.largest_group] = option
    smaller: list[_Option] = []
    quicker: list[_Option] = []
    for gpus in sorted(cheapest):
        option = cheapest[gpus]
        dearer = option.gpu_s_per_token / best.gpu_s_per_token
        if gpus < best.largest_group:
            least = min((o.gpu_s_per_token for o in smaller), default=inf)
            if dearer <= MOST_DEARER and option.gpu_s_per_token < least * (1 - EQUAL_SHARE):
                smaller.append(option)
        elif gpus > best.largest_group and dearer <= 1 + EQUAL_SHARE:
            gained = _start_s(option.rated, pool) / _start_s(best.rated, pool)
            if gained <= 1 - QUICKER_SHARE:
                quicker.append(option)
    if len(smaller) < SIZES:
        return (smaller + quicker)[: SIZES - 1]
    middle = (smaller[0].largest_group * best.largest_group) ** 0.5
    between = min(smaller[1:], key=lambda option: abs(log(option.largest_group / middle)))
    return [smaller[0], between]


@dataclass(slots=True)
class _Survey:
    """Every candidate of a pool: what it would deliver, or why it cannot be."""

    options: list[_Option]
    ruled_out: list[RuledOut]
    considered: int = 0


def _survey(
    question: Question,
    pool: GpuPool,
    balances: Balances,
    given: Sequence[Candidate] | None = None,
) -> _Survey:
    targets = question.targets
    survey = _Survey([], [])
    if given is not None:
        rated, ruled_out = _outcomes(given, question, pool, balances)
        survey.considered, survey.ruled_out = len(given), ruled_out
        _add_together(survey, rated, pool, targets)
        return survey
    for checkpoint in question.checkpoints:
        one = replace(question, checkpoints=(checkpoint,))
        by_role: dict[Role, list[Rated]] = {}
        for role in Role:
            by_role[role], ruled_out = _rated(one, pool, role, balances)
            survey.considered += len(by_role[role]) + len(ruled_out)
            if role is Role.BOTH or Serving.APART in question.serving:
                survey.ruled_out += ruled_out
        _add_together(survey, by_role[Role.BOTH], pool, targets)
        survey.options += _apart(by_role[Role.PREFILL], by_role[Role.DECODE], pool, targets)
    return survey


def _rated(
    question: Question, pool: GpuPool, role: Role, balances: Balances
) -> tuple[list[Rated], list[RuledOut]]:
    every = chain.from_iterable(
        candidates(checkpoint, pool, question.targets, role, question.kv)
        for checkpoint in question.checkpoints
    )
    return _outcomes(every, question, pool, balances)


def _outcomes(
    every: Iterable[Candidate | RuledOut], question: Question, pool: GpuPool, balances: Balances
) -> tuple[list[Rated], list[RuledOut]]:
    rated: list[Rated] = []
    ruled_out: list[RuledOut] = []
    for candidate in every:
        outcome: Rated | RuledOut
        if isinstance(candidate, RuledOut):
            outcome = candidate
        else:
            skew = _skew(candidate, pool, balances)
            outcome = rate(candidate, pool, question.targets, question.kv, skew)
        if isinstance(outcome, RuledOut):
            ruled_out.append(outcome)
        else:
            rated.append(outcome)
    return rated, ruled_out


def _add_together(survey: _Survey, rated: Iterable[Rated], pool: GpuPool, targets: Targets) -> None:
    for found in rated:
        option = _together(found, pool, targets)
        if isinstance(option, RuledOut):
            survey.ruled_out.append(option)
        else:
            survey.options.append(option)


def _nonsense(question: Question, pool: GpuPool) -> NoPlan | None:
    targets = question.targets

    def refuse(constraint: Constraint, problem: str, nearest: str) -> NoPlan:
        return NoPlan(pool, targets, constraint, problem, (nearest,))

    price = pool.usd_per_gpu_hour
    if not (isfinite(price) and price >= 0):
        return refuse(
            Constraint.PRICE, f"pool {pool.name}: a price of {price:g} $/h", "write 0 or more"
        )
    if pool.gpus_per_node < 1 or pool.max_nodes < 1:
        return refuse(Constraint.ROOM, f"pool {pool.name} has no GPUs", "give it a node with one")
    if pool.accelerator.memory_bytes <= 0 or pool.accelerator.memory_bytes_per_s <= 0:
        return refuse(
            Constraint.MEMORY,
            f"{pool.accelerator.name} has no memory or no bandwidth",
            "write what software can use of it, as in catalog/accelerators.yaml",
        )
    counts = (targets.input_tokens, targets.output_tokens, targets.context_tokens)
    if min(counts) < 1 or (targets.users is not None and targets.users < 1):
        return refuse(
            Constraint.TARGETS, "a request has at least one token in and one out", "write 1 or more"
        )
    if not (0 < targets.ttft_s < float("inf") and 0 < targets.tpot_s < float("inf")):
        return refuse(
            Constraint.TARGETS,
            f"TTFT {targets.ttft_s:g} s and TPOT {targets.tpot_s:g} s are no targets",
            "write seconds above 0",
        )
    if not 0 < targets.attainment <= 1:
        return refuse(
            Constraint.TARGETS,
            f"{targets.attainment:g} is no share of requests",
            "write a number above 0 and up to 1",
        )
    if targets.spare_groups < 0:
        return refuse(Constraint.TARGETS, "fewer than no spare groups", "write 0 or more")
    for checkpoint in question.checkpoints:
        longest = checkpoint.shape.max_position_embeddings
        if targets.context_tokens > longest > 0:
            return refuse(
                Constraint.CONTEXT,
                f"a context of {targets.context_tokens:,} tokens is beyond the model's "
                f"{longest:,} ({checkpoint.source})",
                f"{longest:,} is possible",
            )
    length = targets.input_tokens + targets.output_tokens
    if length > targets.context_tokens:
        return refuse(
            Constraint.CONTEXT,
            f"a request of {targets.input_tokens:,} + {targets.output_tokens:,} tokens does not "
            f"fit in a context of {targets.context_tokens:,}",
            f"a context of {length:,}, or shorter requests",
        )
    return None


def _together(rated: Rated, pool: GpuPool, targets: Targets) -> _Option | RuledOut:
    groups = groups_for(targets.users, rated.users, targets.spare_groups)
    if groups * rated.gpus > pool.max_gpus:
        room = pool.max_gpus // rated.gpus
        users = max(0, room - targets.spare_groups) * rated.users
        nodes = -(-groups * rated.gpus // pool.gpus_per_node)
        return RuledOut(
            rated.candidate,
            Constraint.ROOM,
            f"{groups} groups of {rated.gpus} GPUs; the pool has {pool.max_gpus}",
            f"{users:,} users in {room} groups, or {nodes} nodes for all",
            missing=-users,
        )
    full = (groups - targets.spare_groups) * rated.users
    users = full if targets.users is None else targets.users
    return _Option(
        parts=((rated, groups),),
        spare_groups=targets.spare_groups,
        tokens_per_s=users * rated.tokens_per_s / rated.users,
        users=users,
        usd_per_hour=groups * rated.gpus * pool.usd_per_gpu_hour,
    )


def _apart(
    prefill: list[Rated], decode: list[Rated], pool: GpuPool, targets: Targets
) -> Iterator[_Option]:
    """The cheapest groups of both kinds, as many of each as keep the other busy."""
    prompts = targets.input_tokens / targets.output_tokens
    for writer in _most_efficient(decode):
        for reader in _most_efficient(prefill):
            option = _ratio(reader, writer, prompts, pool, targets)
            if option is not None:
                yield option


def _most_efficient(rated: Iterable[Rated]) -> list[Rated]:
    return sorted(rated, key=lambda found: found.gpus / found.tokens_per_s)[:_SIZES_APART]


def _ratio(
    reader: Rated, writer: Rated, prompts: float, pool: GpuPool, targets: Targets
) -> _Option | None:
    best: _Option | None = None
    counts: Iterable[int] = range(1, _SIZES_APART + 1)
    if targets.users is not None:
        counts = (groups_for(targets.users, writer.users, 0),)
    for writers in counts:
        users = writers * writer.users if targets.users is None else targets.users
        tokens_per_s = users * writer.tokens_per_s / writer.users
        readers = -int(-tokens_per_s * prompts // reader.tokens_per_s)
        spare = targets.spare_groups
        gpus = (writers + spare) * writer.gpus + (readers + spare) * reader.gpus
        if gpus > pool.max_gpus:
            break
        option = _Option(
            parts=((reader, readers + spare), (writer, writers + spare)),
            spare_groups=spare,
            tokens_per_s=tokens_per_s,
            users=users,
            usd_per_hour=gpus * pool.usd_per_gpu_hour,
        )
        if best is None or option.gpu_s_per_token < best.gpu_s_per_token:
            best = option
    return best


def _best(options: list[_Option], objective: Objective) -> _Option:
    if objective is not Objective.CHEAPEST:
        return min(options, key=_order(objective))
    least = min(option.gpu_s_per_token for option in options)
    equal = [o for o in options if o.gpu_s_per_token <= least * (1 + EQUAL_SHARE)]
    return min(
        equal,
        key=lambda option: (
            option.largest_group,
            option.rated.candidate.batched_tokens is not None,
            option.gpu_s_per_token,
        ),
    )


def _plan(
    question: Question,
    pool: GpuPool,
    winner: _Option,
    allowed: list[_Option],
    found: _Survey,
    balances: Balances,
) -> Plan:
    reached = efficiency(pool.accelerator.era)
    tokens = reached.rate(winner.tokens_per_s)
    largest = max(winner.parts, key=lambda part: part[0].gpus)[0]
    shape = winner.rated.candidate.checkpoint.shape
    spread = widened(shape, pool.accelerator)
    apart = None
    if winner.serving is Serving.APART:
        apart = "the time that caches take from group to group is not counted"
    return Plan(
        pool=pool,
        checkpoint=winner.rated.candidate.checkpoint,
        targets=question.targets,
        objective=question.objective,
        serving=winner.serving,
        groups=tuple(
            _group(rated, n, pool, reached, balances, winner.copies) for rated, n in winner.parts
        ),
        users=winner.users,
        tokens_per_s=tokens,
        usd_per_hour=winner.usd_per_hour,
        usd_per_mtok=_usd_per_mtok(winner.usd_per_hour, tokens),
        energy=energy(pool.accelerator, winner.gpus, winner.tokens_per_s),
        availability=availability(
            winner.groups, largest.gpus, winner.spare_groups, _start_s(largest, pool)
        ),
        why=_why(winner, allowed, question.objective),
        notes=tuple(note for note in (spread, apart) if note),
        runners_up=_runners_up(winner, found.options, question),
        ruled_out=_nearest_of_each(found.ruled_out),
        considered=found.considered,
    )


def _usd_per_mtok(usd_per_hour: float, tokens: Range) -> Range:
    usd_per_mega_s = usd_per_hour / 3600 * 1e6
    return Range(
        low=usd_per_mega_s / tokens.high,
        expected=usd_per_mega_s / tokens.expected,
        high=usd_per_mega_s / tokens.low,
    )


def _group(
    rated: Rated,
    count: int,
    pool: GpuPool,
    reached: Efficiency,
    balances: Balances,
    copies: tuple[RedundancyOption, ...],
) -> GroupPlan:
    layout, memory = rated.candidate.layout, rated.memory
    prefill = rated.candidate.role is Role.PREFILL
    return GroupPlan(
        role=rated.candidate.role,
        count=count,
        layout=layout,
        backend=rated.candidate.backend,
        batched_tokens=rated.candidate.batched_tokens,
        nodes=layout.nodes(pool.gpus_per_node),
        memory=memory,
        kv_tokens=memory.kv_tokens * layout.data,
        max_concurrency=memory.max_sequences(memory.context_tokens) * layout.data,
        batch_per_rank=rated.batch_per_rank,
        users=0 if prefill else rated.users,
        tokens_per_s=reached.rate(rated.tokens_per_s),
        tpot_s=reached.time(rated.tpot_s),
        ttft_s=reached.time(rated.ttft_s),
        limit=rated.limit,
        time_limit=rated.time_limit,
        overlapped=rated.overlapped,
        usd_per_hour=rated.gpus * pool.usd_per_gpu_hour,
        rates=rated.rates,
        start_s=_start_s(rated, pool),
        balance=_balance(rated.candidate, pool, balances),
        copies=copies,
    )


def _balance(candidate: Candidate, pool: GpuPool, balances: Balances) -> Balance | None:
    return balances.of(candidate.checkpoint.shape, candidate.layout, pool.gpus_per_node)


def _skew(candidate: Candidate, pool: GpuPool, balances: Balances) -> float:
    found = _balance(candidate, pool, balances)
    return 1.0 if found is None else found.skew


def _with_copies(option: _Option, question: Question, pool: GpuPool, balances: Balances) -> _Option:
    """With as many redundant experts as pay for their memory: candidates have few of them."""
    candidate = option.rated.candidate
    shape, layout = candidate.checkpoint.shape, candidate.layout
    if option.serving is Serving.APART or not layout.expert_parallel or not movable_experts(shape):
        return option
    assert shape.experts is not None
    tried: dict[int, Rated] = {layout.redundant_experts: option.rated}

    def with_so_many(redundant: int) -> Candidate:
        return replace(candidate, layout=replace(layout, redundant_experts=redundant))

    def balance(redundant: int) -> float:
        found = _balance(with_so_many(redundant), pool, balances)
        return 1.0 if found is None else found.after

    def tokens_per_s(_: float, redundant: int) -> float:
        if redundant not in tried:
            other = with_so_many(redundant)
            skew = _skew(other, pool, balances)
            rated = rate(other, pool, question.targets, question.kv, skew)
            if isinstance(rated, RuledOut):
                return 0.0
            tried[redundant] = rated
        return tried[redundant].tokens_per_s

    found = redundancy(
        redundant_counts(shape.experts.count, layout.expert, MOST_EXTRA_SLOTS),
        layout.expert,
        expert_slot_bytes(shape),
        balance,
        tokens_per_s,
        equal_share=EQUAL_COPIES,
    )
    option = replace(option, copies=found.options)
    more = tried[found.best.redundant]
    if more.tokens_per_s <= option.rated.tokens_per_s * (1 + EQUAL_COPIES):
        return option
    better = _together(more, pool, question.targets)
    return option if isinstance(better, RuledOut) else replace(better, copies=found.options)


def _start_s(rated: Rated, pool: GpuPool) -> float:
    return start_s(rated.memory.weights, rated.candidate.layout, pool.gpus_per_node)


def _why(winner: _Option, options: list[_Option], objective: Objective) -> str:
    met = f"{len(options)} ways meet the targets"
    if objective is Objective.SMALLEST:
        return f"{met}; none needs fewer than {winner.gpus} GPUs"
    if objective is Objective.FASTEST:
        lone_ms = winner.rated.lone_tpot_s * 1000
        return f"{met}; none is faster for a user alone than {lone_ms:.1f} ms a token"
    least = min(option.gpu_s_per_token for option in options)
    if winner.gpu_s_per_token > least:
        more = winner.gpu_s_per_token / least - 1
        return (
            f"{met}; the cheapest ones differ by {more:.1%}, less than predictions are good for, "
            "so the smallest groups win: less is lost with one"
        )
    return f"{met}; this one costs least for a token of output"


def _runners_up(
    winner: _Option, options: list[_Option], question: Question
) -> tuple[RunnerUp, ...]:
    """The best of each other layout, size or format, in the order of the objective."""
    best: dict[tuple[object, ...], _Option] = {_kind(winner): winner}
    for option in options:
        known = best.get(_kind(option))
        if known is None or (
            known is not winner
            and _order(question.objective)(option) < _order(question.objective)(known)
        ):
            best[_kind(option)] = option
    rest = sorted((o for o in best.values() if o is not winner), key=_order(question.objective))
    return tuple(_runner_up(winner, option, question) for option in rest[:RUNNERS_UP])


def _kind(option: _Option) -> tuple[object, ...]:
    """Options of one kind differ in little; apart from the winner one of each is worth showing."""
    if option.serving is Serving.APART:
        return (Serving.APART,)
    candidate = option.rated.candidate
    return (candidate.checkpoint.source, option.rated.gpus, candidate.layout.expert_parallel)


def _order(objective: Objective) -> Callable[[_Option], tuple[float, ...]]:
    if objective is Objective.SMALLEST:
        return lambda option: (option.gpus, option.gpu_s_per_token)
    if objective is Objective.FASTEST:
        return lambda option: (option.rated.lone_tpot_s, option.gpu_s_per_token)
    return lambda option: (option.gpu_s_per_token, option.gpus)


def _runner_up(winner: _Option, option: _Option, question: Question) -> RunnerUp:
    more = option.gpu_s_per_token / winner.gpu_s_per_token - 1
    if option.serving not in question.serving:
        constraint, why = Constraint.SERVING, "ExpertMesh does not start such groups"
    elif question.objective is Objective.SMALLEST and option.gpus > winner.gpus:
        constraint, why = Constraint.SIZE, f"{option.gpus - winner.gpus} GPUs more"
    elif question.objective is Objective.FASTEST:
        constraint = Constraint.SPEED
        why = f"{option.rated.lone_tpot_s * 1000:.1f} ms a token for a user alone"
    elif more <= EQUAL_SHARE and option.largest_group >= winner.largest_group:
        constraint, why = Constraint.SIZE, "as cheap, and no smaller"
    else:
        constraint, why = Constraint.PRICE, f"{more:+.0%} a token"
    why = f"{why}; bound by {option.rated.limit}"
    return RunnerUp(
        name=option.name,
        source=option.rated.candidate.checkpoint.source,
        serving=option.serving,
        gpus=option.gpus,
        users=option.users,
        usd_per_mtok=option.usd_per_mtok,
        lone_tpot_s=option.rated.lone_tpot_s,
        constraint=constraint,
        why=why,
    )


def _nearest_of_each(ruled_out: Iterable[RuledOut]) -> tuple[RuledOut, ...]:
    nearest: dict[Constraint, RuledOut] = {}
    for loser in ruled_out:
        known = nearest.get(loser.constraint)
        if known is None or loser.missing < known.missing:
            nearest[loser.constraint] = loser
    return tuple(nearest.values())


def _no_plan(
    question: Question,
    pool: GpuPool,
    found: _Survey,
) -> NoPlan:
    targets = question.targets
    losers = _nearest_of_each(found.ruled_out)
    nearest = {loser.constraint: loser for loser in losers}
    if not nearest:
        return NoPlan(
            pool, targets, Constraint.TARGETS, "no checkpoint was given", ("name a model",)
        )
    by_need = (
        Constraint.ROOM,
        Constraint.TPOT,
        Constraint.TTFT,
        Constraint.MEMORY,
        *(constraint for constraint in Constraint if constraint in nearest),
    )
    constraint = next(c for c in by_need if c in nearest)
    loser = nearest[constraint]
    problem = f"{loser.candidate}: {loser.problem}"
    possible = [loser.possible] if loser.possible else []
    if constraint is Constraint.MEMORY:
        problem = (
            f"does not fit: {loser.missing / 2**30:,.0f} GiB short over {loser.candidate} "
            f"({loser.problem})"
        )
        possible = list(_more_memory(question, pool, found.ruled_out))
    elif constraint in (Constraint.TPOT, Constraint.TTFT):
        best = {c: nearest[c].missing for c in (Constraint.TPOT, Constraint.TTFT) if c in nearest}
        name = constraint.value.upper()
        target_s = targets.tpot_s if constraint is Constraint.TPOT else targets.ttft_s
        problem = (
            f"no group meets the targets: the best {name} is {best[constraint] * 1000:,.0f} ms "
            f"({loser.candidate}, one user a rank), the target {target_s * 1000:,.0f} ms"
        )
        possible = [f"a {name} of {_rounded_up(best[constraint])} s is possible in this pool"]
    others = [option for option in found.options if option.serving not in question.serving]
    if others:
        other = _best(others, question.objective)
        possible.append(f"serving {other.serving} would meet the targets: {other.name}")
    return NoPlan(
        pool,
        targets,
        constraint,
        problem,
        tuple(possible),
        losers,
        found.considered,
    )


def _more_memory(question: Question, pool: GpuPool, ruled_out: list[RuledOut]) -> Iterator[str]:
    """The smallest larger group that would fit, and the longest context that does."""
    targets = question.targets
    longest = 0
    for loser in ruled_out:
        if loser.constraint is Constraint.MEMORY:
            plan = memory_of(loser.candidate, pool.accelerator, targets.context_tokens, question.kv)
            longest = max(longest, plan.longest_context_tokens)
    larger = replace(pool, max_nodes=max(1, LARGEST_GROUP_GPUS // pool.gpus_per_node))
    found: Candidate | None = None
    for checkpoint in question.checkpoints:
        for candidate in candidates(checkpoint, larger, targets, Role.BOTH, question.kv):
            if not isinstance(candidate, Candidate) or (
                found is not None and candidate.layout.world_size >= found.layout.world_size
            ):
                continue
            if memory_of(candidate, pool.accelerator, targets.context_tokens, question.kv).fits:
                found = candidate
    if found is not None:
        yield f"{found.layout.world_size} GPUs of this kind would hold it ({found})"
    elif not longest:
        yield "no number of these GPUs holds it; take a larger kind or a smaller format"
    if longest:
        yield f"a context of {longest:,} tokens would fit here"


def _rounded_up(seconds: float) -> str:
    """To two digits, so that it is possible as written."""
    return f"{seconds * 1.05:.2g}"
