"""llm-d's Workload Variant Autoscaler, first saturation analyzer: spare room of the replicas.

Sources: `docs/saturation-analyzer.md` and `deploy/configmap-saturation-scaling.yaml` of
llm-d-workload-variant-autoscaler v0.7 (KV cache 0.80, queue 5, spare 0.1 and 3; highest values of
one minute; every 60 s).
"""

from dataclasses import dataclass, field

from expertmesh.simulator.baselines.recent import Recent
from expertmesh.simulator.baselines.replicas import first_to_leave, ready, replicas_of
from expertmesh.simulator.policy import Drain, GroupView, Move, Start, View
from expertmesh.simulator.scenario import Scenario


@dataclass(slots=True)
class WvaV1:
    """Variants are the scenario's options."""

    scenario: Scenario
    kv_cache_threshold: float = 0.80
    queue_threshold: float = 5.0
    kv_spare: float = 0.1
    queue_spare: float = 3.0
    interval_s: float = 60.0
    metric_window_s: float = 60.0
    scale_to_zero_after_s: float = 600.0
    """Without requests; only where no group is wanted always."""
    name: str = "wva-v1"
    _kv: dict[str, Recent] = field(default_factory=dict)
    _queue: dict[str, Recent] = field(default_factory=dict)
    _next_s: float = 0.0
    _last_busy_s: float = 0.0

    def decide(self, view: View) -> tuple[Move, ...]:
        serving = ready(view.groups)
        self._remember(view, serving)
        if view.queued or any(group.in_flight for group in view.groups):
            self._last_busy_s = view.now_s
        options = range(len(self.scenario.options))
        active = {i: replicas_of(view, i) for i in options}
        if not any(active.values()):
            # From zero it does not wait for the next interval.
            wake = view.queued > 0.0 or self.scenario.min_groups > 0
            return self._up(view, active) if wake else ()
        if view.now_s < self._next_s:
            return ()
        self._next_s = view.now_s + self.interval_s
        quiet_s = view.now_s - self._last_busy_s
        if not self.scenario.min_groups and quiet_s >= self.scale_to_zero_after_s:
            return tuple(Drain(group.name) for groups in active.values() for group in groups)
        free = [
            group
            for group in serving
            if self._kv[group.name].largest() < self.kv_cache_threshold
            and self._queue[group.name].largest() < self.queue_threshold
        ]
        if not serving:
            return ()
        if not free or not self._spare(free, len(free)):
            return self._up(view, active)
        if len(free) >= 2 and self._spare(free, len(free) - 1):
            return self._down(active)
        return ()

    def _remember(self, view: View, serving: list[GroupView]) -> None:
        held = view.queued / len(serving) if serving else 0.0
        for group in serving:
            kv = self._kv.setdefault(group.name, Recent(self.metric_window_s))
            queue = self._queue.setdefault(group.name, Recent(self.metric_window_s))
            kv.add(view.now_s, group.kv_usage)
            queue.add(view.now_s, group.waiting + held)
        names = {group.name for group in view.groups}
        for values in (self._kv, self._queue):
            for gone in values.keys() - names:
                del values[gone]

    def _spare(self, free: list[GroupView], over: int) -> bool:
        """Whether `over` replicas would have enough left if they shared the load of `free`."""
        kv = sum(self._kv[group.name].largest() for group in free) / over
        queue = sum(self._queue[group.name].largest() for group in free) / over
        return (
            self.kv_cache_threshold - kv >= self.kv_spare
            and self.queue_threshold - queue >= self.queue_spare
        )

    def _up(self, view: View, active: dict[int, list[GroupView]]) -> tuple[Move, ...]:
        """One of the cheapest option that has none on the way."""
        settled = [
            option
            for option, groups in active.items()
            if len(groups) == len(ready(groups)) and view.room[option] > 0
        ]
        if not settled:
            return ()
        return (Start(min(settled, key=self._price)),)

    def _down(self, active: dict[int, list[GroupView]]) -> tuple[Move, ...]:
        """One of the dearest option."""
        total = sum(len(groups) for groups in active.values())
        if total <= max(1, self.scenario.min_groups):
            return ()
        dearest = max((option for option in active if ready(active[option])), key=self._price)
        return (Drain(first_to_leave(ready(active[dearest]))[0].name),)

    def _price(self, option: int) -> tuple[float, int]:
        return (self.scenario.options[option].option.usd_per_hour, option)
