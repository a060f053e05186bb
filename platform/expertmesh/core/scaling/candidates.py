"""The mix of groups that a decision chose beside the best of the others, and why each of them lost.

The reasons are read off the same costs and bounds that the choice was made by.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from expertmesh.core.scaling.contract import Binding, Load
from expertmesh.core.scaling.mix import (
    Bounds,
    Mix,
    Need,
    Offer,
    cheapest,
    churn_usd,
    fits,
    priced,
)
from expertmesh.core.scaling.question import Question
from expertmesh.core.scaling.target import WORTH_IT, Problem, Target, find_target

_SMALL = 1e-9
_PARTS = 2
"""Reasons that are told of one candidate, the largest first."""


@dataclass(frozen=True, slots=True)
class Candidate:
    name: str
    groups: dict[str, int]
    """By option; empty: no group."""
    usd_per_hour: float
    """Of its groups; 0 where a provider serves."""
    capacity: float
    """In units of the load."""
    short: float
    """Load that it would not carry."""
    usd: float
    """Over the horizon: groups, their risk, starts, and what is missed."""
    more_usd: float
    """Than the chosen one, as the two were compared."""
    ready_in_s: float
    """Until all of it is ready."""
    wait_now_s: float | None
    """Predicted for a request that comes now; None: the queue grows, or it is not known."""
    wait_then_s: float | None
    """The same once all of it is ready, with the load that is expected then."""
    why: str
    is_barred: bool = False
    """It cannot be had, whatever it costs."""
    is_chosen: bool = False


@dataclass(frozen=True, slots=True)
class Choice:
    question: Question
    target: Target
    candidates: tuple[Candidate, ...]
    """The chosen one first, the others by cost."""

    @property
    def chosen(self) -> Candidate:
        return self.candidates[0]


@dataclass(frozen=True, slots=True)
class _Cost:
    """Over the horizon."""

    groups_usd: float
    starts_usd: float
    short_usd: float
    uncovered_usd: float
    churn_usd: float

    @property
    def usd(self) -> float:
        return self.groups_usd + self.starts_usd + self.short_usd + self.uncovered_usd

    @property
    def compared_usd(self) -> float:
        return self.usd + self.churn_usd


def choice_of(question: Question) -> Choice:
    problem = question.problem
    target = find_target(problem, question.obstacles)
    by_provider = target.binding is Binding.EXTERNAL
    outside_usd = None
    if problem.external_usd is not None and problem.held_load > 0:
        outside_usd = problem.held_load * problem.external_usd
    base = _Base(question, target, outside_usd if by_provider else None)
    candidates = []
    for name, mix in _others(problem, target.mix, by_provider):
        bars = base.bars(mix)
        shown = base.candidate(name, mix, "; ".join(bars) or base.why_lost(mix))
        candidates.append(replace(shown, is_barred=bool(bars)))
    if outside_usd is not None and not by_provider:
        candidates.append(base.provider(outside_usd))
    candidates.sort(key=lambda candidate: (candidate.more_usd, candidate.name))
    return Choice(question, target, (base.chosen(), *candidates))


# Which ones


def _others(problem: Problem, chosen: Mix, by_provider: bool) -> list[tuple[str, Mix]]:
    """The best mix with one more, one fewer and none of each option, what there is, nothing."""
    offers, need = problem.offers, problem.with_needs()
    found: list[tuple[str, Mix]] = []
    for index, offer in enumerate(offers):
        n = chosen.counts[index]
        found.append((f"+1 {offer.option}", _best_with(problem, index, n + 1)))
        if n > 1:
            found.append((f"-1 {offer.option}", _best_up_to(problem, index, n - 1)))
        if n > 0:
            found.append((f"no {offer.option}", _best_up_to(problem, index, 0)))
    found.append(("cheapest", cheapest(offers, need, problem.bounds)))
    found.append(("as it is", priced(offers, need, problem.active)))
    found.append(("nothing", priced(offers, need, (0,) * len(offers))))
    seen = set() if by_provider else {chosen.counts}
    different = []
    for name, mix in found:
        empty = not any(mix.counts)
        if mix.counts not in seen and not (by_provider and empty):
            seen.add(mix.counts)
            different.append(("nothing" if empty else name, mix))
    return different


def _best_up_to(problem: Problem, index: int, n: int) -> Mix:
    need = problem.with_needs()
    limited = _limited(problem.offers, index, n)
    found = cheapest(limited, need, problem.bounds)
    return priced(problem.offers, need, found.counts)


def _best_with(problem: Problem, index: int, n: int) -> Mix:
    """With exactly `n` groups of one offer, whether or not they can be had, and the cheapest of
    the others that is found for the rest of the load."""
    offers, bounds, need = problem.offers, problem.bounds, problem.with_needs()
    offer = offers[index]
    rest = _limited(offers, index, 0)
    workers = dict(bounds.workers)
    workers[offer.pool] = max(0, workers.get(offer.pool, 0) - n * offer.workers)
    money = bounds.usd_per_hour
    left = Bounds(
        min_groups=max(0, bounds.min_groups - n),
        max_groups=max(0, bounds.max_groups - n),
        workers=workers,
        usd_per_hour=None if money is None else max(0.0, money - n * offer.usd_per_hour),
    )
    carried = n * offer.capacity
    best: Mix | None = None
    # Groups of a zone that may be lost cover nothing, or all that another zone's do not.
    for covered in {0.0, carried}:
        needed = Need(
            load=max(0.0, need.load - carried),
            cover=max(0.0, need.cover - covered),
            short_usd=need.short_usd,
            uncovered_usd=need.uncovered_usd,
        )
        counts = list(cheapest(rest, needed, left).counts)
        counts[index] = n
        mix = priced(offers, need, counts)
        if best is None or _compared_usd(offers, mix) < _compared_usd(offers, best):
            best = mix
    assert best is not None
    return best


def _limited(offers: Sequence[Offer], index: int, n: int) -> tuple[Offer, ...]:
    return tuple(
        replace(offer, limit=n if offer.limit is None else min(n, offer.limit))
        if each == index
        else offer
        for each, offer in enumerate(offers)
    )


def _compared_usd(offers: Sequence[Offer], mix: Mix) -> float:
    return mix.usd + churn_usd(offers, mix.counts)


# What each would be


class _Base:
    """The chosen mix, that the others are compared with."""

    def __init__(self, question: Question, target: Target, provider_usd: float | None) -> None:
        """`provider_usd`: when a provider was chosen."""
        self.question = question
        self.problem = question.problem
        self.offers = question.problem.offers
        self.need = question.problem.with_needs()
        self.target = target
        self.mix = target.mix
        self.provider_usd = provider_usd
        self.cost = _cost(self.offers, self.need, self.mix)
        self.compared_usd = self.cost.compared_usd if provider_usd is None else provider_usd
        self.has_kept = target.mix.counts == self.problem.active
        self.loose = replace(self.problem.bounds, min_groups=0)
        self.was_reachable = self._is_reachable(
            cheapest(self.offers, self.need, self.problem.bounds).counts
        )

    def chosen(self) -> Candidate:
        counts = [self.target.counts.get(offer.option, 0) for offer in self.offers]
        held = sum(counts) - self.mix.groups
        mix = priced(self.offers, self.need, counts)
        if self.provider_usd is not None:
            why = "a provider serves the load for less than any group"
            shown = self.candidate("provider", mix, why)
            return replace(
                shown,
                short=0.0,
                usd=self.provider_usd,
                more_usd=0.0,
                is_chosen=True,
                wait_now_s=0.0,
                wait_then_s=0.0,
            )
        why = "carries the load for the least"
        if mix.short > _SMALL:
            why = f"the most that can be had: {mix.short:.2f} of the load is missed"
        if self.mix.groups and self.need.load <= 0:
            why = "the least that the rules want"
        if not self.mix.groups:
            why = "there is no load"
        if held > 0:
            plural = "groups are" if held > 1 else "group is"
            why = f"{why}; {held} {plural} held, for a start costs more than waiting"
        if not self.mix.groups and mix.short > _SMALL:
            why = "nothing can be had"
        return replace(self.candidate("chosen", mix, why), more_usd=0.0, is_chosen=True)

    def provider(self, usd: float) -> Candidate:
        more = usd - self.compared_usd
        barred = not self.problem.may_be_empty
        if barred:
            why = "min_groups wants groups"
        elif more >= 0:
            why = f"+${more:.2f} in {_minutes(self.question.kinds.horizon_s)}"
        else:
            why = f"saves ${-more:.2f}, too little where mixes are compared"
        empty = priced(self.offers, self.need, (0,) * len(self.offers))
        shown = self.candidate("provider", empty, why)
        return replace(
            shown,
            short=0.0,
            usd=usd,
            more_usd=more,
            wait_now_s=0.0,
            wait_then_s=0.0,
            is_barred=barred,
        )

    def candidate(self, name: str, mix: Mix, why: str) -> Candidate:
        load, kinds = self.question.load, self.question.kinds
        starts_s = [
            kind.start_s
            for kind, n, there in zip(kinds.all, mix.counts, self.problem.active, strict=True)
            if n > there
        ]
        ready = sum(
            min(n, ready) * offer.capacity
            for offer, n, ready in zip(self.offers, mix.counts, self.question.ready, strict=True)
        )
        ready_in_s = max(starts_s, default=0.0)
        grown = max(0.0, load.backlog_s + (load.now - ready) * ready_in_s)
        then = replace(load, now=load.expected, ready=mix.capacity, backlog_s=grown)
        return Candidate(
            name=name,
            groups={o.option: n for o, n in zip(self.offers, mix.counts, strict=True) if n},
            usd_per_hour=mix.usd_per_hour,
            capacity=mix.capacity,
            short=mix.short,
            usd=mix.usd,
            more_usd=_compared_usd(self.offers, mix) - self.compared_usd,
            ready_in_s=ready_in_s,
            wait_now_s=_wait_s(replace(load, ready=ready)),
            wait_then_s=_wait_s(then if load.by_tokens else replace(then, backlog_s=0.0)),
            why=why,
        )

    def why_lost(self, mix: Mix) -> str:
        cost = _cost(self.offers, self.need, mix)
        more = cost.compared_usd - self.compared_usd
        if self.provider_usd is not None:
            if more > 0:
                return f"a provider takes the load for ${more:.2f} less"
            return "a provider serves the load of now, and of the last while, for less"
        if cost.usd > self.cost.usd:
            return self._dearer(mix, cost)
        if more > 0:
            return "costs the same within 1 %, but changes more of what there is"
        if not self.was_reachable:
            return "the cheapest cannot be had from what there is: it must be more groups or fewer"
        if self.has_kept and cost.usd > WORTH_IT * self.cost.usd:
            return "saves too little to replace groups that carry the load"
        return f"saves {-more / self.compared_usd:.2%}: too little to look for"

    def bars(self, mix: Mix) -> list[str]:
        """The bounds that it breaks, and those that it would on the way there."""
        bounds, found = self.problem.bounds, self._broken(self.problem.bounds, mix)
        lacks = max(0, bounds.min_groups - self.mix.groups)
        if bounds.min_groups - mix.groups > lacks:
            found.append(
                f"min_groups is {bounds.min_groups}"
                if self.need.load <= 0
                else f"a model in use keeps {bounds.min_groups} or more"
            )
        if not found and not self._is_reachable(mix.counts):
            both = priced(self.offers, self.need, self._beside(mix.counts))
            broken = self._broken(self.loose, both)
            found += [f"with what it replaces, until that is gone: {bar}" for bar in broken]
        return found

    def _is_reachable(self, counts: Sequence[int]) -> bool:
        """Groups are started before those that they replace are released."""
        both = self._beside(counts)
        there = self.problem.active
        return fits(self.offers, self.loose, both) or not fits(self.offers, self.loose, there)

    def _beside(self, counts: Sequence[int]) -> tuple[int, ...]:
        return tuple(max(n, there) for n, there in zip(counts, self.problem.active, strict=True))

    def _broken(self, bounds: Bounds, mix: Mix) -> list[str]:
        found: list[str] = []
        used: dict[str, int] = {}
        for offer, n in zip(self.offers, mix.counts, strict=True):
            used[offer.pool] = used.get(offer.pool, 0) + n * offer.workers
            if offer.limit is not None and n > offer.limit:
                held_back = self.question.held_back.get(offer.option)
                found.append(held_back or f"{offer.option} is not offered any more")
        for pool, workers in used.items():
            have = bounds.workers.get(pool, 0)
            if workers > have:
                found.append(
                    f"no room in pool {pool}: {workers} workers, {have} of them can be had"
                )
        if mix.groups > bounds.max_groups:
            found.append(f"max_groups is {bounds.max_groups}")
        money = bounds.usd_per_hour
        if money is not None and mix.usd_per_hour > money + 1e-6:
            found.append(f"${mix.usd_per_hour:.2f}/h is over the budget of ${money:.2f}/h")
        return found

    def _dearer(self, mix: Mix, cost: _Cost) -> str:
        parts = [
            (cost.short_usd - self.cost.short_usd, self._short(mix)),
            (cost.groups_usd - self.cost.groups_usd, self._groups(mix)),
            (cost.starts_usd - self.cost.starts_usd, self._starts(cost)),
            (cost.uncovered_usd - self.cost.uncovered_usd, self._uncovered(mix)),
        ]
        telling = sorted((part for part in parts if part[0] > 1e-9), key=lambda part: -part[0])
        return "; ".join(text for _, text in telling[:_PARTS])

    def _short(self, mix: Mix) -> str:
        if self.mix.short > _SMALL:
            return f"misses {mix.short - self.mix.short:.2f} more of the load"
        return f"misses {mix.short:.2g} of the load"

    def _groups(self, mix: Mix) -> str:
        more = mix.usd_per_hour - self.mix.usd_per_hour
        if more <= 1e-9:
            return "the risk of losing its zone outweighs its price"
        text = f"+${more:.2f}/h"
        if self.need.load > 0 and mix.capacity > self.need.load * 1.05:
            text += f", {mix.capacity / self.need.load:.1f}x the need"
        return text

    def _starts(self, cost: _Cost) -> str:
        return f"its starts cost ${cost.starts_usd - self.cost.starts_usd:.2f} more"

    def _uncovered(self, mix: Mix) -> str:
        return f"{mix.uncovered:.2f} of the load is lost with a spot zone"


def _cost(offers: Sequence[Offer], need: Need, mix: Mix) -> _Cost:
    pairs = list(zip(offers, mix.counts, strict=True))
    return _Cost(
        groups_usd=sum(n * offer.usd for offer, n in pairs),
        starts_usd=sum(max(0, n - offer.kept) * offer.start_usd for offer, n in pairs),
        short_usd=mix.short * need.short_usd if mix.short > _SMALL else 0.0,
        uncovered_usd=mix.uncovered * need.uncovered_usd if mix.uncovered > _SMALL else 0.0,
        churn_usd=churn_usd(offers, mix.counts),
    )


def _wait_s(load: Load) -> float | None:
    return load.wait_s if math.isfinite(load.wait_s) else None


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min"


def mix_text(groups: Mapping[str, int]) -> str:
    """`2 h200-od/t1d8e8 + 1 h200-spot/t1d8e8`."""
    return " + ".join(f"{n} {name}" for name, n in groups.items() if n) or "no group"
