"""What the groups cost: held from the request to start until the placement group is gone."""

from collections.abc import Iterable, Sequence
from typing import Protocol

from expertmesh.core.metering.capacity import CapacityHold
from expertmesh.core.scaling.contract import GroupRecord

_WRITE_EVERY_S = 5.0
"""A killed controller loses at most this much of the cost."""
_LOOK_BACK_S = 7 * 86_400.0


class CapacityLedger(Protocol):
    async def hold_capacity(self, holds: Sequence[CapacityHold]) -> None: ...

    async def capacity(
        self, since_s: float | None = None, until_s: float | None = None
    ) -> tuple[CapacityHold, ...]: ...


class CapacityKeeper:
    def __init__(self, ledger: CapacityLedger) -> None:
        self._ledger = ledger
        self._ended: list[CapacityHold] = []
        self._names: frozenset[str] = frozenset()
        self._written_at_s = float("-inf")

    async def open_holds(self, now_s: float) -> dict[str, CapacityHold]:
        holds = await self._ledger.capacity(since_s=now_s - _LOOK_BACK_S)
        return {hold.group: hold for hold in holds if hold.ended_at_s is None}

    def close_forgotten(self, holds: Iterable[CapacityHold]) -> None:
        """Groups that ended while no controller ran: they cost until they were last seen."""
        self._ended += [
            CapacityHold(
                group=hold.group,
                model=hold.model,
                pool=hold.pool,
                usd_per_hour=hold.usd_per_hour,
                started_at_s=hold.started_at_s,
                seen_at_s=hold.seen_at_s,
                ended_at_s=hold.seen_at_s,
            )
            for hold in holds
        ]

    def end(self, record: GroupRecord, now_s: float) -> None:
        self._ended.append(_hold(record, now_s, ended_at_s=now_s))

    async def write(self, records: Iterable[GroupRecord], now_s: float) -> None:
        """Raises what the ledger raises; the ends are then kept for the next call."""
        held = tuple(_hold(record, now_s) for record in records)
        names = frozenset(hold.group for hold in held)
        due = now_s - self._written_at_s >= _WRITE_EVERY_S
        if not (self._ended or names != self._names or due):
            return
        ended = tuple(self._ended)
        if held or ended:
            await self._ledger.hold_capacity((*ended, *held))
        del self._ended[: len(ended)]
        self._names = names
        self._written_at_s = now_s


def _hold(record: GroupRecord, now_s: float, ended_at_s: float | None = None) -> CapacityHold:
    return CapacityHold(
        group=record.spec.name,
        model=record.spec.model,
        pool=record.spec.pool,
        usd_per_hour=record.spec.usd_per_hour,
        started_at_s=record.requested_at_s,
        seen_at_s=now_s,
        ended_at_s=ended_at_s,
    )
