"""Knative's Pod Autoscaler: concurrency over a stable and a panic window.

Sources: "Additional autoscaling configuration for Knative Pod Autoscaler" and the ConfigMap
config-autoscaler of Knative Serving (stable window 60 s, panic window 10 % of it, panic threshold
200 %, up 1000 times at most and down to half at least, 100 requests at 70 %, look every 2 s);
`pkg/autoscaler/scaling/autoscaler.go`.
"""

from dataclasses import dataclass, field
from math import ceil, floor

from expertmesh.simulator.baselines.recent import Recent
from expertmesh.simulator.baselines.replicas import moves_to, ready, replicas_of, usual_option
from expertmesh.simulator.policy import Move, View
from expertmesh.simulator.scenario import Scenario


@dataclass(slots=True)
class Knative:
    scenario: Scenario
    concurrency: float = 100.0
    """Requests that one replica can have."""
    utilization: float = 0.7
    """Share of them that it should have."""
    stable_window_s: float = 60.0
    panic_window_share: float = 0.1
    panic_threshold: float = 2.0
    """Wanted replicas by ready ones from which it panics."""
    max_up_rate: float = 1000.0
    max_down_rate: float = 2.0
    scale_down_delay_s: float = 0.0
    option: int | None = None
    name: str = "knative"
    _stable: Recent = field(init=False)
    _panic: Recent = field(init=False)
    _delayed: Recent = field(init=False)
    _panic_since_s: float | None = None
    _most_in_panic: int = 0

    def __post_init__(self) -> None:
        self._stable = Recent(self.stable_window_s)
        self._panic = Recent(self.stable_window_s * self.panic_window_share)
        self._delayed = Recent(self.scale_down_delay_s)

    def decide(self, view: View) -> tuple[Move, ...]:
        option = usual_option(self.scenario) if self.option is None else self.option
        total = view.queued + sum(group.in_flight for group in view.groups)
        self._stable.add(view.now_s, total)
        self._panic.add(view.now_s, total)
        replicas = replicas_of(view, option)
        wanted = self._wanted(view.now_s, max(1, len(ready(replicas))))
        self._delayed.add(view.now_s, wanted)
        if self.scale_down_delay_s > 0.0:
            wanted = int(self._delayed.largest())
        if wanted == 0 and self._stable.largest() > 0.0:
            # The last replica goes after a stable window without any request.
            wanted = 1
        return moves_to(view, option, max(wanted, self.scenario.min_groups))

    def _wanted(self, now_s: float, ready_count: int) -> int:
        target = self.concurrency * self.utilization
        most = ceil(self.max_up_rate * ready_count)
        least = floor(ready_count / self.max_down_rate)
        for_stable = ceil(self._stable.mean() / target)
        for_panic = ceil(self._panic.mean() / target)
        stable = min(max(for_stable, least), most)
        panic = min(max(for_panic, least), most)
        if for_panic / ready_count >= self.panic_threshold:
            self._panic_since_s = now_s
        elif self._panic_since_s is not None and now_s > self._panic_since_s + self.stable_window_s:
            self._panic_since_s = None
            self._most_in_panic = 0
        if self._panic_since_s is None:
            return stable
        self._most_in_panic = max(self._most_in_panic, stable, panic)
        return self._most_in_panic
