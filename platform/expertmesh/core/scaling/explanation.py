"""Why a recorded decision is what it is: recomputed from the record, since deciding is pure."""

from collections.abc import Iterable
from dataclasses import dataclass

from expertmesh.core.domain.deployment import ScalingMode
from expertmesh.core.domain.fleet import GroupState
from expertmesh.core.scaling.candidates import Candidate, choice_of
from expertmesh.core.scaling.contract import Action, Binding, Load
from expertmesh.core.scaling.counterfactual import Counterfactual, counterfactuals
from expertmesh.core.scaling.demand import Demand
from expertmesh.core.scaling.outcome import Expected, Happened, expected, happened
from expertmesh.core.scaling.policy import question_at
from expertmesh.core.scaling.replay import DecisionRecord, replay
from expertmesh.core.scaling.wording import binding_words


@dataclass(frozen=True, slots=True)
class Input:
    source: str
    """`gateway NAME`, `group NAME`, `pool NAME`."""
    age_s: float | None
    """When it was said; None: seen at the moment of the decision, or not at all."""
    says: str
    is_believed: bool = True
    """False: too old, so it forbids scaling down or does not count."""


@dataclass(frozen=True, slots=True)
class Explanation:
    model: str
    now_s: float
    mode: ScalingMode
    sentence: str
    inputs: tuple[Input, ...]
    demand: Demand
    load: Load
    horizon_s: float
    """Over which costs are compared."""
    need: int
    wanted: int
    actions: tuple[Action, ...]
    advice: tuple[Action, ...]
    pending: str | None
    candidates: tuple[Candidate, ...]
    """The chosen one first, the others by cost."""
    binding: Binding
    binding_words: str
    counterfactuals: tuple[Counterfactual, ...]
    expected: Expected
    happened: Happened | None
    """None: the journal has no later record."""
    replays: bool
    """False: this version decides otherwise, so candidates and counterfactuals are this version's
    and not those of the one that decided."""


def explain(
    record: DecisionRecord,
    later: Iterable[DecisionRecord] = (),
    *,
    with_counterfactuals: bool = True,
) -> Explanation:
    """`later`: records of the same model, in their order. Counterfactuals decide a hundred times
    again."""
    decision = record.decision
    choice = choice_of(question_at(record.config, record.before, record.observation, record.now_s))
    return Explanation(
        model=decision.model,
        now_s=record.now_s,
        mode=record.config.rules.mode,
        sentence=decision.reason,
        inputs=inputs_of(record),
        demand=decision.demand,
        load=decision.load,
        horizon_s=choice.question.kinds.horizon_s,
        need=decision.need,
        wanted=decision.state.wanted,
        actions=decision.actions,
        advice=decision.advice,
        pending=decision.pending,
        candidates=choice.candidates,
        binding=decision.binding,
        binding_words=binding_words(record.config, decision),
        counterfactuals=counterfactuals(record, choice) if with_counterfactuals else (),
        expected=expected(record),
        happened=happened(record, later),
        replays=replay(record).equal,
    )


def inputs_of(record: DecisionRecord) -> tuple[Input, ...]:
    """All that was seen, with its age."""
    return (*_gateways(record), *_groups(record), *_pools(record), *_doubts(record))


def _gateways(record: DecisionRecord) -> list[Input]:
    timing, found = record.config.timing, []
    for seen in record.observation.gateways:
        age_s = record.now_s - seen.heard_at_s
        says = f"{max(seen.queued, seen.waking)} queued"
        if seen.oldest_wait_s > 0:
            says += f" (oldest {seen.oldest_wait_s:.1f} s)"
        says += f", {sum(seen.in_flight.values())} in flight"
        if seen.flow is not None:
            says += f", {seen.flow.arrivals_per_s:.3g} arrivals/s"
        if age_s > timing.gateway_forget_s:
            says += "; forgotten"
        elif age_s > timing.gateway_stale_s:
            says += "; silent"
        believed = age_s <= timing.gateway_stale_s
        found.append(Input(f"gateway {seen.gateway}", age_s, says, believed))
    return found


def _groups(record: DecisionRecord) -> list[Input]:
    found = []
    known = {each.spec.name: each for each in record.before.groups}
    for seen in record.observation.groups:
        doing, state = seen.doing, known.get(seen.name)
        parts = [state.state.value if state else "not known yet"]
        if seen.application is not None and seen.application.status != "RUNNING":
            parts.append(f"Serve says {seen.application.status}")
        mute = sum(rank.failures > 0 for rank in seen.ranks)
        if mute:
            parts.append(f"{mute} of {len(seen.ranks)} ranks do not answer")
        if doing is not None:
            parts.append(f"{doing.running} running, {doing.waiting} waiting")
            parts.append(f"KV {doing.kv_usage:.0%}")
            parts.append(f"{doing.output_tokens_per_s:.3g} tokens/s")
            if doing.tpot_s is not None:
                parts.append(f"TPOT {doing.tpot_s * 1000:.0f} ms")
        if seen.leaving_at_s is not None:
            parts.append(f"a node leaves in {max(0.0, seen.leaving_at_s - record.now_s):.0f} s")
        age_s = record.now_s - doing.at_s if doing is not None else None
        ready = state is not None and state.state is GroupState.READY
        believed = doing is None or age_s is None or age_s <= record.config.timing.gateway_stale_s
        if ready and doing is None:
            parts.append("no figures of its engines")
        found.append(Input(f"group {seen.name}", age_s, ", ".join(parts), believed))
    return found


def _pools(record: DecisionRecord) -> list[Input]:
    found = []
    for seen in record.observation.pools:
        live = "nodes not listed" if seen.live_workers is None else f"{seen.live_workers} workers"
        says = f"{live}, {seen.used_elsewhere} used by other models"
        backoff = record.before.backoff.get(seen.name)
        if backoff is not None and backoff.until_s > record.now_s:
            left_s = backoff.until_s - record.now_s
            says += f"; {backoff.failures} failed starts, left alone for {left_s:.0f} s"
        found.append(Input(f"pool {seen.name}", None, says))
    for name, zone in sorted(record.decision.state.zones.items()):
        if zone.lost_at_s is not None:
            age_s = record.now_s - zone.lost_at_s
            found.append(Input(f"zone {name}", age_s, "lost", zone.is_admitted(record.now_s)))
    return found


def _doubts(record: DecisionRecord) -> list[Input]:
    seen, found = record.observation, []
    if not seen.serve_answers:
        found.append(Input("Serve", None, "does not answer", is_believed=False))
    if not seen.journal_writes:
        found.append(Input("journal", None, "cannot be written", is_believed=False))
    if not seen.settled:
        found.append(Input("controller", None, "has just started", is_believed=False))
    if seen.grant is not None:
        found.append(Input("platform", None, seen.grant.why or "other models compete"))
    return found
