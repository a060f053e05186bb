"""What a decision expected, and what later records of the journal say happened."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from expertmesh.core.domain.fleet import GroupState
from expertmesh.core.scaling.contract import ActionKind, Decision, GroupRecord
from expertmesh.core.scaling.kinds import option_name
from expertmesh.core.scaling.policy import question_at
from expertmesh.core.scaling.replay import DecisionRecord

_ENDED = (GroupState.LOST, GroupState.GONE)
_SLACK_S = 90.0
"""The journal has an entry at least every minute: what is further away is another moment."""


@dataclass(frozen=True, slots=True)
class Start:
    group: str
    option: str
    usd_per_hour: float
    ready_in_s: float | None
    """As expected, or as it was; None: not known, or it never was."""
    fate: str = ""
    """Of a start that is over, or not yet: `ready`, `failed`, `given up`, `still starting`."""


@dataclass(frozen=True, slots=True)
class Expected:
    starts: tuple[Start, ...]
    horizon_s: float
    """In which the quickest group could be ready."""
    load: float
    """Then, in units of a group; `spare` above it is kept in hand."""
    spare: float
    by_tokens: bool
    """Otherwise the load is that of now, and nothing is forecast."""
    wait_s: float | None
    """For a request that came at once; None: the queue grows, or it is not known."""
    usd_per_hour: float
    """Of all groups that are there after it."""


@dataclass(frozen=True, slots=True)
class Happened:
    until_s: float
    """After the decision: the last record that was looked at."""
    starts: tuple[Start, ...]
    load: float | None
    """When the horizon had passed; None: no record of about then."""
    load_error: float | None
    """That load less the expected one."""
    most_wait_s: float
    """Oldest wait in a queue until the horizon had passed."""
    usd_per_hour: float | None
    """Of all groups when the horizon had passed."""


def expected(record: DecisionRecord) -> Expected:
    decision = record.decision
    asked = {a.group for a in decision.actions if a.kind is ActionKind.START}
    starts = tuple(
        Start(
            group=group.spec.name,
            option=option_name(group.spec),
            usd_per_hour=group.spec.usd_per_hour,
            ready_in_s=_since(group.expected_ready_at_s, record.now_s),
        )
        for group in decision.state.groups
        if group.spec.name in asked
    )
    wait_s = decision.load.wait_s
    return Expected(
        starts=starts,
        horizon_s=horizon_s(record),
        load=decision.load.expected,
        spare=decision.load.spare,
        by_tokens=decision.load.by_tokens,
        wait_s=wait_s if math.isfinite(wait_s) else None,
        usd_per_hour=_usd_per_hour(decision),
    )


def horizon_s(record: DecisionRecord) -> float:
    """The quickest start, as the forecast looks ahead."""
    question = question_at(record.config, record.before, record.observation, record.now_s)
    offered = [kind.start_s for kind in question.kinds.all if kind.is_offered]
    return min(offered, default=0.0)


def happened(record: DecisionRecord, later: Iterable[DecisionRecord]) -> Happened | None:
    """`later`: records of the same model, in their order; those from before are left out."""
    after = [each for each in later if each.now_s > record.now_s]
    if not after:
        return None
    wanted = expected(record)
    due_s = record.now_s + wanted.horizon_s
    then = nearest(after, due_s)
    load = then.decision.load.now if then is not None and wanted.by_tokens else None
    until = [each for each in after if each.now_s <= due_s] or after[:1]
    return Happened(
        until_s=after[-1].now_s - record.now_s,
        starts=tuple(_fate(start, record.now_s, after) for start in wanted.starts),
        load=load,
        load_error=load - wanted.load if load is not None else None,
        most_wait_s=max(each.decision.demand.oldest_wait_s for each in until),
        usd_per_hour=_usd_per_hour(then.decision) if then is not None else None,
    )


def nearest(records: list[DecisionRecord], at_s: float) -> DecisionRecord | None:
    """The last record until then, for it holds until the next; None when it is too old, or the
    records end before."""
    found = None
    for record in records:
        if record.now_s > at_s:
            return found if found is not None and at_s - found.now_s <= _SLACK_S else None
        found = record
    return found if found is not None and found.now_s == at_s else None


def _fate(start: Start, asked_at_s: float, after: list[DecisionRecord]) -> Start:
    fate, ready_in_s = "still starting", None
    for record in after:
        group = _group(record, start.group)
        if group is not None and group.served:
            # It became ready between two records, and says when if it still is.
            at_s = group.since_s if group.state is GroupState.READY else record.now_s
            fate, ready_in_s = "ready", at_s - asked_at_s
            break
        steps = [s for s in record.decision.transitions if s.group == start.group]
        if any(step.after is GroupState.READY for step in steps):
            fate, ready_in_s = "ready", record.now_s - asked_at_s
            break
        if (group is not None and group.failed_start) or any(
            step.after in _ENDED and step.before is GroupState.STARTING for step in steps
        ):
            fate = "failed"
            break
        if group is None or group.state is GroupState.DRAINING:
            fate = "given up"
            break
    return Start(start.group, start.option, start.usd_per_hour, ready_in_s, fate)


def _group(record: DecisionRecord, name: str) -> GroupRecord | None:
    return next((g for g in record.decision.state.groups if g.spec.name == name), None)


def _usd_per_hour(decision: Decision) -> float:
    return sum(group.spec.usd_per_hour for group in decision.state.groups)


def _since(at_s: float | None, now_s: float) -> float | None:
    return None if at_s is None else at_s - now_s
