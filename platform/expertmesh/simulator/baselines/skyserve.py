"""SkyServe: replicas for a rate of requests each, on spot nodes with on-demand ones beside them.

Sources: `sky/serve/autoscalers.py` (FallbackRequestRateAutoscaler), `spot_placer.py` and
`constants.py` of SkyPilot 0.14 (rate over 60 s, a decision every 20 s, or 5 s without replicas, up
after 300 s, down after 1200 s); "Using Spot Instances for Serving". The target rate has no default.
"""

from dataclasses import dataclass, field
from math import ceil

from expertmesh.core.domain.fleet import GroupState
from expertmesh.core.domain.hardware import Market
from expertmesh.simulator.baselines.recent import Recent
from expertmesh.simulator.baselines.replicas import (
    first_to_leave,
    moves_to,
    ready,
    replicas_of,
    usual_option,
)
from expertmesh.simulator.policy import Drain, GroupView, Move, Start, View
from expertmesh.simulator.scenario import Scenario


@dataclass(slots=True)
class SkyServe:
    """Without spot options all replicas are on demand."""

    scenario: Scenario
    requests_per_s: float
    """That one replica should get."""
    base_on_demand: int = 0
    """Replicas that are always on demand."""
    dynamic_fallback: bool = True
    """On-demand replicas stand in for spot ones that are not ready."""
    upscale_delay_s: float = 300.0
    downscale_delay_s: float = 1200.0
    rate_window_s: float = 60.0
    interval_s: float = 20.0
    name: str = "skyserve"
    _arrivals: Recent = field(init=False)
    _target: int = -1
    _up_for: int = 0
    _down_for: int = 0
    _next_s: float = 0.0
    _lost: set[str] = field(default_factory=set)
    _lost_zones: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._arrivals = Recent(self.rate_window_s)

    def decide(self, view: View) -> tuple[Move, ...]:
        self._arrivals.add(view.now_s, view.arrivals_per_s)
        self._watch_zones(view)
        if view.now_s < self._next_s:
            return ()
        self._next_s = view.now_s + (self.interval_s if view.groups else 5.0)
        self._set_target(view)
        on_demand = usual_option(self.scenario)
        spot = self._spot_options()
        if not spot:
            return moves_to(view, on_demand, self._target)
        wanted_spot = max(0, self._target - self.base_on_demand)
        have = [group for option in spot for group in replicas_of(view, option)]
        moves = self._spot_moves(view, spot, have, wanted_spot)
        wanted = self.base_on_demand
        if self.dynamic_fallback:
            wanted += max(0, wanted_spot - len(ready(have)))
        moves += moves_to(view, on_demand, min(wanted, self._target))
        return tuple(moves)

    def _spot_options(self) -> list[int]:
        options = self.scenario.options
        return [i for i, option in enumerate(options) if option.market is Market.SPOT]

    def _set_target(self, view: View) -> None:
        least = self.scenario.min_groups
        wanted = max(least, ceil(self._arrivals.mean() / self.requests_per_s))
        if self._target < 0:
            # Of a service that runs already.
            options = range(len(self.scenario.options))
            self._target = max(least, sum(len(replicas_of(view, i)) for i in options))
        if self._target == 0:
            self._target = wanted
        elif wanted > self._target:
            self._up_for, self._down_for = self._up_for + 1, 0
            if self._up_for >= int(self.upscale_delay_s / self.interval_s):
                self._up_for, self._target = 0, wanted
        elif wanted < self._target:
            self._up_for, self._down_for = 0, self._down_for + 1
            if self._down_for >= int(self.downscale_delay_s / self.interval_s):
                self._down_for, self._target = 0, wanted
        else:
            self._up_for = self._down_for = 0

    def _spot_moves(
        self, view: View, spot: list[int], have: list[GroupView], wanted: int
    ) -> list[Move]:
        if wanted <= len(have):
            leaving = first_to_leave(have)[: len(have) - wanted]
            return [Drain(group.name) for group in leaving]
        counts = {option: len(replicas_of(view, option)) for option in spot}
        room = {option: view.room[option] for option in spot}
        moves: list[Move] = []
        for _ in range(wanted - len(have)):
            open_ = [i for i in spot if i not in self._lost_zones and room[i] > 0]
            if not open_:
                break
            # Zones are filled evenly, the cheaper one first.
            option = min(open_, key=lambda i: (counts[i], self._price(i), i))
            counts[option] += 1
            room[option] -= 1
            moves.append(Start(option))
        return moves

    def _watch_zones(self, view: View) -> None:
        """A zone in which a group was lost is left out until fewer than two are left."""
        spot = self._spot_options()
        lost = {
            group.name: group.option
            for group in view.groups
            if group.option in spot and group.state is GroupState.LOST
        }
        self._lost_zones |= {lost[name] for name in lost.keys() - self._lost}
        self._lost = set(lost)
        if len(spot) - len(self._lost_zones) < min(2, len(spot)):
            self._lost_zones.clear()

    def _price(self, option: int) -> float:
        return self.scenario.options[option].option.usd_per_hour
