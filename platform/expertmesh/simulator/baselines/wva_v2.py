"""llm-d's Workload Variant Autoscaler, second saturation analyzer: tokens against capacity.

Sources: `internal/engines/analyzers/saturation_v2/analyzer.go`,
`internal/engines/pipeline/cost_aware_optimizer.go` and
`deploy/configmap-saturation-scaling.yaml` of llm-d-workload-variant-autoscaler v0.9 (scale up at
0.85, down at 0.70, KV cache 0.80, queue 5; every 60 s). An HPA carries the result out, so its
300 s for scaling down apply.
"""

from collections import deque
from dataclasses import dataclass, field
from math import ceil, floor
from statistics import median

from expertmesh.simulator.baselines.recent import Recent
from expertmesh.simulator.baselines.replicas import moves_to, ready, replicas_of
from expertmesh.simulator.policy import GroupView, Move, View
from expertmesh.simulator.scenario import Scenario

_HISTORY = 10
_SHORT_OUTPUT, _MEDIUM_OUTPUT = 100.0, 500.0


@dataclass(slots=True)
class WvaV2:
    """Variants are the scenario's options."""

    scenario: Scenario
    scale_up_threshold: float = 0.85
    scale_down_boundary: float = 0.70
    kv_cache_threshold: float = 0.80
    queue_threshold: float = 5.0
    interval_s: float = 60.0
    down_window_s: float = 300.0
    """Of the HPA."""
    scale_to_zero_after_s: float = 600.0
    name: str = "wva-v2"
    _seen: dict[tuple[int, str], deque[float]] = field(default_factory=dict)
    """Tokens in use when saturated, by option and length of the outputs."""
    _known: dict[int, float] = field(default_factory=dict)
    """Capacity by option, as it was last with a replica."""
    _targets: dict[int, Recent] = field(default_factory=dict)
    _next_s: float = 0.0
    _last_busy_s: float = 0.0

    def decide(self, view: View) -> tuple[Move, ...]:
        if view.queued or any(group.in_flight for group in view.groups):
            self._last_busy_s = view.now_s
        options = range(len(self.scenario.options))
        counts = {i: len(replicas_of(view, i)) for i in options}
        if not any(counts.values()):
            if view.queued > 0.0 or self.scenario.min_groups > 0:
                return moves_to(view, self._cheapest(view), max(1, self.scenario.min_groups))
            return ()
        if view.now_s < self._next_s:
            return ()
        self._next_s = view.now_s + self.interval_s
        quiet_s = view.now_s - self._last_busy_s
        if not self.scenario.min_groups and quiet_s >= self.scale_to_zero_after_s:
            return tuple(move for i in options for move in moves_to(view, i, 0))
        targets = self._wanted(view, counts)
        moves: list[Move] = []
        for option, wanted in targets.items():
            if option not in self._targets:
                self._targets[option] = Recent(self.down_window_s)
                self._targets[option].add(view.now_s, counts[option])
            recent = self._targets[option]
            recent.add(view.now_s, wanted)
            if wanted < counts[option]:
                wanted = min(counts[option], int(recent.largest()))
            moves += moves_to(view, option, wanted)
        return tuple(moves)

    def _wanted(self, view: View, counts: dict[int, int]) -> dict[int, int]:
        capacities = self._capacities(view)
        prompt, output = view.finished_prompt_tokens, view.finished_output_tokens
        demand = view.queued * (prompt + output)
        for group in ready(view.groups):
            demand += self._tokens_in_use(group) + group.waiting * prompt
        supply = coming = 0.0
        for option, count in counts.items():
            coming += count * capacities[option]
            supply += len(ready(replicas_of(view, option))) * capacities[option]
        required = demand / self.scale_up_threshold - coming
        spare = supply - demand / self.scale_down_boundary
        targets = dict(counts)
        if required > 0.0:
            self._up(view, capacities, targets, required)
        elif spare > 0.0:
            self._down(capacities, targets, spare)
        return targets

    def _up(
        self, view: View, capacities: dict[int, float], targets: dict[int, int], required: float
    ) -> None:
        """All of it from the option that is cheapest for its capacity, then from the next."""
        for option in sorted(capacities, key=lambda i: (self._price(i) / capacities[i], i)):
            if required <= 0.0:
                return
            more = min(ceil(required / capacities[option]), view.room[option])
            targets[option] += more
            required -= more * capacities[option]

    def _down(self, capacities: dict[int, float], targets: dict[int, int], spare: float) -> None:
        """From the option with the dearest replicas first; the last replica stays."""
        cheapest = min(capacities, key=lambda i: (self._price(i), i))
        for option in sorted(capacities, key=lambda i: (-self._price(i), i)):
            keep = 0
            if option == cheapest and not any(targets[i] for i in targets if i != cheapest):
                keep = 1
            left_over = sum(targets.values()) - self.scenario.min_groups
            fewer = min(floor(spare / capacities[option]), targets[option] - keep, left_over)
            if fewer > 0:
                targets[option] -= fewer
                spare -= fewer * capacities[option]

    def _capacities(self, view: View) -> dict[int, float]:
        """Tokens that one replica of each option can hold: in memory, and at its speed."""
        found: dict[int, float] = {}
        held = view.queued / max(1, len(ready(view.groups)))
        for option in range(len(self.scenario.options)):
            replicas = ready(replicas_of(view, option))
            if replicas:
                each = [self._capacity(view, option, group, held) for group in replicas]
                self._known[option] = median(each)
                found[option] = self._known[option]
            else:
                found[option] = self._known.get(option) or self._derived(view, option)
        return {option: max(1.0, tokens) for option, tokens in found.items()}

    def _capacity(self, view: View, option: int, group: GroupView, held: float) -> float:
        in_memory = self._in_memory(option)
        in_use = self._tokens_in_use(group)
        key = (option, _bucket(view.finished_output_tokens))
        if group.waiting + held >= self.queue_threshold and in_use > 0.0:
            self._seen.setdefault(key, deque(maxlen=_HISTORY)).append(in_use)
            return min(in_memory, in_use)
        if seen := self._seen.get(key):
            return min(in_memory, sum(seen) / len(seen))
        return self._derived(view, option)

    def _derived(self, view: View, option: int) -> float:
        """From the engine's arguments: N·(I + O/2) with N = min(B·O/(I + O), S)."""
        prompt, output = view.finished_prompt_tokens, view.finished_output_tokens
        service = self.scenario.options[option].service
        if output <= 0.0:
            return self._in_memory(option)
        steady = min(service.max_batched_tokens * output / (prompt + output), service.max_seqs)
        return min(self._in_memory(option), steady * (prompt + output / 2.0))

    def _in_memory(self, option: int) -> float:
        return self.kv_cache_threshold * self.scenario.options[option].service.kv_tokens

    def _tokens_in_use(self, group: GroupView) -> float:
        return group.kv_usage * self.scenario.options[group.option].service.kv_tokens

    def _price(self, option: int) -> float:
        return self.scenario.options[option].option.usd_per_hour

    def _cheapest(self, view: View) -> int:
        options = range(len(self.scenario.options))
        with_room = [option for option in options if view.room[option] > 0]
        return min(with_room or options, key=lambda option: (self._price(option), option))


def _bucket(output_tokens: float) -> str:
    if output_tokens < _SHORT_OUTPUT:
        return "short"
    return "medium" if output_tokens < _MEDIUM_OUTPUT else "long"
