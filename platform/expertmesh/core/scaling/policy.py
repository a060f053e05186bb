"""How many groups of one model there should be, of which kinds, and why.

One decision, in order: what is there (`look`), what the load needs (`need`), what there should be:
the cheapest mix that carries the load, within bounds (`question`, `target`), and what to do about
it: end drains, recall, start (`start`), release (`release`), change to a new version (`roll`).
"""

import math
from dataclasses import replace

from expertmesh.core.domain.deployment import ScalingMode
from expertmesh.core.scaling.contract import (
    Binding,
    Decision,
    ModelState,
    Observation,
    ScalingConfig,
)
from expertmesh.core.scaling.look import adopt, advance_groups
from expertmesh.core.scaling.need import count_spending, learn_rates, measure_demand, measure_load
from expertmesh.core.scaling.question import Question, lifts_of, problem_of, question_of
from expertmesh.core.scaling.release import end_drains, leave_taken_nodes, release
from expertmesh.core.scaling.roll import roll
from expertmesh.core.scaling.start import fill
from expertmesh.core.scaling.target import find_target
from expertmesh.core.scaling.turn import Turn, age_key
from expertmesh.core.scaling.wording import pending_of, reason_of

LONGEST_SLEEP_S = 60.0
"""A journal entry and a gateway's clock need no more often than this."""


def decide(
    config: ScalingConfig, state: ModelState, observation: Observation, now_s: float
) -> Decision:
    """One decision for one model; the caller records it and only then acts on it."""
    decision = _run(Turn(config, state, observation, now_s))
    if config.rules.mode is ScalingMode.ADVISE:
        acting = replace(config, rules=replace(config.rules, mode=ScalingMode.ACT))
        advice = _run(Turn(acting, state, observation, now_s)).actions
        decision = replace(decision, advice=advice)
        would = ", ".join(f"{action.kind} {action.group}" for action in advice)
        if would:
            decision = replace(decision, reason=f"{decision.reason}; would {would}")
    return decision


def question_at(
    config: ScalingConfig, state: ModelState, observation: Observation, now_s: float
) -> Question:
    """The question that `decide` answers, for those who explain its answer."""
    turn = Turn(config, state, observation, now_s)
    _look(turn)
    return question_of(turn)


def _run(turn: Turn) -> Decision:
    _look(turn)
    _find_target(turn)
    end_drains(turn)
    if turn.may_act():
        leave_taken_nodes(turn)
        fill(turn)
        release(turn)
        roll(turn)
    return _decision(turn)


def _look(turn: Turn) -> None:
    adopt(turn)
    advance_groups(turn)
    measure_demand(turn)
    learn_rates(turn)
    measure_load(turn)
    count_spending(turn)


def _find_target(turn: Turn) -> None:
    problem, obstacles = problem_of(turn), lifts_of(turn)
    turn.target = find_target(problem, obstacles)
    if turn.why_unseen() is not None:
        counts = turn.counts_of(turn.active())
        there = {kind.name: counts[kind.name] for kind in turn.kinds.all}
        turn.target = replace(turn.target, kept=there)
    if turn.binding is Binding.LOAD:
        turn.binding = turn.target.binding
    if not turn.may_plan():
        turn.binding = Binding.MODE


def _decision(turn: Turn) -> Decision:
    blind = turn.why_unseen()
    by_load = math.ceil(turn.load.needed - 1e-9)
    if blind is not None and len(turn.active()) > max(by_load, turn.rules.min_groups):
        turn.binding = Binding.UNSEEN
    need = max(turn.rules.min_groups, min(turn.rules.max_groups, by_load))
    wanted = sum(
        max(count, turn.target.kept.get(name, 0)) for name, count in turn.target.counts.items()
    )
    wanted = min(max(wanted, turn.rules.min_groups), turn.rules.max_groups)
    if blind is not None:
        wanted = max(wanted, min(turn.before.wanted, turn.rules.max_groups))
    state = ModelState(
        wanted=wanted,
        next_n=turn.next_n,
        groups=tuple(sorted(turn.groups.values(), key=age_key)),
        seen_at_s=turn.now_s,
        idle_since_s=turn.idle_since_s,
        rise=turn.rise,
        peak=turn.peak,
        work=turn.work,
        forecast=turn.forecast,
        learned=turn.learned,
        zones=turn.zones,
        spending=turn.spending,
        backoff=turn.backoff,
        start_s=turn.start_s,
    )
    wakes_s = [at_s for at_s in turn.wakes_s if at_s > turn.now_s]
    decision = Decision(
        model=turn.config.model,
        state=state,
        actions=tuple(turn.actions),
        transitions=tuple(turn.transitions),
        demand=turn.demand,
        load=turn.load,
        need=need,
        target={name: n for name, n in turn.target.counts.items() if n},
        binding=turn.binding,
        pending=pending_of(turn.obstacles),
        reason="",
        wake_at_s=min([*wakes_s, turn.now_s + LONGEST_SLEEP_S]),
    )
    if turn.binding is Binding.UNSEEN:
        turn.notes.append(f"not scaling down: {blind}")
    elif turn.may_plan() and not turn.may_act():
        turn.notes.append(f"holding: {blind}")
    return replace(decision, reason=reason_of(turn.config, decision, tuple(turn.notes)))
