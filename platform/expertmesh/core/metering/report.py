"""Usage and money by tenant, key, model, pool or day; each row's cost adds up on its own."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from decimal import Decimal
from enum import StrEnum
from typing import NamedTuple

from expertmesh.core.metering.attribution import RequestCost, attribute
from expertmesh.core.metering.capacity import CapacityHold, NodeHold
from expertmesh.core.metering.providers import ProviderTariffs
from expertmesh.core.metering.rating import add_usd, usd_of
from expertmesh.core.metering.usage import UsageRecord

IDLE = "(idle)"
"""Row of what served nobody where the grouping has no other place for it: idle time has no
tenant, and an idle node no model."""

_UJ_PER_WH = 3_600_000_000


class By(StrEnum):
    TENANT = "tenant"
    MODEL = "model"
    POOL = "pool"
    DAY = "day"
    """UTC."""
    KEY = "key"


class Cell(NamedTuple):
    """The finest grouping: every report is a sum of these."""

    day: str
    pool: str
    model: str
    tenant: str
    key: str

    def under(self, by: By) -> str:
        match by:
            case By.TENANT:
                return self.tenant
            case By.MODEL:
                return self.model
            case By.POOL:
                return self.pool
            case By.DAY:
                return self.day
            case By.KEY:
                return self.key


@dataclass(frozen=True, slots=True)
class UsageRow:
    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Part of prompt_tokens."""
    completion_tokens: int = 0
    tariff_usd: Decimal = Decimal(0)
    """Revenue, by the tariff of the model deployment."""
    attributed_nano_usd: int = 0
    """What the requests cost, at our groups and at external providers."""
    idle_nano_usd: int = 0
    """Groups that were ready and had nothing to do."""
    starting_nano_usd: int = 0
    draining_nano_usd: int = 0
    idle_nodes_nano_usd: int = 0
    """Nodes, or parts of them, that no group occupied."""
    external_nano_usd: int = 0
    """Part of attributed: paid to external providers."""
    prefill_nano_usd: int = 0
    """Part of attributed, where the group's rates or the provider's prices tell it."""
    decode_nano_usd: int = 0
    idle_us: int = 0
    """Times, in microseconds of groups, that cost what has the same name."""
    starting_us: int = 0
    draining_us: int = 0
    idle_nodes_us: int = 0
    """Of nodes; a node of which a group has half counts half."""
    energy_uj: int | None = 0
    """Of our accelerators, in microjoules; None: of a part it is not known."""

    @property
    def capacity_nano_usd(self) -> int:
        return self.attributed_nano_usd + self.unattributed_nano_usd

    @property
    def unattributed_nano_usd(self) -> int:
        return (
            self.idle_nano_usd
            + self.starting_nano_usd
            + self.draining_nano_usd
            + self.idle_nodes_nano_usd
        )

    @property
    def capacity_usd(self) -> Decimal:
        return usd_of(self.capacity_nano_usd)

    @property
    def margin_usd(self) -> Decimal:
        """Revenue less the whole cost."""
        return add_usd(self.tariff_usd, self.capacity_usd.copy_negate())

    @property
    def usd_per_mtok(self) -> Decimal | None:
        """The whole cost over all tokens, to a micro-dollar; None without tokens."""
        return _per_mtok(self.capacity_nano_usd, self.prompt_tokens + self.completion_tokens)

    @property
    def usd_per_mtok_in(self) -> Decimal | None:
        """Prefill's part of the attributed cost over all prompt tokens; None when not known."""
        return _per_mtok(self.prefill_nano_usd, self.prompt_tokens) if self._is_split else None

    @property
    def usd_per_mtok_out(self) -> Decimal | None:
        """Decode's part of the attributed cost over all output tokens; None when not known."""
        return _per_mtok(self.decode_nano_usd, self.completion_tokens) if self._is_split else None

    @property
    def energy_wh(self) -> float | None:
        return None if self.energy_uj is None else self.energy_uj / _UJ_PER_WH

    @property
    def _is_split(self) -> bool:
        return self.prefill_nano_usd + self.decode_nano_usd == self.attributed_nano_usd

    def __add__(self, other: "UsageRow") -> "UsageRow":
        sums = {name: getattr(self, name) + getattr(other, name) for name in _INTEGERS}
        energy_uj = None
        if self.energy_uj is not None and other.energy_uj is not None:
            energy_uj = self.energy_uj + other.energy_uj
        return UsageRow(
            tariff_usd=add_usd(self.tariff_usd, other.tariff_usd), energy_uj=energy_uj, **sums
        )


_INTEGERS = tuple(
    field.name for field in fields(UsageRow) if field.name not in ("tariff_usd", "energy_uj")
)


@dataclass(frozen=True, slots=True)
class UsageReport:
    by: By
    since_s: float | None
    """None, like `until_s`, when there is nothing to report."""
    until_s: float | None
    rows: Mapping[str, UsageRow]
    """In alphabetical order, which is that of time for days."""

    @property
    def total(self) -> UsageRow:
        return sum(self.rows.values(), start=UsageRow())


class Tally:
    """Adds up cells over adjacent windows."""

    def __init__(self) -> None:
        self._sums: dict[Cell, _Sum] = {}

    def cells(self) -> dict[Cell, UsageRow]:
        """In the order of day, pool, model, tenant and key; without the empty ones."""
        rows = ((cell, found.row()) for cell, found in sorted(self._sums.items()))
        return {cell: row for cell, row in rows if row != _NOTHING}

    def add(
        self,
        day: str,
        since_s: float,
        until_s: float,
        holds: Sequence[CapacityHold],
        requests: Sequence[UsageRecord],
        nodes: Sequence[NodeHold] = (),
        providers: ProviderTariffs | None = None,
    ) -> None:
        """The time from `since_s` to `until_s`, which lies within `day`.

        A request counts where it was accepted, where a provider's price counts too, and costs
        capacity wherever it was in flight, so `requests` holds all that were in flight in this
        time.
        """
        attribution = attribute(holds, requests, until_s, since_s, nodes)
        for request in requests:
            found = self._sum(
                Cell(day, request.pool, request.model, request.tenant, request.key_id)
            )
            cost = attribution.costs.get(request.request_id)
            if cost is not None:
                found.charge(cost)
            if since_s <= request.at_s < until_s:
                found.count(request)
                bill = None if providers is None else providers.cost(request)
                if bill is not None:
                    found.charge(bill)
                    found.external_nano_usd += bill.nano_usd
        for held in attribution.holds:
            found = self._sum(Cell(day, held.hold.pool, held.hold.model, IDLE, IDLE))
            found.idle_nano_usd += held.idle_nano_usd
            found.starting_nano_usd += held.starting_nano_usd
            found.draining_nano_usd += held.draining_nano_usd
            found.idle_us += held.idle_us
            found.starting_us += held.starting_us
            found.draining_us += held.draining_us
            found.use(held.resting_energy_uj)
        for pool in attribution.pools:
            found = self._sum(Cell(day, pool.pool, IDLE, IDLE, IDLE))
            found.idle_nodes_nano_usd += pool.idle_nodes_nano_usd
            found.idle_nodes_us += pool.idle_nodes_us
            found.use(pool.idle_energy_uj)

    def _sum(self, cell: Cell) -> "_Sum":
        found = self._sums.get(cell)
        if found is None:
            found = self._sums[cell] = _Sum()
        return found


def group_by(by: By, cells: Mapping[Cell, UsageRow]) -> dict[str, UsageRow]:
    rows: dict[str, UsageRow] = {}
    for cell, row in cells.items():
        key = cell.under(by)
        rows[key] = rows.get(key, _NOTHING) + row
    return dict(sorted(rows.items()))


_NOTHING = UsageRow()


class _Sum:
    """A row that can still grow."""

    __slots__ = (*_INTEGERS, "energy_uj", "tariff_usd")

    def __init__(self) -> None:
        self.requests = self.prompt_tokens = self.cached_tokens = self.completion_tokens = 0
        self.attributed_nano_usd = self.external_nano_usd = 0
        self.prefill_nano_usd = self.decode_nano_usd = 0
        self.idle_nano_usd = self.starting_nano_usd = self.draining_nano_usd = 0
        self.idle_nodes_nano_usd = 0
        self.idle_us = self.starting_us = self.draining_us = self.idle_nodes_us = 0
        self.energy_uj: int | None = 0
        self.tariff_usd = Decimal(0)

    def row(self) -> UsageRow:
        return UsageRow(
            tariff_usd=self.tariff_usd,
            energy_uj=self.energy_uj,
            **{name: getattr(self, name) for name in _INTEGERS},
        )

    def count(self, request: UsageRecord) -> None:
        self.requests += 1
        self.prompt_tokens += request.prompt_tokens
        self.cached_tokens += request.cached_tokens
        self.completion_tokens += request.completion_tokens
        self.tariff_usd = add_usd(self.tariff_usd, request.tariff_usd)

    def charge(self, cost: RequestCost) -> None:
        self.attributed_nano_usd += cost.nano_usd
        self.prefill_nano_usd += cost.prefill_nano_usd
        self.decode_nano_usd += cost.decode_nano_usd
        self.use(cost.energy_uj)

    def use(self, energy_uj: int | None) -> None:
        if energy_uj is None or self.energy_uj is None:
            self.energy_uj = None
        else:
            self.energy_uj += energy_uj


def _per_mtok(nano_usd: int, tokens: int) -> Decimal | None:
    if tokens == 0:
        return None
    # Nano-dollars a token are thousandths of a dollar a million tokens.
    micro_usd = (nano_usd * 1000 + tokens // 2) // tokens
    return Decimal(micro_usd).scaleb(-6)
