"""What groups and nodes cost, kept until the ledger has it.

A group is held from the request to start it until its placement group is gone; a node from when
Ray first lists it until it does so no more. Of what is not known nothing is written: a look that
failed ends no node.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from expertmesh.core.domain.accelerator import Accelerator
from expertmesh.core.domain.fleet import GroupSpec, GroupState, ServedModel
from expertmesh.core.domain.hardware import Pool
from expertmesh.core.domain.option import GroupRates
from expertmesh.core.metering.capacity import WHOLE_POOL, CapacityHold, NodeHold
from expertmesh.core.metering.providers import ProviderTariff
from expertmesh.core.perf.energy import DRAWS, OTHER_DRAW, watts
from expertmesh.core.scaling.contract import GroupRecord, ScalingConfig, workers_of

_WRITE_EVERY_S = 5.0
"""A killed controller loses at most this much of the cost."""
_LOOK_BACK_S = 7 * 86_400.0
_BLIND_S = 60.0
"""After a longer time without a look at the nodes, what came and went meanwhile is not known."""


class NodeSeen(Protocol):
    """A node as Ray lists it."""

    @property
    def node_id(self) -> str: ...
    @property
    def alive(self) -> bool: ...
    @property
    def pool(self) -> str | None: ...


class CapacityLedger(Protocol):
    """Raises UpstreamUnavailable."""

    async def hold_capacity(
        self, holds: Sequence[CapacityHold], nodes: Sequence[NodeHold] = ()
    ) -> None:
        """All or none of them."""
        ...

    async def capacity(
        self, since_s: float | None = None, until_s: float | None = None
    ) -> tuple[CapacityHold, ...]: ...

    async def open_nodes(self) -> tuple[NodeHold, ...]: ...

    async def set_provider_tariffs(self, tariffs: Sequence[ProviderTariff]) -> None: ...


class CapacityKeeper:
    def __init__(
        self,
        ledger: CapacityLedger,
        pools: Iterable[Pool] = (),
        models: Iterable[ServedModel] = (),
        rates: Callable[[GroupSpec], GroupRates | None] = lambda spec: None,
        accelerators: Mapping[str, Accelerator] | None = None,
    ) -> None:
        """`pools`: those whose nodes cost. `models`: with the tariffs of their providers. `rates`:
        what a group does. `accelerators`: by their names and aliases."""
        self._ledger = ledger
        self._pools = {pool.name: pool for pool in pools}
        self._models = tuple(models)
        self._rates = rates
        self._accelerators = {name.lower(): one for name, one in (accelerators or {}).items()}
        self._ended: list[CapacityHold] = []
        self._ready_at_s: dict[str, float] = {}
        self._names: frozenset[str] = frozenset()
        self._written_at_s = float("-inf")
        self._tariffs_since_s: float | None = None
        self._has_written_tariffs = not any(model.external for model in self._models)
        self._nodes: dict[tuple[str, str], NodeHold] = {}
        """Those that exist, by pool and id."""
        self._ended_nodes: list[NodeHold] = []
        self._looked_at_s: float | None = None
        self._has_restored_nodes = False

    async def open_holds(self, now_s: float) -> dict[str, CapacityHold]:
        holds = await self._ledger.capacity(since_s=now_s - _LOOK_BACK_S)
        return {hold.group: hold for hold in holds if hold.ended_at_s is None}

    def close_forgotten(self, holds: Iterable[CapacityHold]) -> None:
        """Groups that ended while no controller ran: they cost until they were last seen."""
        self._ended += [replace(hold, ended_at_s=hold.seen_at_s) for hold in holds]

    def end(self, record: GroupRecord, now_s: float) -> None:
        self._ended.append(self._hold(record, now_s, ended_at_s=now_s))
        self._ready_at_s.pop(record.spec.name, None)

    async def write(
        self,
        records: Iterable[GroupRecord],
        now_s: float,
        nodes: Iterable[NodeSeen] | None = None,
    ) -> None:
        """`nodes`: all that Ray lists now; None when they could not be listed.

        Raises what the ledger raises; what it did not take is then kept for the next call.
        """
        held = tuple(self._hold(record, now_s) for record in records)
        if nodes is not None and self._pools:
            self._look(nodes, now_s)
        if self._tariffs_since_s is None:
            self._tariffs_since_s = now_s
        names = frozenset(hold.group for hold in held) | {f"{p}/{n}" for p, n in self._nodes}
        due = not 0 <= now_s - self._written_at_s < _WRITE_EVERY_S
        if not (self._ended or self._ended_nodes or names != self._names or due):
            return
        if self._nodes and not self._has_restored_nodes:
            self._restore_nodes(await self._ledger.open_nodes())
        if not self._has_written_tariffs:
            await self._ledger.set_provider_tariffs(self._tariffs(self._tariffs_since_s))
            self._has_written_tariffs = True
        ended, ended_nodes = tuple(self._ended), tuple(self._ended_nodes)
        if held or ended or self._nodes or ended_nodes:
            await self._ledger.hold_capacity((*ended, *held), (*ended_nodes, *self._nodes.values()))
        del self._ended[: len(ended)]
        del self._ended_nodes[: len(ended_nodes)]
        self._names = names
        self._written_at_s = now_s

    def _look(self, nodes: Iterable[NodeSeen], now_s: float) -> None:
        last_s = now_s if self._looked_at_s is None else self._looked_at_s
        blind = now_s - last_s > _BLIND_S
        self._looked_at_s = now_s
        seen = {(n.pool, n.node_id) for n in nodes if n.alive and n.pool in self._pools}
        there = {(pool, node_id) for pool, node_id in seen if pool is not None}
        there |= {(pool, WHOLE_POOL) for pool in self._pools}
        for key in [key for key in self._nodes if key not in there]:
            self._end_node(self._nodes.pop(key), last_s if blind else now_s)
        if blind:
            for pool in self._pools:
                self._end_node(self._nodes.pop((pool, WHOLE_POOL)), last_s)
        for pool, node_id in sorted(there):
            known = self._nodes.get((pool, node_id))
            hold = self._node(pool, node_id, now_s) if known is None else known
            self._nodes[pool, node_id] = replace(hold, seen_at_s=now_s)

    def _node(self, pool: str, node_id: str, now_s: float) -> NodeHold:
        whole = node_id == WHOLE_POOL
        price = 0.0 if whole else self._pools[pool].usd_per_node_hour
        idle_watts = None if whole else self._idle_watts(self._pools[pool])
        return NodeHold(pool, node_id, price, now_s, now_s, None, idle_watts)

    def _end_node(self, hold: NodeHold, at_s: float) -> None:
        self._ended_nodes.append(replace(hold, seen_at_s=at_s, ended_at_s=at_s))

    def _restore_nodes(self, opened: Iterable[NodeHold]) -> None:
        """What an earlier controller left open: gone since, at another price, or still the same,
        which the ledger then continues."""
        endings = []
        for hold in opened:
            now = self._nodes.get((hold.pool, hold.node_id))
            if now is not None and now.usd_per_hour != hold.usd_per_hour:
                endings.append(replace(hold, ended_at_s=max(hold.seen_at_s, now.started_at_s)))
            elif now is None or (
                hold.node_id == WHOLE_POOL and now.started_at_s - hold.seen_at_s > _BLIND_S
            ):
                endings.append(replace(hold, ended_at_s=hold.seen_at_s))
        # First: a hold that this controller has ended since may be of the same node.
        self._ended_nodes[:0] = endings
        self._has_restored_nodes = True

    def _tariffs(self, since_s: float) -> list[ProviderTariff]:
        return [
            ProviderTariff(
                model.name,
                route.pool,
                since_s,
                route.usd_per_mtok_in,
                route.usd_per_mtok_cached,
                route.usd_per_mtok_out,
            )
            for model in self._models
            for route in model.external
        ]

    def _hold(
        self, record: GroupRecord, now_s: float, ended_at_s: float | None = None
    ) -> CapacityHold:
        spec = record.spec
        if record.state is GroupState.READY:
            self._ready_at_s.setdefault(spec.name, record.since_s)
        rates = self._rates(spec)
        idle_watts, busy_watts = self._watts(spec)
        return CapacityHold(
            group=spec.name,
            model=spec.model,
            pool=spec.pool,
            usd_per_hour=spec.usd_per_hour,
            started_at_s=record.requested_at_s,
            seen_at_s=now_s,
            ended_at_s=ended_at_s,
            ready_at_s=self._ready_at_s.get(spec.name),
            draining_at_s=_draining_at_s(record),
            prefill_tokens_per_s=None if rates is None else rates.prefill_tokens_per_s,
            decode_tokens_per_s=None if rates is None else rates.decode_tokens_per_s,
            idle_watts=idle_watts,
            busy_watts=busy_watts,
        )

    def _watts(self, spec: GroupSpec) -> tuple[float | None, float | None]:
        """Of all its accelerators, idle and busy."""
        accelerator = self._accelerators.get((spec.accelerator or "").lower())
        if accelerator is None or accelerator.tdp_watts <= 0:
            return None, None
        workers = workers_of(spec.parallelism)
        draw = DRAWS.get(accelerator.era, OTHER_DRAW).expected
        return workers * watts(accelerator, 0.0, draw), workers * watts(accelerator, 1.0, draw)

    def _idle_watts(self, pool: Pool) -> float | None:
        accelerator = self._accelerators.get((pool.accelerator or "").lower())
        if accelerator is None or accelerator.tdp_watts <= 0:
            return None
        # Without load, how much a busy one draws does not matter.
        return pool.accelerators_per_node * watts(accelerator, 0.0, 0.0)


def option_rates(configs: Mapping[str, ScalingConfig]) -> Callable[[GroupSpec], GroupRates | None]:
    """Rates of the option that a group was started by; `configs`, by model, may change."""

    def rates(spec: GroupSpec) -> GroupRates | None:
        config = configs.get(spec.model)
        if config is None:
            return None
        return next(
            (
                option.rates
                for option in config.options
                if (option.pool, option.parallelism) == (spec.pool, spec.parallelism)
            ),
            None,
        )

    return rates


def _draining_at_s(record: GroupRecord) -> float | None:
    if record.state is GroupState.DRAINING:
        return record.since_s
    return record.removed_at_s
