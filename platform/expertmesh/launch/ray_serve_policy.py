"""Ray Serve's default autoscaling as a policy of the simulator: its own code decides.

Apart from the rest because it imports Ray.
"""

from dataclasses import dataclass, field
from typing import Any

from ray.serve._private.common import DeploymentID
from ray.serve.autoscaling_policy import (
    _apply_delay_logic,
    _apply_scaling_factors,
    replica_queue_length_autoscaling_policy,
)
from ray.serve.config import AutoscalingConfig, AutoscalingContext

from expertmesh.simulator.baselines.recent import Recent
from expertmesh.simulator.baselines.replicas import moves_to, ready, replicas_of, usual_option
from expertmesh.simulator.policy import Move, View
from expertmesh.simulator.scenario import Scenario


@dataclass(slots=True)
class RayServe:
    """The defaults are those of `AutoscalingConfig` in Ray 2.60.

    Ray's own loop reads the clock of the machine, so the last steps of its
    `_apply_default_params` are called here one by one, with the time of the simulation.
    """

    scenario: Scenario
    target_ongoing_requests: float = 2.0
    upscale_delay_s: float = 30.0
    downscale_delay_s: float = 600.0
    look_back_s: float = 30.0
    upscaling_factor: float = 1.0
    downscaling_factor: float = 1.0
    option: int | None = None
    name: str = "ray-serve"
    _config: AutoscalingConfig = field(init=False)
    _ongoing: Recent = field(init=False)
    _queued: Recent = field(init=False)
    _target: int | None = None
    _state: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        option = usual_option(self.scenario) if self.option is None else self.option
        self.option = option
        self._config = AutoscalingConfig(
            min_replicas=self.scenario.min_groups,
            max_replicas=max(1, self.scenario.options[option].max_groups),
            target_ongoing_requests=self.target_ongoing_requests,
            upscale_delay_s=self.upscale_delay_s,
            downscale_delay_s=self.downscale_delay_s,
            upscaling_factor=self.upscaling_factor,
            downscaling_factor=self.downscaling_factor,
        )
        self._ongoing = Recent(self.look_back_s)
        self._queued = Recent(self.look_back_s)

    def decide(self, view: View) -> tuple[Move, ...]:
        assert self.option is not None
        self._queued.add(view.now_s, view.queued)
        in_flight = sum(group.in_flight for group in view.groups)
        self._ongoing.add(view.now_s, view.queued + in_flight)
        replicas = replicas_of(view, self.option)
        if self._target is None:
            self._target = len(replicas)
        running = len(ready(replicas))
        context = self._context(view.now_s, running, self._target)
        desired, _ = replica_queue_length_autoscaling_policy(context)
        if not (running == 0 and self._ongoing.mean() > 0.0):
            # From zero Ray acts at once.
            scaled = _apply_scaling_factors(desired, running, self._config)
            if running > 0 or scaled == 0:
                scaled, self._state = _apply_delay_logic(
                    max(0, scaled), self._target, self._config, self._state, _now=view.now_s
                )
            desired = scaled
        least, most = self._config.min_replicas, self._config.max_replicas
        self._target = min(max(int(desired), least), most)
        return moves_to(view, self.option, self._target)

    def _context(self, now_s: float, running: int, target: int) -> AutoscalingContext:
        return AutoscalingContext(
            deployment_id=DeploymentID(name="simulated"),
            deployment_name="simulated",
            app_name=None,
            current_num_replicas=running,
            target_num_replicas=target,
            running_replicas=[],
            total_num_requests=self._ongoing.mean(),
            total_queued_requests=self._queued.mean(),
            aggregated_metrics=None,
            raw_metrics=None,
            capacity_adjusted_min_replicas=self._config.min_replicas,
            capacity_adjusted_max_replicas=self._config.max_replicas,
            policy_state={},
            last_scale_up_time=None,
            last_scale_down_time=None,
            current_time=now_s,
            config=self._config,
        )
