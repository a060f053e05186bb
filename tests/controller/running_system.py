"""A controller with an in-memory Serve, store and gateways, one simulated second after another."""

from dataclasses import dataclass, field, replace

from tests.controller.fake_serve import Clock, FakeServe
from tests.controller.memory_store import MemoryJournal, MemoryLedger
from tests.core.scaling.world import EP2, config, pool

from expertmesh.controller.configs import Shared, served_model
from expertmesh.controller.loop import Controller, ControllerParts
from expertmesh.core.domain.deployment import ModelDeployment, Tariff
from expertmesh.core.domain.fleet import Fleet, GroupState
from expertmesh.core.domain.slo import Slo
from expertmesh.core.domain.traffic import GatewayReport, GroupTraffic, ModelTraffic
from expertmesh.core.scaling.contract import ModelState, ScalingConfig, Timing
from expertmesh.core.scaling.replay import read_record

MODEL = "tiny"


@dataclass
class Gateway:
    """Reports once a second, and routes to the groups that its last fleet calls ready."""

    name: str
    queued: int = 0
    in_flight: dict[str, int] = field(default_factory=dict)
    fleet: Fleet | None = None
    is_silent: bool = False
    loses_answers: bool = False
    """What the controller answers does not arrive."""
    refusals: int = 0
    """Exchanges that the controller answered without a fleet."""

    def report(self, now_s: float) -> GatewayReport:
        waking = self.queued if not self.ready() else 0
        return GatewayReport(
            self.name,
            now_s,
            fleet_version=self.fleet.version if self.fleet else 0,
            models={MODEL: ModelTraffic(queued_requests=self.queued, wake_requests=waking)},
            groups={name: GroupTraffic(in_flight=n) for name, n in self.in_flight.items()},
        )

    def ready(self) -> list[str]:
        groups = self.fleet.groups if self.fleet else ()
        return [group.name for group in groups if group.state is GroupState.READY]


def two_pools(**rules: object) -> ScalingConfig:
    """Two pools with room for one group each."""
    return config(pool("cheap", 0.3), pool("dear", 0.45), **rules)


def deployment_of(scaling: ScalingConfig) -> ModelDeployment:
    return ModelDeployment(
        name=scaling.model,
        source=scaling.source,
        revision="main",
        shape=None,
        max_model_len=scaling.max_model_len,
        parallelism=EP2,
        pools=tuple(pool.name for pool in scaling.pools),
        scaling=scaling.rules,
        slo=Slo(),
        max_wait_s=30.0,
        tariff=Tariff(0.1, 0.02, 0.4),
    )


class RunningSystem:
    def __init__(
        self,
        *configs: ScalingConfig,
        pools: dict[str, int] | None = None,
        usd_per_hour_budget: float | None = None,
    ) -> None:
        self.configs = configs or (two_pools(min_groups=1),)
        self.usd_per_hour_budget = usd_per_hour_budget
        self.clock = Clock()
        self.skew_s = 0.0
        """Of the controller's clock."""
        self.serve = FakeServe(self.clock, pools or {"cheap": 2, "dear": 2})
        self.journal = MemoryJournal()
        self.ledger = MemoryLedger()
        self.gateways = [Gateway("g1")]
        self.reasons: list[str] = []
        self.controller = self._controller()

    @property
    def gateway(self) -> Gateway:
        return self.gateways[0]

    def _controller(self) -> Controller:
        parts = ControllerParts(
            self.serve,
            self.serve,
            self.journal,
            self.ledger,
            lambda: self.clock() + self.skew_s,
            notices=self.serve,
        )
        return Controller(
            parts,
            self.configs,
            [served_model(deployment_of(c)) for c in self.configs],
            Timing(),
            Shared(usd_per_hour_budget=self.usd_per_hour_budget),
        )

    def restart_controller(self, *configs: ScalingConfig, after_s: float = 1.0) -> None:
        """As after kill -9: nothing of the old one is left but what Serve and the store hold."""
        self.configs = configs or self.configs
        self.clock.now_s += after_s
        self.controller = self._controller()

    async def pass_s(self, seconds: int) -> None:
        """Each second: gateways exchange, then the controller turns."""
        for _ in range(seconds):
            self.exchange()
            await self.controller.turn()
            self.reasons += [s["reason"] for s in self.controller.summaries().values()]
            self.clock.now_s += 1.0

    def exchange(self) -> None:
        for gateway in self.gateways:
            if gateway.is_silent:
                continue
            fleet = self.controller.exchange(gateway.report(self.clock()))
            if fleet is None:
                gateway.refusals += 1
            elif not gateway.loses_answers:
                gateway.fleet = fleet

    def states(self) -> dict[str, str]:
        fleet = self.controller.fleet
        assert fleet is not None
        return {group.name: group.state.value for group in fleet.groups}

    def pending(self) -> str | None:
        return self.controller.summaries()[MODEL]["pending"]

    def recorded_state(self) -> ModelState:
        decisions = [entry for entry in self.journal.entries if entry.kind == "decision"]
        return read_record(decisions[-1].payload).decision.state

    def actions(self) -> list[tuple[str, str]]:
        """All that was decided, from the journal."""
        return [
            (action["kind"], action["group"])
            for entry in self.journal.entries
            if entry.kind == "decision"
            for action in entry.payload["decision"]["actions"]
        ]


def other_model(scaling: ScalingConfig, name: str) -> ScalingConfig:
    return replace(scaling, model=name)
