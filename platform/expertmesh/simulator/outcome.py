"""What came out of a simulated run: money, latency targets met, starts, and series for plots."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from expertmesh.core.domain.fleet import GroupState
from expertmesh.core.domain.slo import Slo
from expertmesh.simulator.fleet import Counts, Fleet
from expertmesh.simulator.scenario import Scenario

Floats = NDArray[np.float64]

WORST_WINDOW_S = 600.0
FEWEST_REQUESTS = 10.0
"""Windows with fewer say nothing about attainment, unless the whole run has fewer."""
SHOWN_STATES = (GroupState.STARTING, GroupState.READY, GroupState.DRAINING)


@dataclass(frozen=True, slots=True)
class Served:
    """What became of the requests, by the tick in which they arrived."""

    requests: Floats
    ttft_met: Floats
    tpot_met: Floats
    both_met: Floats
    refused: Floats
    cut: Floats
    """Their streams ended early: a lost group, or a drain past its deadline."""
    output_tokens: Floats
    """That were delivered in the tick, to whomever."""


@dataclass(frozen=True, slots=True)
class Attainment:
    """Shares of the requests that met their targets; refused and cut requests met none."""

    ttft: float
    tpot: float
    both: float


@dataclass(frozen=True, slots=True)
class Series:
    """One value a tick."""

    at_s: Floats
    load_groups: Floats
    """Work that arrives, by option as so many groups of it alone: ticks x options."""
    queued: Floats
    in_flight: Floats
    groups: Floats
    """Ticks x options x `SHOWN_STATES`."""
    usd_per_hour: Floats
    both_met: Floats
    """Share of the tick's arrivals; not a number where nothing arrived."""


@dataclass(frozen=True, slots=True)
class Outcome:
    scenario: str
    policy: str
    mode: str
    """`fluid` or `event`."""
    options: tuple[str, ...]
    duration_s: float
    usd_by_option: tuple[Fraction, ...]
    """Exact: billed group-seconds times the price."""
    usd_by_state: Mapping[GroupState, float]
    """What groups cost while they started, were ready and drained, from the state at each tick."""
    requests: float
    output_tokens: float
    attainment: Attainment
    worst_10min: Attainment
    """Of each kind the worst window; they need not be the same one."""
    refused: float
    cut: float
    over_group_hours: float
    """Ready groups beyond the load, in groups of the first option."""
    under_group_hours: float
    """Load beyond the ready groups, in groups of the first option."""
    counts: Counts
    over_budget_s: float
    series: Series

    @property
    def usd(self) -> float:
        return float(sum(self.usd_by_option))

    @property
    def usd_per_mtok_out(self) -> float:
        """Infinity when nothing was delivered."""
        return self.usd / self.output_tokens * 1e6 if self.output_tokens > 0 else math.inf

    @property
    def wasted_share(self) -> float:
        """Of the starts; 0 when there were none."""
        return self.counts.wasted_starts / self.counts.starts if self.counts.starts else 0.0


class Recorder:
    """Collects one run, a tick at a time."""

    def __init__(self, scenario: Scenario) -> None:
        self._scenario = scenario
        self._at_s: list[float] = []
        self._loads: list[tuple[float, ...]] = []
        self._queued: list[float] = []
        self._in_flight: list[float] = []
        self._groups: list[tuple[tuple[int, ...], ...]] = []
        self._usd_per_hour: list[float] = []
        self._version = -1
        self._now_groups: tuple[tuple[int, ...], ...] = ()

    def tick(
        self,
        now_s: float,
        fleet: Fleet,
        *,
        loads: tuple[float, ...],
        queued: float,
        in_flight: float,
        waiting: bool,
    ) -> None:
        """The state in the tick that starts now; `loads` and `waiting` are those of
        `Fleet.note_need`, which this calls."""
        fleet.note_need(now_s, loads, waiting=waiting)
        if fleet.version != self._version:
            self._version = fleet.version
            by_state = [fleet.count(state) for state in SHOWN_STATES]
            self._now_groups = tuple(zip(*by_state, strict=True))
        self._at_s.append(now_s)
        self._loads.append(loads)
        self._queued.append(queued)
        self._in_flight.append(in_flight)
        self._groups.append(self._now_groups)
        self._usd_per_hour.append(fleet.usd_per_hour)

    def outcome(
        self, policy: str, mode: str, end_s: float, fleet: Fleet, served: Served
    ) -> Outcome:
        """`served` has as many ticks as were recorded."""
        tick_s = self._scenario.tick_s
        loads, groups = np.array(self._loads), np.array(self._groups, dtype=np.float64)
        over, under = _mismatch(loads, groups[:, :, SHOWN_STATES.index(GroupState.READY)])
        with np.errstate(invalid="ignore", divide="ignore"):
            share = served.both_met / served.requests
        return Outcome(
            scenario=self._scenario.name,
            policy=policy,
            mode=mode,
            options=tuple(option.option.name for option in self._scenario.options),
            duration_s=end_s,
            usd_by_option=fleet.usd(end_s),
            usd_by_state=self._usd_by_state(groups),
            requests=float(served.requests.sum()),
            output_tokens=float(served.output_tokens.sum()),
            attainment=_overall(served),
            worst_10min=_worst(served, max(1, round(WORST_WINDOW_S / tick_s))),
            refused=float(served.refused.sum()),
            cut=float(served.cut.sum()),
            over_group_hours=over * tick_s / 3600,
            under_group_hours=under * tick_s / 3600,
            counts=fleet.counts(end_s),
            over_budget_s=fleet.over_budget_s(end_s),
            series=Series(
                at_s=np.array(self._at_s),
                load_groups=loads,
                queued=np.array(self._queued),
                in_flight=np.array(self._in_flight),
                groups=groups,
                usd_per_hour=np.array(self._usd_per_hour),
                both_met=share,
            ),
        )

    def _usd_by_state(self, groups: Floats) -> dict[GroupState, float]:
        prices = [option.option.usd_per_hour for option in self._scenario.options]
        usd = groups.sum(axis=0).T @ np.array(prices) * self._scenario.tick_s / 3600
        return dict(zip(SHOWN_STATES, usd.tolist(), strict=True))


def served_by_tick(
    *,
    arrived_at_s: ArrayLike,
    ttft_s: ArrayLike,
    tpot_s: ArrayLike,
    refused: ArrayLike,
    cut: ArrayLike,
    output_tokens: ArrayLike,
    slo: Slo,
    tick_s: float,
    ticks: int,
) -> Served:
    """From one value a request. `ttft_s` counts from the arrival and is not a number when no token
    came; `tpot_s` is not a number for answers of one token, which meet their target when they were
    neither refused nor cut. `refused` and `cut` are true or false."""
    at = np.minimum(np.asarray(arrived_at_s) // tick_s, ticks - 1).astype(np.int64)
    away, broken = np.asarray(refused, dtype=bool), np.asarray(cut, dtype=bool)
    whole = ~away & ~broken
    slow = np.asarray(tpot_s, dtype=np.float64) > slo.tpot_s
    ttft = whole & (np.asarray(ttft_s, dtype=np.float64) <= slo.ttft_s)
    tpot = whole & ~slow

    def total(weights: Any) -> Floats:
        counted = np.bincount(at, np.asarray(weights, dtype=np.float64), ticks)
        return np.asarray(counted, dtype=np.float64)

    return Served(
        requests=total(np.ones(len(at))),
        ttft_met=total(ttft),
        tpot_met=total(tpot),
        both_met=total(ttft & tpot),
        refused=total(away),
        cut=total(broken),
        output_tokens=total(output_tokens),
    )


def _mismatch(loads: Floats, ready: Floats) -> tuple[float, float]:
    """Group-ticks of the first option that were too many and too few."""
    with np.errstate(invalid="ignore", divide="ignore"):
        # One group of each option is worth as many of the first as their loads differ by.
        worth = np.where(loads > 0, loads[:, :1] / loads, 0.0)
    idle = loads[:, 0] <= 0
    worth[idle] = worth[~idle].mean(axis=0) if (~idle).any() else 1.0
    surplus = (ready * worth).sum(axis=1) - loads[:, 0]
    return float(np.maximum(surplus, 0).sum()), float(np.maximum(-surplus, 0).sum())


def _overall(served: Served) -> Attainment:
    total = served.requests.sum()
    if total <= 0:
        return Attainment(1.0, 1.0, 1.0)
    met = (served.ttft_met, served.tpot_met, served.both_met)
    return Attainment(*(float(kind.sum() / total) for kind in met))


def _worst(served: Served, window: int) -> Attainment:
    """Over all windows of so many ticks."""
    requests = _moving_sum(served.requests, window)
    counted = requests >= FEWEST_REQUESTS
    if not counted.any():
        return _overall(served)
    return Attainment(
        *(
            float((_moving_sum(met, window)[counted] / requests[counted]).min())
            for met in (served.ttft_met, served.tpot_met, served.both_met)
        )
    )


def _moving_sum(values: Floats, window: int) -> Floats:
    total = np.concatenate(([0.0], np.cumsum(values)))
    if len(values) <= window:
        return total[-1:]
    return np.asarray(total[window:] - total[:-window])


def as_json(outcome: Outcome, *, series: bool = False) -> Mapping[str, Any]:
    """Plain values; money as a number and, exactly, as a fraction in `usd_exact`."""
    total = sum(outcome.usd_by_option, Fraction(0))
    plain: dict[str, Any] = {
        "scenario": outcome.scenario,
        "policy": outcome.policy,
        "mode": outcome.mode,
        "duration_s": outcome.duration_s,
        "usd": float(total),
        "usd_exact": str(total),
        "usd_by_option": {
            name: float(usd)
            for name, usd in zip(outcome.options, outcome.usd_by_option, strict=True)
        },
        "usd_by_state": {state.value: usd for state, usd in outcome.usd_by_state.items()},
        "usd_per_mtok_out": outcome.usd_per_mtok_out if outcome.output_tokens > 0 else None,
        "requests": outcome.requests,
        "output_tokens": outcome.output_tokens,
        "attainment": asdict(outcome.attainment),
        "worst_10min": asdict(outcome.worst_10min),
        "refused": outcome.refused,
        "cut": outcome.cut,
        "over_group_hours": outcome.over_group_hours,
        "under_group_hours": outcome.under_group_hours,
        **asdict(outcome.counts),
        "wasted_share": outcome.wasted_share,
        "over_budget_s": outcome.over_budget_s,
    }
    if series:
        plain["series"] = _series_as_json(outcome)
    return plain


def _series_as_json(outcome: Outcome) -> dict[str, Any]:
    series = outcome.series
    return {
        "at_s": series.at_s.tolist(),
        "load_groups": _by_option(outcome, series.load_groups),
        "queued": series.queued.tolist(),
        "in_flight": series.in_flight.tolist(),
        "groups": {
            state.value: _by_option(outcome, series.groups[:, :, index])
            for index, state in enumerate(SHOWN_STATES)
        },
        "usd_per_hour": series.usd_per_hour.tolist(),
        "both_met": [None if math.isnan(share) else share for share in series.both_met.tolist()],
    }


def _by_option(outcome: Outcome, values: Floats) -> dict[str, Any]:
    return {name: values[:, index].tolist() for index, name in enumerate(outcome.options)}


def to_text(outcome: Outcome, *, series: bool = False) -> str:
    """JSON on one line; the same run gives the same bytes."""
    return json.dumps(as_json(outcome, series=series), sort_keys=True, allow_nan=False)
