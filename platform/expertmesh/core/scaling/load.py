"""The load of a model in units of one group, from what waits, runs, arrives and has been done."""

from collections.abc import Iterable
from dataclasses import dataclass

from expertmesh.core.domain.slo import Slo
from expertmesh.core.scaling.contract import Load
from expertmesh.core.scaling.demand import Demand, GroupDoing
from expertmesh.core.scaling.kinds import Kind, Kinds
from expertmesh.core.scaling.learning import speed_of
from expertmesh.core.scaling.work import Work

_FULL = 1.02
"""A queue that waits too long shows that the groups carry more than they can, whatever else says
that they do not."""
_SETTLED_S = 60.0
"""A group that has just become ready has not yet finished what it was sent."""
_MOST_OVERLOAD = 2.0
"""Longer answers also make fewer requests finish, for a while."""


@dataclass(frozen=True, slots=True)
class Serving:
    """A group that answers requests, or will."""

    kind: Kind
    ready_for_s: float | None
    """None: it is on the way."""
    in_flight: int
    doing: GroupDoing | None
    stays: bool = True
    """False: it serves until its node is taken away, and is not counted on."""


def measure_load(
    kinds: Kinds,
    serving: Iterable[Serving],
    demand: Demand,
    work: Work,
    slo: Slo,
    *,
    waking: bool = False,
) -> Load:
    """`waking`: the groups work off the queue of a cold start, so what they do is more than comes,
    and a long wait does not mean that they are full."""
    serving = tuple(serving)
    ready = sum(
        kinds.capacity(group.kind)
        for group in serving
        if group.ready_for_s is not None and group.stays
    )
    coming = sum(kinds.capacity(group.kind) for group in serving if group.ready_for_s is None)
    unit = kinds.unit
    if unit is None:
        return Load()
    if not kinds.by_tokens or unit.seconds is None:
        now = demand.work / unit.rates.in_flight
        return Load(now=now, needed=now, expected=now, ready=ready, coming=coming)
    served = sum(
        kinds.capacity(group.kind) * _use(group, work, slo)
        for group in serving
        if group.ready_for_s is not None
    )
    arriving = work.arrivals_per_s * unit.seconds
    # Two measurements of one thing; while requests wait or go elsewhere, less is served than comes.
    elsewhere = demand.flow.external_per_s > 0
    known_apart = demand.queued or elsewhere or not ready
    now = max(served, arriving) if known_apart else (served + arriving) / 2
    if waking:
        now = arriving
    settled = not waking and all(
        group.ready_for_s >= _SETTLED_S for group in serving if group.ready_for_s is not None
    )
    if demand.queued and demand.oldest_wait_s > slo.ttft_s and ready > 0 and settled:
        now = max(now, ready * _overload(work))
    return Load(
        now=now,
        ready=ready,
        coming=coming,
        backlog_s=demand.queued * unit.seconds,
        by_tokens=True,
    )


def _overload(work: Work) -> float:
    """How much more comes than groups that are full get done."""
    if work.done_per_s <= 0:
        return _MOST_OVERLOAD
    return min(_MOST_OVERLOAD, max(_FULL, work.arrivals_per_s / work.done_per_s))


def _use(group: Serving, work: Work, slo: Slo) -> float:
    """Share of what a group can do that it does: by its speed where that tells it, else by the
    tokens of its work or the places taken."""
    kind, doing = group.kind, group.doing
    places = group.in_flight / kind.rates.in_flight
    if doing is None:
        return places
    speed = speed_of(doing, kind.rates, kind.lone_tpot_s, work, slo)
    if speed is not None:
        return speed.use
    tokens = kind.rates.seconds(doing.uncached_prompt_tokens_per_s, doing.output_tokens_per_s)
    return max(places, (tokens or 0.0) * kind.ratio)
