"""Observe, decide, record, act: once a second, for every model.

No failure of one step ends the loop, and while anything is unknown nothing is scaled down. A
decision is recorded before it is acted on, so that a controller killed at any moment is continued
by the next one.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Protocol

from expertmesh.clients.ray_serve import RayNode
from expertmesh.controller.apply import Applier, ServeWriter
from expertmesh.controller.configs import Shared, retired_config
from expertmesh.controller.fleet import FleetBoard
from expertmesh.controller.gateways import GatewayBook
from expertmesh.controller.health import StepHealth
from expertmesh.controller.holds import CapacityKeeper, CapacityLedger, option_rates
from expertmesh.controller.journal import QUIET_S, DecisionJournal, JournalStore
from expertmesh.controller.loads import EngineLoads, group_loads, groups_doing
from expertmesh.controller.lookback import Lookback, ReadServed
from expertmesh.controller.metrics import ControllerMetrics
from expertmesh.controller.money import MoneyCounter, ReadUsage
from expertmesh.controller.observe import (
    Observer,
    RankProbe,
    ServeView,
    Snapshot,
    SpotNotices,
    Surroundings,
    observation_of,
)
from expertmesh.controller.picture import ExpertHeat, Picture, expert_heat, picture
from expertmesh.core.domain.fleet import Fleet, GroupState, ServedModel
from expertmesh.core.domain.traffic import GatewayReport
from expertmesh.core.metering.capacity import CapacityHold
from expertmesh.core.scaling.allocation import Bid, allocate, bid_of
from expertmesh.core.scaling.capacity import capacity_workers
from expertmesh.core.scaling.contract import (
    Decision,
    GroupRecord,
    ModelState,
    Observation,
    ScalingConfig,
    Timing,
)
from expertmesh.core.scaling.demand import Flow, GroupDoing
from expertmesh.core.scaling.policy import decide
from expertmesh.core.scaling.replay import DecisionRecord

_log = logging.getLogger(__name__)

_TURN_EVERY_S = 1.0
_SHORTEST_TURN_S = 0.2
_SETTLE_S = 5.0
"""Gateways report once a second: after this long every live one has been heard."""
_NOTICES = "spot notices"
_NOTICES_STEP = f"observe {_NOTICES}"
_STUCK_AFTER_S = 120.0
"""A loop that has not turned for longer is taken for dead."""


class ServeApi(ServeView, ServeWriter, Protocol):
    """Ray Serve as the controller uses it."""


@dataclass(frozen=True, slots=True)
class ControllerParts:
    serve: ServeApi
    probe: RankProbe
    journal: JournalStore
    ledger: CapacityLedger
    now_s: Callable[[], float]
    """Unix time."""
    notices: SpotNotices | None = None
    usage: ReadUsage | None = None
    """The ledger's report, for metrics; None: they hold no cost by the ledger."""
    served: ReadServed | None = None
    """What groups were given to do, for hindsight; None: there is none."""
    writer: ServeWriter | None = None
    """Where the wanted groups are written, if not through `serve` itself."""


@dataclass(frozen=True, slots=True)
class _ModelTurn:
    """One model in one turn of the loop."""

    config: ScalingConfig
    before: ModelState
    observation: Observation
    decision: Decision
    bid: Bid

    def again(self, observation: Observation, now_s: float) -> "_ModelTurn":
        decision = decide(self.config, self.before, observation, now_s)
        return replace(self, observation=observation, decision=decision)


def _room(turns: Iterable[_ModelTurn]) -> dict[str, int | None]:
    """By pool, workers that it can hold; None: not known."""
    room: dict[str, int | None] = {}
    for turn in turns:
        seen = {pool.name: pool for pool in turn.observation.pools}
        for pool in turn.config.pools:
            room[pool.name] = capacity_workers(pool, seen.get(pool.name))
    return room


class Controller:
    def __init__(
        self,
        parts: ControllerParts,
        configs: Iterable[ScalingConfig],
        models: Iterable[ServedModel],
        timing: Timing,
        shared: Shared | None = None,
    ) -> None:
        self._now_s = parts.now_s
        self._shared = shared = shared or Shared()
        models = tuple(models)
        self._timing = timing
        self._configs = {config.model: config for config in configs}
        self._retired: set[str] = set()
        self._states: dict[str, ModelState] = {}
        self._last: dict[str, Decision] = {}
        self._decided_at_s: dict[str, float] = {}
        self._nodes: tuple[RayNode, ...] | None = None
        """As of the last turn; None: they could not be listed."""
        self._open_holds: dict[str, CapacityHold] = {}
        self._started_at_s = parts.now_s()
        self._turned_at_s = self._started_at_s
        self._is_restored = False
        self._seen_serve = False
        self._looked: set[str] = set()
        """Models that have been decided on with Serve in sight."""
        self._poke = asyncio.Event()
        self._poked_for: set[str] = set()
        """Models whose waiting requests have ended a pause of the loop, until they have a group."""

        self._observer = Observer(parts.serve, parts.probe, parts.notices, parts.now_s)
        self._applier = Applier(parts.writer or parts.serve)
        self._journal = DecisionJournal(parts.journal)
        self._keeper = CapacityKeeper(
            parts.ledger,
            shared.pools,
            models,
            option_rates(self._configs),
            shared.accelerators,
        )
        self._gateways = GatewayBook(timing.gateway_forget_s)
        # Milliseconds: above every version of an earlier controller, which adds one a change.
        self._board = FleetBoard(models, first_version=int(self._started_at_s * 1000))
        self._engine_loads = EngineLoads()
        self._doing: dict[str, GroupDoing] = {}
        self._health = StepHealth()
        self.metrics = ControllerMetrics()
        self._money = (
            None
            if parts.usage is None
            else MoneyCounter(parts.usage, self.metrics, self._started_at_s)
        )
        self._lookback = (
            None
            if parts.served is None
            else Lookback(parts.served, parts.ledger, parts.journal, self.metrics)
        )

    # What the HTTP API asks

    @property
    def fleet(self) -> Fleet | None:
        """With the loads of this moment; None until the first decision: gateways then keep the
        fleet that they have."""
        fleet = self._board.fleet
        if fleet is None:
            return None
        live_from_s = self._now_s() - self._timing.gateway_stale_s
        in_flight = self._gateways.in_flight(live_from_s)
        return replace(fleet, loads=group_loads(self._records(), self._engine_loads, in_flight))

    def exchange(self, report: GatewayReport) -> Fleet | None:
        """At any time: a gateway reports once a second, and at once when it wakes a model."""
        self._gateways.receive(report, self._now_s())
        in_vain = self._waiting_in_vain(report)
        if not in_vain <= self._poked_for:
            self._poked_for |= in_vain
            self._poke.set()
        fleet = self.fleet
        if fleet is not None:
            self._gateways.told(report.gateway, fleet.version, self._board.as_of_s)
        return fleet

    async def decisions(self, limit: int, model: str | None) -> list[dict[str, Any]]:
        return await self._journal.newest(limit, model)

    async def last_record(self, model: str) -> DecisionRecord | None:
        return await self._journal.last(model)

    async def explained(self, seq: int) -> dict[str, Any] | None:
        return await self._journal.explained(seq)

    def summaries(self) -> dict[str, dict[str, Any]]:
        """The newest decision of each model, in a few words."""
        return {
            model: {
                "reason": decision.reason,
                "pending": decision.pending,
                "wanted": decision.state.wanted,
                "need": decision.need,
                "queued": decision.demand.queued,
                "running": decision.demand.running,
            }
            for model, decision in sorted(self._last.items())
        }

    def doing(self) -> dict[str, GroupDoing]:
        """By group, as of the last turn; those of which it is known."""
        return self._doing

    def flows(self) -> dict[str, Flow]:
        """By model, over all gateways that report, as of the last decision."""
        return {model: decision.demand.flow for model, decision in sorted(self._last.items())}

    def picture(self) -> Picture | None:
        """None until the first decision."""
        if self._board.fleet is None:
            return None
        return picture(
            self._turned_at_s,
            self._configs.values(),
            {model: (self._decided_at_s[model], last) for model, last in self._last.items()},
            self._records(),
            self._nodes,
            self._engine_loads,
            self._doing,
            self._lookback.regrets if self._lookback is not None else {},
        )

    def heat(self) -> dict[str, ExpertHeat]:
        """By group."""
        return expert_heat(self._records(), self._engine_loads)

    def not_ready(self) -> dict[str, str]:
        """By step, why the controller cannot do its work; empty when it can."""
        problems = self._health.repeated()
        # A late notice is a loss without notice, which is coped with.
        problems.pop(_NOTICES_STEP, None)
        if self._board.fleet is None:
            problems.setdefault("start", "no decision has been made yet")
        return problems

    def is_stuck(self) -> bool:
        return self._now_s() - self._turned_at_s > _STUCK_AFTER_S

    # The loop

    async def run(self, stop: asyncio.Event) -> None:
        """Until `stop`; the groups stay as they are."""
        stopped = asyncio.create_task(stop.wait())
        counting = asyncio.create_task(self._count_money())
        looking_back = asyncio.create_task(self._look_back())
        try:
            while not stop.is_set():
                await self.turn()
                await self._pause(stopped)
        finally:
            stopped.cancel()
            counting.cancel()
            looking_back.cancel()
            await self._applier.close()
            await self._step("capacity ledger", self._keeper.write(self._records(), self._now_s()))

    async def _count_money(self) -> None:
        if self._money is not None:
            await self._money.run(self._now_s)

    async def _look_back(self) -> None:
        if self._lookback is not None:
            await self._lookback.run(self._in_manifests, self._now_s)

    def _in_manifests(self) -> dict[str, tuple[ScalingConfig, ModelState]]:
        return {
            model: (config, self._states[model])
            for model, config in self._configs.items()
            if model in self._states and model not in self._retired
        }

    async def turn(self) -> None:
        began_s = self._now_s()
        try:
            await self._turn()
        except Exception as error:
            _log.exception("the loop's turn failed")
            self._health.failed("turn", f"{type(error).__name__}: {error}")
        else:
            self._health.succeeded("turn")
        self._turned_at_s = self._now_s()
        self.metrics.turned(
            self._states,
            self._gateways.ages_s(self._turned_at_s),
            self._turned_at_s,
            max(0.0, self._turned_at_s - began_s),
            self._health.failing(),
        )

    async def _turn(self) -> None:
        if not self._is_restored:
            await self._step("restore", self._restore())
            if not self._is_restored:
                return
        snapshot = await self._observer.look(self._records())
        self._nodes = snapshot.nodes
        pools = {record.spec.name: record.spec.pool for record in self._records()}
        self.metrics.saw_ranks(snapshot.ranks.values(), pools)
        self._engine_loads.saw(snapshot.ranks, snapshot.answered_at_s)
        for what in ("applications", "nodes", "placement groups", _NOTICES):
            if what in snapshot.problems:
                self._health.failed(f"observe {what}", snapshot.problems[what])
            else:
                self._health.succeeded(f"observe {what}")
        if snapshot.applications is not None:
            await self._meet(snapshot)
        now_s = self._now_s()
        self._gateways.forget_silent(now_s)
        latencies = self._gateways.latencies(now_s - self._timing.gateway_stale_s)
        self._doing = groups_doing(self._records(), self._engine_loads, latencies)
        records = self._records()
        self.metrics.saw_loads(records, group_loads(records, self._engine_loads, {}))
        await self._decide_all(snapshot, now_s)
        self._drop_retired()
        self._engine_loads.keep({record.spec.name for record in self._records()})
        self._poked_for = {model for model in self._poked_for if self._still_waits(model)}
        if self._seen_serve or any(state.groups for state in self._states.values()):
            self._board.show(self._states, now_s)
        if snapshot.applications is not None:
            await self._step(
                "apply", self._applier.apply(self._states.values(), snapshot.applications, now_s)
            )
        await self._step(
            "capacity ledger", self._keeper.write(self._records(), now_s, snapshot.nodes)
        )

    async def _restore(self) -> None:
        for model in self._configs:
            await self._restore_model(model)
        self._open_holds = await self._keeper.open_holds(self._now_s())
        names = [record.spec.name for record in self._records()]
        await self._journal.write_started(self._now_s(), names)
        self._is_restored = True

    async def _restore_model(self, model: str) -> None:
        last = await self._journal.last(model)
        if last is None:
            self._states[model] = ModelState()
            return
        self._states[model] = last.decision.state
        now_s = self._now_s()
        # A quiet journal may be as old as that while its gateways live.
        since_s = now_s - self._timing.gateway_forget_s - QUIET_S
        recent = [seen for seen in last.observation.gateways if seen.heard_at_s >= since_s]
        self._gateways.recall(model, recent, now_s)
        if last.decision.state.groups:
            names = ", ".join(record.spec.name for record in last.decision.state.groups)
            _log.info("continuing with the recorded groups of %s: %s", model, names)

    async def _meet(self, snapshot: Snapshot) -> None:
        """Groups of models that are in no manifest any more; and, once, holds without a group."""
        applications = snapshot.applications or ()
        for app in applications:
            if app.spec is not None and app.spec.model not in self._configs:
                model = app.spec.model
                _log.warning("%s belongs to %s, which no manifest has: draining", app.name, model)
                await self._restore_model(model)
                self._configs[model] = retired_config(model, self._timing)
                self._retired.add(model)
        if self._seen_serve:
            return
        self._seen_serve = True
        held = {app.name for app in applications} | {r.spec.name for r in self._records()}
        self._keeper.close_forgotten(
            hold for name, hold in self._open_holds.items() if name not in held
        )

    async def _decide_all(self, snapshot: Snapshot, now_s: float) -> None:
        """Each model alone, from one picture of all; then what several of them want is shared out,
        and those that get less than they want decide again."""
        turns: list[_ModelTurn] = []
        for model, config in sorted(self._configs.items()):

            async def alone(config: ScalingConfig = config) -> None:
                turns.append(self._decide_alone(config, snapshot, now_s))

            await self._step(f"decide {model}", alone())
        turns = self._shared_out(turns, now_s)
        for turn in turns:
            await self._step(f"decide {turn.config.model}", self._settle(turn, now_s))
            if snapshot.applications is not None:
                self._looked.add(turn.config.model)

    def _decide_alone(
        self, config: ScalingConfig, snapshot: Snapshot, now_s: float
    ) -> "_ModelTurn":
        before = self._states[config.model]
        elsewhere = tuple(
            record
            for model, state in sorted(self._states.items())
            if model != config.model
            for record in state.groups
        )
        around = Surroundings(
            gateways=self._gateways.seen(
                config.model,
                [record.spec.name for record in before.groups],
                stale_from_s=now_s - self._timing.gateway_stale_s - 1.0,
            ),
            elsewhere=elsewhere,
            held_since_s={name: hold.started_at_s for name, hold in self._open_holds.items()},
            first_look=config.model not in self._looked,
            settled=self._is_settled(now_s),
            doing=self._doing,
        )
        observation = observation_of(config, before, snapshot, around)
        decision = decide(config, before, observation, now_s)
        bid = bid_of(config, decision, observation, now_s)
        return _ModelTurn(config, before, observation, decision, bid)

    def _shared_out(self, turns: "list[_ModelTurn]", now_s: float) -> "list[_ModelTurn]":
        budget = self._shared.usd_per_hour_budget
        if len(turns) < 2 and budget is None:
            return turns
        grants = allocate([turn.bid for turn in turns], _room(turns), budget)
        return [
            turn
            if (grant := grants[turn.config.model]) is None
            else turn.again(replace(turn.observation, grant=grant), now_s)
            for turn in turns
        ]

    async def _settle(self, turn: "_ModelTurn", now_s: float) -> None:
        config, before, decision = turn.config, turn.before, turn.decision
        record = DecisionRecord(now_s, config, before, turn.observation, decision)
        if self._journal.is_due(record):
            try:
                seq = await self._journal.write(record)
                self._health.succeeded("journal")
                _log.info("decision %d for %s: %s", seq, config.model, decision.reason)
            except Exception as error:
                self._health.failed("journal", f"{type(error).__name__}: {error}")
                # What cannot be recorded is not done; what was seen still counts.
                unwritten = replace(turn.observation, journal_writes=False)
                decision = turn.again(unwritten, now_s).decision
        self._take(decision, before, now_s)

    def _take(self, decision: Decision, before: ModelState, now_s: float) -> None:
        self._states[decision.model] = decision.state
        self._last[decision.model] = decision
        self._decided_at_s[decision.model] = now_s
        self.metrics.decided(decision, before, self._configs.get(decision.model), now_s)
        gone = {step.group for step in decision.transitions if step.after is GroupState.GONE}
        for record in before.groups:
            if record.spec.name not in gone:
                continue
            if decision.model in self._looked:
                self._keeper.end(record, now_s)
            elif record.spec.name in self._open_holds:
                # It ended while no controller ran: it cost until it was last seen.
                self._keeper.close_forgotten([self._open_holds[record.spec.name]])

    def _drop_retired(self) -> None:
        for model in [model for model in self._retired if not self._states[model].groups]:
            self._retired.remove(model)
            self._looked.discard(model)
            self.metrics.forget(model)
            for known in (self._configs, self._states, self._last, self._decided_at_s):
                known.pop(model, None)

    def _is_settled(self, now_s: float) -> bool:
        """Every gateway that an earlier controller knew has reported or has ended."""
        # A clock that was set back does not make the controller start anew.
        self._started_at_s = min(self._started_at_s, now_s)
        return now_s - self._started_at_s >= _SETTLE_S and not self._gateways.awaited

    def _records(self) -> list[GroupRecord]:
        return [record for state in self._states.values() for record in state.groups]

    def _waiting_in_vain(self, report: GatewayReport) -> set[str]:
        """Models whose requests wait while no group of theirs serves or is on the way."""
        return {
            model
            for model, traffic in report.models.items()
            if traffic.queued_requests + traffic.wake_requests > 0
            and model in self._configs
            and model not in self._retired
            and not self._has_group(model)
        }

    def _still_waits(self, model: str) -> bool:
        """One wake a model: what keeps it from a group now, the next report does not change."""
        decision = self._last.get(model)
        return not self._has_group(model) and (decision is None or decision.demand.queued > 0)

    def _has_group(self, model: str) -> bool:
        return any(
            record.removed_at_s is None and record.state is not GroupState.DRAINING
            for record in self._states.get(model, ModelState()).groups
        )

    async def _step(self, name: str, work: Awaitable[None]) -> None:
        try:
            await work
        except Exception as error:
            _log.debug("%s failed", name, exc_info=True)
            self._health.failed(name, f"{type(error).__name__}: {error}")
        else:
            self._health.succeeded(name)

    async def _pause(self, stopped: "asyncio.Task[bool]") -> None:
        """Until the next turn: after a second, when a decision falls due, or when poked."""
        now_s = self._now_s()
        due_s = min(
            [now_s + _TURN_EVERY_S, *(decision.wake_at_s for decision in self._last.values())]
        )
        poked = asyncio.create_task(self._poke.wait())
        try:
            await asyncio.wait({stopped}, timeout=_SHORTEST_TURN_S)
            await asyncio.wait(
                {stopped, poked},
                timeout=max(0.0, due_s - now_s - _SHORTEST_TURN_S),
                return_when=asyncio.FIRST_COMPLETED,
            )
        finally:
            poked.cancel()
            self._poke.clear()
