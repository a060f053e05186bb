"""A queue threshold with KEDA: as many replicas as keep the requests of each at a threshold.

Sources: KEDA's documentation ("Scaling Deployments": pollingInterval 30 s, cooldownPeriod 300 s,
activation from 0 above 0); "Autoscaling with KEDA" of the vLLM production stack
(`vllm:num_requests_waiting`, threshold 5); "Autoscale InferenceService with LLM metrics" of KServe
(`vllm:num_requests_running`, threshold 2). From 1 replica on KEDA leaves it to an HPA.
"""

from dataclasses import dataclass, field

from expertmesh.simulator.baselines.hpa import HorizontalPodAutoscaler
from expertmesh.simulator.baselines.replicas import (
    moves_to,
    replicas_of,
    running_requests,
    usual_option,
    waiting_requests,
)
from expertmesh.simulator.policy import Move, View
from expertmesh.simulator.scenario import Scenario


@dataclass(slots=True)
class Keda:
    scenario: Scenario
    threshold: float = 5.0
    """Requests for each replica."""
    count_running: bool = False
    """Also those in a batch; otherwise only those that wait."""
    polling_s: float = 30.0
    """Between two looks of KEDA itself: from 0 replicas, and back to 0."""
    cooldown_s: float = 300.0
    """Without any request before the last replica goes."""
    down_window_s: float = 300.0
    """Of the HPA."""
    option: int | None = None
    name: str = "keda"
    _hpa: HorizontalPodAutoscaler = field(init=False)
    _next_sync_s: float = 0.0
    _next_poll_s: float = 0.0
    _last_active_s: float = 0.0

    def __post_init__(self) -> None:
        self._hpa = HorizontalPodAutoscaler(down_window_s=self.down_window_s)

    def decide(self, view: View) -> tuple[Move, ...]:
        option = usual_option(self.scenario) if self.option is None else self.option
        current = len(replicas_of(view, option))
        total = waiting_requests(view)
        busy = total + running_requests(view) > 0.0
        if self.count_running:
            total += running_requests(view)
        if total > 0.0:
            self._last_active_s = view.now_s
        least = self.scenario.min_groups
        if view.now_s >= self._next_poll_s:
            self._next_poll_s = view.now_s + self.polling_s
            if current == 0 and (busy or least):
                return moves_to(view, option, max(1, least))
            idle_s = view.now_s - self._last_active_s
            if current and not least and idle_s >= self.cooldown_s and total == 0.0 and not busy:
                return moves_to(view, option, 0)
        if current == 0 or view.now_s < self._next_sync_s:
            return ()
        self._next_sync_s = view.now_s + self._hpa.sync_s
        recommended = self._hpa.recommend(current, total, self.threshold)
        wanted = self._hpa.replicas(view.now_s, current, max(1, least, recommended))
        return moves_to(view, option, wanted)
