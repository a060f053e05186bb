"""GPUs: what one holds, moves, computes and draws."""

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
    """With its share of the node, the network and the cooling; None when nobody has published it."""
    source: str = ""


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
