"""The rules by which Kubernetes' HorizontalPodAutoscaler follows a metric.

Source: "Horizontal Pod Autoscaling" in the Kubernetes documentation (v1.35), for an external metric
with an AverageValue target, and its default `behavior`.
"""

from dataclasses import dataclass, field
from math import ceil

from expertmesh.simulator.baselines.recent import Recent


@dataclass(slots=True)
class HorizontalPodAutoscaler:
    tolerance: float = 0.1
    sync_s: float = 15.0
    down_window_s: float = 300.0
    """Of the recommendations in this time the highest counts when scaling down."""
    up_pods: int = 4
    """Up by at most this many, or by this share, whichever is more, in `up_period_s`."""
    up_percent: float = 100.0
    up_period_s: float = 15.0
    _recommended: Recent = field(init=False)
    _is_new: bool = True
    _changes: list[tuple[float, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._recommended = Recent(self.down_window_s)

    def recommend(self, current: int, total: float, target: float) -> int:
        """Replicas for which the average is the target, or as many as now within tolerance."""
        if current and abs(total / (target * current) - 1.0) <= self.tolerance:
            return current
        return ceil(total / target)

    def replicas(self, now_s: float, current: int, recommended: int) -> int:
        """After stabilisation and the limit on the rate."""
        if self._is_new:
            self._is_new = False
            self._recommended.add(now_s, current)
        self._recommended.add(now_s, recommended)
        if recommended < current:
            wanted = min(current, int(self._recommended.largest()))
        else:
            wanted = min(recommended, self._most(now_s, current))
        if wanted != current:
            self._changes.append((now_s, wanted - current))
        return wanted

    def _most(self, now_s: float, current: int) -> int:
        self._changes = [c for c in self._changes if c[0] > now_s - self.up_period_s]
        added = sum(change for _, change in self._changes if change > 0)
        before = max(0, current - added)
        most = max(before + self.up_pods, ceil(before * (1.0 + self.up_percent / 100.0)))
        return max(current, most)
