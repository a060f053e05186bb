"""Times the controller's decisions: many models and pools, the sharing out of room and budget too.

python -m benchmarks.decision_time [--turns 400]
"""

import math
import random
import time
from dataclasses import dataclass, field, replace
from typing import Annotated

import typer
from benchmarks.figures import Conditions, Figure, Row, percentile, show, with_note
from rich.console import Console

from expertmesh.core.domain.deployment import ScalingRules
from expertmesh.core.domain.fleet import GroupSpec, Parallelism
from expertmesh.core.domain.hardware import Market, Pool
from expertmesh.core.domain.option import GroupOption, GroupRates
from expertmesh.core.scaling.allocation import allocate, bid_of
from expertmesh.core.scaling.contract import (
    ActionKind,
    ApplicationSeen,
    Decision,
    Grant,
    GroupSeen,
    ModelState,
    Observation,
    PoolSeen,
    RankSeen,
    ReplicaSeen,
    ScalingConfig,
    workers_of,
)
from expertmesh.core.scaling.demand import Flow, GatewaySeen, GroupDoing
from expertmesh.core.scaling.policy import decide

_GATEWAYS = 4
_START_S = 180.0
_TURN_S = 5.0
_PROMPT_TOKENS, _OUTPUT_TOKENS = 2000.0, 400.0
_WARM_TURNS = 50


@dataclass
class _Model:
    config: ScalingConfig
    phase: float
    state: ModelState = field(default_factory=ModelState)
    running: dict[str, tuple[GroupSpec, float]] = field(default_factory=dict)
    """Groups in Serve, each with the time at which it is ready."""


def _pools(count: int) -> tuple[Pool, ...]:
    return tuple(
        Pool(
            name=f"pool-{number}",
            market=Market.SPOT if number % 2 else Market.ON_DEMAND,
            usd_per_node_hour=16.0 + 4.0 * number - (12.0 if number % 2 else 0.0),
            accelerator="H200",
            accelerators_per_node=8,
            cpus_per_node=64,
            min_nodes=0,
            max_nodes=12,
            zone=f"zone-{number // 2}",
        )
        for number in range(count)
    )


def _config(number: int, pools: tuple[Pool, ...]) -> ScalingConfig:
    options = [
        GroupOption(
            pool=pool.name,
            parallelism=Parallelism(tensor=1, data=workers, expert=workers),
            usd_per_hour=pool.usd_per_hour(workers),
            rates=GroupRates(8.0 * workers, 6000.0 * workers, 900.0 * workers, 0.02),
            start_s=_START_S,
        )
        for pool in pools
        for workers in (4, 8)
    ]
    return ScalingConfig(
        model=f"model-{number:02}",
        source="someone/model",
        max_model_len=32_768,
        rules=ScalingRules(
            min_groups=1 if number % 2 else 0,
            max_groups=8,
            target_in_flight_per_group=32,
            up_delay_s=0.0,
            down_delay_s=None,
            drain_deadline_s=120.0,
            usd_per_hour_budget=None,
            priority=number % 3,
        ),
        pools=pools,
        options=tuple(options),
    )


class _Platform:
    def __init__(self, models: int, pools: int, budget: float | None, seed: int) -> None:
        self.pools = _pools(pools)
        self.random = random.Random(seed)
        self.models = [
            _Model(_config(number, self.pools), self.random.uniform(0, 6.28))
            for number in range(models)
        ]
        self.budget = budget
        self.now_s = 1e9
        self.granted = 0

    def turn(self) -> float:
        """Seconds that the decisions of one turn took."""
        seen = [self._observation(model) for model in self.models]
        began_s = time.process_time()
        first = [
            decide(model.config, model.state, observation, self.now_s)
            for model, observation in zip(self.models, seen, strict=True)
        ]
        bids = [
            bid_of(model.config, decision, observation, self.now_s)
            for model, decision, observation in zip(self.models, first, seen, strict=True)
        ]
        room = {pool.name: pool.max_nodes * pool.workers_per_node for pool in self.pools}
        grants = allocate(bids, dict(room), self.budget)
        final = [
            self._again(model, observation, decision, grants[model.config.model])
            for model, decision, observation in zip(self.models, first, seen, strict=True)
        ]
        took_s = time.process_time() - began_s
        self.granted += sum(grant is not None for grant in grants.values())
        for model, decision in zip(self.models, final, strict=True):
            self._act(model, decision)
        self.now_s += _TURN_S
        return took_s

    def _again(
        self, model: _Model, observation: Observation, decision: Decision, grant: Grant | None
    ) -> Decision:
        if grant is None:
            return decision
        return decide(model.config, model.state, replace(observation, grant=grant), self.now_s)

    def _act(self, model: _Model, decision: Decision) -> None:
        model.state = decision.state
        for action in decision.actions:
            if action.kind is ActionKind.START and action.spec is not None:
                model.running[action.group] = (action.spec, self.now_s + _START_S)
            elif action.kind is ActionKind.REMOVE:
                model.running.pop(action.group, None)

    def _observation(self, model: _Model) -> Observation:
        wave = 1.0 + 0.8 * math.sin(model.phase + (self.now_s % 7200.0) / 7200.0 * 6.28)
        arrivals = 6.0 * wave * self.random.uniform(0.8, 1.2)
        ready = [name for name, (_, at_s) in model.running.items() if at_s <= self.now_s]
        share = 1.0 / max(1, len(ready))
        flow = Flow(
            span_s=5.0,
            arrivals_per_s=arrivals / _GATEWAYS,
            finished_per_s=arrivals / _GATEWAYS,
            uncached_prompt_tokens_per_s=arrivals * _PROMPT_TOKENS / _GATEWAYS,
            output_tokens_per_s=arrivals * _OUTPUT_TOKENS / _GATEWAYS,
        )
        return Observation(
            groups=(
                *(self._group(name, model, arrivals * share) for name in sorted(model.running)),
                *(
                    GroupSeen(record.spec.name, None, (), False)
                    for record in model.state.groups
                    if record.spec.name not in model.running
                ),
            ),
            pools=tuple(self._pool(pool, model) for pool in self.pools),
            gateways=tuple(
                GatewaySeen(
                    gateway=f"gateway-{number}",
                    heard_at_s=self.now_s,
                    knows_s=self.now_s - 1,
                    queued=0 if ready else 3,
                    flow=flow,
                    in_flight=dict.fromkeys(ready, 4),
                )
                for number in range(_GATEWAYS)
            ),
        )

    def _group(self, name: str, model: _Model, arrivals: float) -> GroupSeen:
        spec, ready_at_s = model.running[name]
        ready = ready_at_s <= self.now_s
        world = spec.parallelism.data
        state = "RUNNING" if ready else "STARTING"
        return GroupSeen(
            name=name,
            application=ApplicationSeen(
                "RUNNING" if ready else "DEPLOYING",
                "",
                tuple(ReplicaSeen(state, f"node-{i}/{i}", True) for i in range(world)),
            ),
            ranks=tuple(
                RankSeen(f"http://{name}/{i}", 0, i, world) for i in range(world if ready else 0)
            ),
            placement_group=True,
            doing=GroupDoing(
                at_s=self.now_s,
                span_s=5.0,
                running=16,
                waiting=0,
                kv_usage=0.3,
                uncached_prompt_tokens_per_s=arrivals * _PROMPT_TOKENS,
                output_tokens_per_s=arrivals * _OUTPUT_TOKENS,
                tpot_s=0.03,
            )
            if ready
            else None,
        )

    def _pool(self, pool: Pool, model: _Model) -> PoolSeen:
        used = sum(
            workers_of(record.spec.parallelism)
            for other in self.models
            if other is not model
            for record in other.state.groups
            if record.spec.pool == pool.name
        )
        return PoolSeen(pool.name, None, used, used)


def measure(models: int, pools: int, turns: int, budget: float | None, seed: int) -> Row:
    platform = _Platform(models, pools, budget, seed)
    times_s = [platform.turn() for _ in range(_WARM_TURNS + turns)][_WARM_TURNS:]
    groups = sum(len(model.running) for model in platform.models)
    return (
        f"{models} models, {pools} pools, "
        + ("no shared budget" if budget is None else f"${budget:.0f}/h for all"),
        f"{percentile(times_s, 0.5) * 1e3:.1f}",
        f"{percentile(times_s, 0.99) * 1e3:.1f}",
        f"{max(times_s) * 1e3:.1f}",
        f"{platform.granted / (turns + _WARM_TURNS):.1f}",
        str(groups),
    )


def main(
    turns: Annotated[int, typer.Option(min=10, help="Of each case.")] = 400,
    seed: int = 1,
) -> None:
    """Prints the time of one turn of the controller: all decisions and the sharing out."""
    conditions = Conditions.now()
    rows = tuple(
        measure(models, pools, turns, budget, seed)
        for models, pools, budget in ((1, 2, None), (20, 6, None), (20, 6, 300.0))
    )
    figure = Figure(
        "Time of one turn of decisions, in ms",
        ("case", "median", "p99", "largest", "models held back", "groups"),
        rows,
    )
    show(Console(), [with_note(figure, conditions.until_now())])


if __name__ == "__main__":
    typer.run(main)
