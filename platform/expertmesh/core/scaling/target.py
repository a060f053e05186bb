"""Which groups there should be: the cheapest that carry the load, and what stands in the way."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from expertmesh.core.scaling.contract import Binding
from expertmesh.core.scaling.mix import Bounds, Mix, Need, Offer, cheapest, fits, priced

WORTH_IT = 0.95
"""A group that carries its load is replaced only by one that is cheaper by more than this share,
its start included."""
_ANY = 1 << 30


@dataclass(frozen=True, slots=True)
class Obstacle:
    """A bound of the problem that might be lifted."""

    binding: Binding
    lift: Callable[["Problem"], "Problem"]


@dataclass(frozen=True, slots=True)
class Problem:
    offers: tuple[Offer, ...]
    need: Need
    held_load: float
    """The load that groups are kept for; at least that of `need`."""
    bounds: Bounds
    active: tuple[int, ...]
    """By offer, groups that serve or are on the way; `Offer.kept` also counts those that drain."""
    may_be_empty: bool = True
    """Whether the model may have no group at all while a provider serves it."""
    external_usd: float | None = None
    """What a provider takes for a load of 1 over the horizon; None when there is none."""
    overflows: bool = False
    """The provider also takes what the groups cannot carry."""

    def with_needs(self) -> Need:
        if self.external_usd is None or not self.overflows:
            return self.need
        return replace(self.need, short_usd=min(self.need.short_usd, self.external_usd))


@dataclass(frozen=True, slots=True)
class Target:
    counts: Mapping[str, int]
    """Groups to have, by option, before anything is released."""
    kept: Mapping[str, int]
    """Of the groups that are there or coming, those to keep, by option."""
    mix: Mix
    """That `counts` come from."""
    binding: Binding
    replaces: bool = False
    """It starts groups though there are enough: cheaper ones."""


def find_target(problem: Problem, obstacles: Sequence[Obstacle]) -> Target:
    offers, bounds = problem.offers, problem.bounds
    need = problem.with_needs()
    now = priced(offers, need, problem.active)
    mix = _reachable(problem)
    external = False
    if _is_cheaper_outside(problem, mix):
        mix, external = priced(offers, need, (0,) * len(offers)), True
    adds = any(n > there for n, there in zip(mix.counts, problem.active, strict=True))
    suffices = (
        now.short <= mix.short
        and now.uncovered <= mix.uncovered
        and fits(offers, bounds, problem.active)
    )
    replaces = adds and suffices
    if replaces and mix.usd > WORTH_IT * now.usd:
        mix, adds, replaces = now, False, False
    kept = _kept(problem, mix, external)
    counts = tuple(max(n, k) for n, k in zip(mix.counts, kept, strict=True))
    return Target(
        counts=_by_option(offers, counts),
        kept=_by_option(offers, kept),
        mix=mix,
        binding=_binding(problem, mix, counts, obstacles, external),
        replaces=replaces,
    )


def _reachable(problem: Problem) -> Mix:
    """The cheapest mix that can be had from what is there: groups are started before those that
    they replace are released, so where both together are beyond a bound, there are only more groups
    or fewer."""
    offers, need, bounds = problem.offers, problem.with_needs(), problem.bounds
    mix = cheapest(offers, need, bounds)
    loose = replace(bounds, min_groups=0)
    both = tuple(max(n, there) for n, there in zip(mix.counts, problem.active, strict=True))
    if fits(offers, loose, both) or not fits(offers, loose, problem.active):
        return mix
    fewer = cheapest([offer.only(offer.kept) for offer in offers], need, bounds)
    return min(fewer, _with_more(problem), key=lambda found: (_lacks(bounds, found), found.usd))


def _with_more(problem: Problem) -> Mix:
    """What is there and the cheapest that carries the rest of the load."""
    offers, need, bounds = problem.offers, problem.with_needs(), problem.bounds
    now = priced(offers, need, problem.active)
    left = dict(bounds.workers)
    beside = []
    for offer, there in zip(offers, problem.active, strict=True):
        left[offer.pool] = left.get(offer.pool, 0) - there * offer.workers
        limit = None if offer.limit is None else offer.limit - there
        beside.append(replace(offer, kept=max(0, offer.kept - there), limit=limit))
    usd = bounds.usd_per_hour
    more = cheapest(
        beside,
        replace(need, load=now.short, cover=now.uncovered),
        Bounds(
            max(0, bounds.min_groups - now.groups),
            bounds.max_groups - now.groups,
            left,
            None if usd is None else usd - now.usd_per_hour,
        ),
    )
    both = tuple(n + there for n, there in zip(more.counts, problem.active, strict=True))
    return priced(offers, need, both)


def _lacks(bounds: Bounds, mix: Mix) -> int:
    return max(0, bounds.min_groups - mix.groups)


def _is_cheaper_outside(problem: Problem, mix: Mix) -> bool:
    """A provider that takes all of the load for less than any group costs."""
    return (
        problem.external_usd is not None
        and problem.may_be_empty
        and problem.held_load > 0
        and problem.held_load * problem.external_usd < mix.usd
    )


def _kept(problem: Problem, mix: Mix, external: bool) -> tuple[int, ...]:
    """The cheapest part of what there is that carries the load of the last while."""
    if external:
        return (0,) * len(problem.offers)
    there = [offer.only(n) for n, offer in zip(problem.active, problem.offers, strict=True)]
    held = replace(problem.with_needs(), load=max(problem.held_load, problem.need.load))
    return cheapest(there, held, problem.bounds).counts


def _by_option(offers: Sequence[Offer], counts: Sequence[int]) -> dict[str, int]:
    return {offer.option: n for n, offer in zip(counts, offers, strict=True)}


def _binding(
    problem: Problem,
    mix: Mix,
    counts: tuple[int, ...],
    obstacles: Sequence[Obstacle],
    external: bool,
) -> Binding:
    if external:
        return Binding.EXTERNAL
    lacks = _lacks(problem.bounds, mix)
    if mix.short > 0 or lacks:
        lifted = problem
        for obstacle in obstacles:
            # One after the other: two bounds may each be enough to stand in the way.
            before, lifted = lifted, obstacle.lift(lifted)
            if lifted == before:
                continue
            other = _reachable(lifted)
            if other.short < mix.short - 1e-9 or _lacks(problem.bounds, other) < lacks:
                return obstacle.binding
        if lacks:
            return Binding.ROOM
    if sum(counts) > mix.groups:
        return Binding.HOLD
    without = replace(problem.bounds, min_groups=0)
    if (
        mix.groups == problem.bounds.min_groups
        and mix.groups > 0
        and cheapest(problem.offers, problem.with_needs(), without).groups < mix.groups
    ):
        return Binding.MIN_GROUPS
    return Binding.LOAD


def without_max_groups(problem: Problem) -> Problem:
    return replace(problem, bounds=replace(problem.bounds, max_groups=_ANY))


def without_budget(problem: Problem) -> Problem:
    return replace(problem, bounds=replace(problem.bounds, usd_per_hour=None))


def without_grant(
    workers: Mapping[str, int], usd_per_hour: float | None
) -> Callable[[Problem], Problem]:
    """With all of the room, and with the model's own budget."""

    def lift(problem: Problem) -> Problem:
        bounds = replace(problem.bounds, workers=dict(workers), usd_per_hour=usd_per_hour)
        return replace(problem, bounds=bounds)

    return lift


def with_workers(workers: Mapping[str, int]) -> Callable[[Problem], Problem]:
    def lift(problem: Problem) -> Problem:
        return replace(problem, bounds=replace(problem.bounds, workers=dict(workers)))

    return lift


def with_offers(offers: Sequence[Offer]) -> Callable[[Problem], Problem]:
    def lift(problem: Problem) -> Problem:
        return replace(problem, offers=tuple(offers))

    return lift
