"""GPUs: what one holds, moves, computes and draws."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum

from expertmesh.core.domain.model_shape import Dtype


class Era(StrEnum):
    """Hardware and software of one time, which reach a similar share of what is possible."""

    AMPERE = "ampere"
    HOPPER = "hopper"
    BLACKWELL = "blackwell"
    CDNA = "cdna"
    CPU = "cpu"


@dataclass(frozen=True, slots=True)
class Accelerator:
    name: str
    """As Ray names it, e.g. `H200`."""
    era: Era
    memory_bytes: int
    """That software can use, not the one on the box."""
    memory_bytes_per_s: float
    flops_per_s: dict[Dtype, float] = field(hash=False)
    """Dense; a dtype that is missing cannot be computed in."""
    link_bytes_per_s: float = 0.0
    """One way to the others of its domain (NVLink, xGMI or PCIe), per GPU."""
    link_domain: int = 8
    """GPUs that reach each other that way."""
    nic_bytes_per_s: float = 0.0
    """One way to other domains, per GPU."""
    tdp_watts: float = 0.0
    all_in_watts: float | None = None
    """With its share of node, network and cooling; None when nobody has published it."""
    source: str = ""
    weights_only: frozenset[Dtype] = frozenset()
    """Dtypes of weights that kernels widen to BF16 as they compute, e.g. vLLM's Marlin."""
    aliases: tuple[str, ...] = ()
    """Other names that a pool may use."""

    def computes_in(self, weights: Dtype) -> Dtype | None:
        """Dtype of the arithmetic for such weights; None when they cannot be used here."""
        if weights in self.flops_per_s:
            return weights
        if weights in self.weights_only and Dtype.BF16 in self.flops_per_s:
            return Dtype.BF16
        return None


class PriceMarket(StrEnum):
    ON_DEMAND = "on-demand"
    SPOT = "spot"
    OWNED = "owned"


@dataclass(frozen=True, slots=True)
class Price:
    """Of one GPU for an hour."""

    accelerator: str
    usd_per_hour: float
    market: PriceMarket
    provider: str
    dated_s: float
    """Unix time of the day on which it was seen."""
    source: str


PRICE_LASTS_S = 90 * 86400.0


def stale(price: Price, now_s: float) -> bool:
    """Older than 90 days."""
    return now_s - price.dated_s > PRICE_LASTS_S


def prices_of(
    prices: Iterable[Price], accelerator: Accelerator, market: PriceMarket | None = None
) -> tuple[Price, ...]:
    """Cheapest first, of one market or of all."""
    names = (accelerator.name, *accelerator.aliases)
    found = (p for p in prices if p.accelerator in names and market in (None, p.market))
    return tuple(sorted(found, key=lambda price: (price.usd_per_hour, price.provider)))
