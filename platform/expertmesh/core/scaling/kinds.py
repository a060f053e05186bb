"""The kinds of groups that a model can have now: what each can do, costs and risks."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from expertmesh.core.domain.fleet import GroupSpec
from expertmesh.core.domain.hardware import Market, Pool
from expertmesh.core.domain.option import GroupOption, GroupRates
from expertmesh.core.domain.option import option_name as name_of
from expertmesh.core.domain.slo import Slo
from expertmesh.core.scaling.contract import ModelState, ScalingConfig
from expertmesh.core.scaling.learning import Learned, usual_ratio
from expertmesh.core.scaling.mix import Offer
from expertmesh.core.scaling.work import Work

_HORIZON_STARTS = 3.0
"""A choice is judged over so many of the longest starts."""
_HORIZON_S = (600.0, 3600.0)
_ENOUGH_S = 60.0
"""Of groups' time at work, before it is believed what they do where nothing is planned."""
_MOST_ATTAINMENT = 0.999
"""No shortage at all would cost without end."""
_FOREIGN = 4.0
"""By which a group that no manifest has any more counts as dearer: it makes way, but not before
others carry its load."""
_OLDER = 1.01
"""The same for a group of an older version: of two, it is the one to go."""
_LEAST_USD = 1e-6
"""Of a group over the horizon: one that costs nothing is still one too many."""


@dataclass(frozen=True, slots=True)
class Kind:
    option: GroupOption
    rates: GroupRates
    """As planned."""
    seconds: float | None
    """Of one group's time for a mean request, learned where it can be; None: not known."""
    lone_tpot_s: float | None
    ratio: float
    """Of what a request takes to what was planned."""
    start_s: float
    pool: Pool | None
    """None: no manifest has it any more."""
    is_offered: bool
    """False: groups of it run, but it is none of the model's options any more."""
    version: str = ""
    """Of the model and how it is run, where that is not what would be started now."""
    name: str = field(init=False)

    def __post_init__(self) -> None:
        # Asked for so often that it is made once.
        object.__setattr__(self, "name", kind_name(self.option.name, self.version))

    @property
    def zone(self) -> str | None:
        """Of spot nodes, that can be lost together."""
        if self.pool is None or self.pool.market is not Market.SPOT:
            return None
        return self.pool.zone or self.pool.name


@dataclass(frozen=True)
class Kinds:
    all: tuple[Kind, ...]
    by_tokens: bool
    """Capacities are compared by tokens, otherwise by requests at once."""

    @property
    def unit(self) -> Kind | None:
        """One group of it is the unit of load and capacity."""
        return self.all[0] if self.all else None

    @cached_property
    def by_name(self) -> Mapping[str, Kind]:
        return {kind.name: kind for kind in self.all}

    def named(self, name: str) -> Kind:
        return self.by_name[name]

    def capacity(self, kind: Kind) -> float:
        """Of one group, in units."""
        unit = self.all[0]
        if self.by_tokens and unit.seconds and kind.seconds:
            return unit.seconds / kind.seconds
        return kind.rates.in_flight / unit.rates.in_flight

    @cached_property
    def horizon_s(self) -> float:
        longest_s = max((kind.start_s for kind in self.all), default=0.0)
        low_s, high_s = _HORIZON_S
        return min(high_s, max(low_s, _HORIZON_STARTS * longest_s))

    @cached_property
    def unit_usd_per_hour(self) -> float:
        """Of one unit of capacity, in the cheapest kind that cannot be taken away."""
        plain = [kind for kind in self.all if kind.zone is None] or list(self.all)
        prices = [kind.option.usd_per_hour / self.capacity(kind) for kind in plain]
        return min(prices, default=0.0) or 1.0


def miss_usd_per_hour(kinds: Kinds, slo: Slo) -> float:
    """What a missing unit of capacity costs: where a share of 1 - a of the requests may miss the
    targets, a group that prevents more is worth a / (1 - a) of its price (newsvendor)."""
    attainment = min(slo.attainment, _MOST_ATTAINMENT)
    return kinds.unit_usd_per_hour * attainment / (1.0 - attainment)


def option_name(spec: GroupSpec) -> str:
    return name_of(spec.pool, spec.parallelism)


def kind_name(option: str, version: str) -> str:
    return f"{option}@{version}" if version else option


def kind_of(config: ScalingConfig, spec: GroupSpec) -> str:
    """The name of the kind that a group is of."""
    return kind_name(option_name(spec), _version(config, spec))


def _version(config: ScalingConfig, spec: GroupSpec) -> str:
    if config.is_current(spec):
        return ""
    said = json.dumps([spec.model_source, spec.max_model_len, spec.engine], sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()[:6]


def kinds_of(
    config: ScalingConfig, state: ModelState, work: Work, running: Sequence[GroupSpec]
) -> Kinds:
    """`running`: groups that may be of kinds that are not offered any more."""
    pools = {pool.name: pool for pool in config.pools}
    options = {option.name: option for option in config.options}
    specs = {kind_of(config, spec): spec for spec in running}
    gone = {
        name: options.get(option_name(specs[name])) or _from_spec(specs[name], config)
        for name in sorted(specs)
        if name not in options
    }
    everything = options | gone
    learned = {name: state.learned.get(name) for name in options}
    learned |= {name: state.learned.get(option.name) for name, option in gone.items()}
    usual = usual_ratio(state.learned.values(), state.seen_at_s)
    seconds = _seconds(everything, learned, usual, work)
    kinds = tuple(
        Kind(
            option=option,
            rates=option.rates,
            seconds=seconds[name],
            ratio=usual * _own_ratio(learned[name]),
            lone_tpot_s=option.rates.lone_tpot_s or _lone_tpot_s(learned[name]),
            start_s=state.start_s.get(option.name, option.start_s),
            pool=pools.get(option.pool),
            is_offered=name in options,
            version=_version(config, specs[name]) if name not in options else "",
        )
        for name, option in everything.items()
    )
    known = bool(kinds) and all(kind.seconds is not None for kind in kinds)
    return Kinds(kinds, by_tokens=known)


def _own_ratio(learned: Learned | None) -> float:
    return learned.own_ratio if learned else 1.0


def _lone_tpot_s(learned: Learned | None) -> float | None:
    return learned.lone_tpot_s if learned else None


def _from_spec(spec: GroupSpec, config: ScalingConfig) -> GroupOption:
    return GroupOption(
        pool=spec.pool,
        parallelism=spec.parallelism,
        usd_per_hour=spec.usd_per_hour,
        rates=GroupRates(config.rules.target_in_flight_per_group),
        start_s=max((option.start_s for option in config.options), default=0.0),
        engine=spec.engine,
    )


def _seconds(
    options: Mapping[str, GroupOption],
    learned: Mapping[str, Learned | None],
    usual: float,
    work: Work,
) -> dict[str, float | None]:
    """What the plan says, corrected by what the groups do. An option of which nothing is known
    does as much for each worker as one that is known."""
    seconds: dict[str, float | None] = {}
    for name, option in options.items():
        planned, own = work.seconds(option.rates), learned[name]
        if planned is not None:
            seconds[name] = planned * usual * _own_ratio(own)
        else:
            enough = own is not None and own.measured_s >= _ENOUGH_S and work.is_known
            seconds[name] = own.seconds if enough and own else None
    known = [(options[name].workers, each) for name, each in seconds.items() if each is not None]
    if known:
        workers, one = known[0]
        for name, each in seconds.items():
            if each is None:
                seconds[name] = one * workers / options[name].workers
    return seconds


def offer(
    kinds: Kinds,
    kind: Kind,
    kept: int,
    losses_per_hour: float,
    late_usd_per_hour: float,
    *,
    may_start: bool,
) -> Offer:
    """`late_usd_per_hour`: what it costs to wait for groups that are missing now."""
    hours = kinds.horizon_s / 3600.0
    option = kind.option
    start_usd = (option.usd_per_hour + late_usd_per_hour) * kind.start_s / 3600.0
    capacity = kinds.capacity(kind)
    usd = option.usd_per_hour * hours
    if kind.version and option.name in kinds.by_name:
        usd *= _OLDER
    elif not kind.is_offered:
        usd *= _FOREIGN
    if kind.zone is not None:
        # After a loss, as much has to be started elsewhere.
        usd += losses_per_hour * hours * kinds.unit_usd_per_hour * capacity * kind.start_s / 3600.0
    return Offer(
        option=kind.name,
        pool=option.pool,
        capacity=capacity,
        usd=max(usd, _LEAST_USD),
        start_usd=start_usd,
        usd_per_hour=option.usd_per_hour,
        workers=option.workers,
        kept=kept,
        limit=None if may_start and kind.is_offered else kept,
        spot_zone=kind.zone,
    )
