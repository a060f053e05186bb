"""A decision in one sentence, with the numbers that it rests on."""

import math
from collections.abc import Sequence

from expertmesh.core.domain.fleet import GroupState
from expertmesh.core.scaling.contract import (
    ActionKind,
    Binding,
    Decision,
    GroupRecord,
    ScalingConfig,
)

_MOST_OBSTACLES = 3
_VERBS = {
    ActionKind.START: "starting",
    ActionKind.DRAIN: "draining",
    ActionKind.RECALL: "recalling",
    ActionKind.REMOVE: "removing",
}


def reason_of(config: ScalingConfig, decision: Decision, notes: tuple[str, ...]) -> str:
    parts = [f"{_work(config, decision)}; {_groups_there(decision)}", *notes]
    done = {action.group for action in decision.actions}
    parts += [
        f"{step.group} is {step.after}: {step.why or 'all ranks answer'}"
        for step in decision.transitions
        if step.group not in done or step.after is GroupState.LOST
    ]
    parts += [f"{_VERBS[act.kind]} {act.group}: {act.why}" for act in decision.actions]
    if decision.binding is Binding.EXTERNAL:
        parts.append("a provider serves this load for less than a group")
    if decision.pending is not None:
        parts.append(decision.pending)
    return "; ".join(parts)


def _work(config: ScalingConfig, decision: Decision) -> str:
    demand, load, rules = decision.demand, decision.load, config.rules
    by_load = math.ceil(load.needed - 1e-9)
    if load.by_tokens:
        work = decision.state.work
        text = (
            f"{work.arrivals_per_s:.3g} requests/s of {work.prompt_tokens:.0f} + "
            f"{work.output_tokens:.0f} tokens and {demand.queued} queued are a load of "
            f"{load.now:.2f} groups, {load.needed:.2f} with {load.spare:.2f} in hand: "
        )
        mixed = len({option.parallelism for option in config.options}) > 1
        if mixed:
            # Groups of several sizes are not counted against one limit by the load alone.
            text += f"as much as {groups(by_load)} of {config.options[0].name}"
            return text + _by_rules(config, decision)
        text += f"{groups(by_load)} needed"
    else:
        in_flight = rules.target_in_flight_per_group
        text = (
            f"{demand.queued} queued and {demand.running} running requests at "
            f"{in_flight:g} per group need {groups(by_load)}"
        )
    if decision.need > by_load:
        text += f", {decision.need} with min {rules.min_groups}"
    elif decision.need < by_load:
        text += f", {decision.need} with max {rules.max_groups}"
    return text


def _by_rules(config: ScalingConfig, decision: Decision) -> str:
    wanted = sum(decision.target.values())
    if decision.binding is Binding.MAX_GROUPS:
        return f", and max {config.rules.max_groups} allows {groups(wanted)}"
    if decision.binding is Binding.MIN_GROUPS:
        return f", and min {config.rules.min_groups} wants {groups(wanted)}"
    return ""


def _groups_there(decision: Decision) -> str:
    active = [
        record
        for record in decision.state.groups
        if record.removed_at_s is None and record.state is not GroupState.DRAINING
    ]
    ready = sum(record.state is GroupState.READY for record in active)
    text = f"{decision.state.wanted} wanted, {ready} ready"
    coming = [record for record in active if record.state is not GroupState.READY]
    if coming:
        text += f" and {len(coming)} on the way ({', '.join(map(_on_the_way, coming))})"
    return text


def _on_the_way(record: GroupRecord) -> str:
    state = record.message if record.state is GroupState.STARTING else record.state.value
    return f"{record.spec.name} {state}"


def pending_of(obstacles: Sequence[str]) -> str | None:
    """The first of what stands in the way, and how much more there is."""
    if not obstacles:
        return None
    different = list(dict.fromkeys(obstacles))
    said = ", ".join(different[:_MOST_OBSTACLES])
    more = len(different) - _MOST_OBSTACLES
    return f"pending: {said}" + (f" and {more} more" if more > 0 else "")


def groups(count: int) -> str:
    return "1 group" if count == 1 else f"{count} groups"


def binding_words(config: ScalingConfig, decision: Decision) -> str:
    """What keeps the number of groups from being another one, in words."""
    rules, money = config.rules, []
    if rules.usd_per_hour_budget is not None:
        money.append(f"${rules.usd_per_hour_budget:.2f}/h")
    if rules.usd_per_day_budget is not None:
        money.append(f"${rules.usd_per_day_budget:.2f}/day")
    words = {
        Binding.LOAD: "the load: there are as many groups as it needs",
        Binding.MIN_GROUPS: f"min_groups of {rules.min_groups}",
        Binding.MAX_GROUPS: f"max_groups of {rules.max_groups}",
        Binding.BUDGET: f"the budget of {' and '.join(money)}",
        Binding.GRANT: "other models, which have the rest of a pool or of the platform's budget",
        Binding.ROOM: "the room in the pools",
        Binding.BACKOFF: "starts that failed lately, or a zone that was lost",
        Binding.HOLD: "groups are held for as long as starting them again would take",
        Binding.DELAY: f"the higher need must last {rules.up_delay_s:g} s",
        Binding.UNSEEN: "what cannot be seen is no reason to scale down",
        Binding.MODE: f"mode {rules.mode}: the groups are left as they are",
        Binding.EXTERNAL: "a provider, which serves the load for less",
    }
    return words[decision.binding]
