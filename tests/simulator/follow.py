"""A policy that knows the cheapest fleet in advance and does what it takes to have it."""

from dataclasses import dataclass

from expertmesh.core.domain.fleet import GroupState
from expertmesh.simulator.oracle import Least
from expertmesh.simulator.policy import Drain, Move, Recall, Start, View
from expertmesh.simulator.scenario import Scenario


@dataclass(frozen=True, slots=True)
class Follow:
    scenario: Scenario
    least: Least
    name: str = "follow"

    def decide(self, view: View) -> tuple[Move, ...]:
        moves: list[Move] = []
        for option, simulated in enumerate(self.scenario.options):
            names: dict[GroupState, list[str]] = {state: [] for state in GroupState}
            for group in view.groups:
                if group.option == option:
                    names[group.state].append(group.name)
            ready, draining = names[GroupState.READY], names[GroupState.DRAINING]
            # A group that is ready a tick early is not drained again.
            now = max(self._wanted(option, view.now_s + early) for early in (0, 10))
            back = draining[: max(0, now - len(ready))]
            moves += [Recall(name) for name in back]
            moves += [Drain(name) for name in ready[now:]]
            later = self._wanted(option, view.now_s + simulated.start.median_s + 10)
            coming = min(len(ready) + len(back), now) + len(names[GroupState.STARTING])
            moves += [Start(option)] * max(0, later - coming)
        return tuple(moves)

    def _wanted(self, option: int, at_s: float) -> int:
        bin_ = min(len(self.least.fleet) - 1, int(at_s // self.least.bin_s))
        return int(self.least.fleet[bin_, option])
