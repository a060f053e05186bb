"""The wires of one group, and how long its exchanges take on them."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Self

from expertmesh.core.domain.accelerator import Accelerator

LINK_SHARE = 0.75
"""Of the published link bandwidth. DeepEP reaches 153 to 158 of 200 GB/s on H800, its V2 726 of 900
on B200."""
NIC_SHARE = 0.88
"""Of the published NIC bandwidth. DeepEP low latency at EP 64 to 256, less the latency below."""
LINK_LATENCY_S = 10e-6
NIC_LATENCY_S = 25e-6
"""Of one exchange without payload; what is left of DeepEP's figures at 128 tokens."""
LEAST_SCATTER_S = (48e-6, 78e-6, 107e-6, 122e-6, 140e-6)
"""Of one way to experts in 1, 2, 4, 8, and 16 or more domains: half of what DeepEP's low-latency
kernels take for 128 tokens at EP 8 to 128 on H800, mean of both ways. Fewer tokens take no less."""


class Exchange(StrEnum):
    """How tokens reach their experts and come back."""

    DEEP_EP = "deep-ep"
    """A copy an expert in decode; in prefill one copy a node, spread from there."""
    ALL_GATHER = "all-gather"
    """Every rank gets all tokens, then a reduce-scatter: vLLM's `allgather_reducescatter`."""


@dataclass(frozen=True, slots=True)
class Fabric:
    link_bytes_per_s: float
    """One way, per GPU, inside a domain."""
    link_domain: int
    """GPUs of one domain."""
    nic_bytes_per_s: float
    """One way, per GPU, between domains; 0 when there is no way."""
    exchange: Exchange = Exchange.DEEP_EP
    link_latency_s: float = LINK_LATENCY_S
    nic_latency_s: float = NIC_LATENCY_S
    copies_alone: bool = False
    """Every copy travels alone in prefill too, as with DeepEP's low-latency kernels."""

    @classmethod
    def of(
        cls,
        accelerator: Accelerator,
        exchange: Exchange = Exchange.DEEP_EP,
        copies_alone: bool = False,
    ) -> Self:
        return cls(
            link_bytes_per_s=accelerator.link_bytes_per_s * LINK_SHARE,
            link_domain=accelerator.link_domain,
            nic_bytes_per_s=accelerator.nic_bytes_per_s * NIC_SHARE,
            exchange=exchange,
            copies_alone=copies_alone,
        )

    def domains(self, gpus: int) -> int:
        return -(-gpus // self.link_domain)

    def reaches(self, gpus: int) -> bool:
        """Whether so many GPUs can talk at all."""
        if gpus <= 1:
            return True
        return self.link_bytes_per_s > 0 and (self.domains(gpus) == 1 or self.nic_bytes_per_s > 0)

    def all_reduce_s(self, payload_bytes: float, gpus: int) -> float:
        """Sum of `payload_bytes` on each of `gpus`; inside the domains first, then between them."""
        if gpus <= 1:
            return 0.0
        inside = min(gpus, self.link_domain)
        seconds = self.link_latency_s
        seconds += 2 * payload_bytes * (inside - 1) / inside / self.link_bytes_per_s
        domains = self.domains(gpus)
        if domains > 1:
            seconds += self.nic_latency_s
            # Each GPU of a domain carries its share of the sum to the other domains.
            seconds += 2 * payload_bytes / inside * (domains - 1) / domains / self.nic_bytes_per_s
        return seconds

    def all_gather_s(self, payload_bytes: float, gpus: int) -> float:
        """Every one of `gpus` gets the `payload_bytes` of each other; a reduce-scatter as well."""
        if gpus <= 1:
            return 0.0
        inside = min(gpus, self.link_domain)
        domains = self.domains(gpus)
        seconds = self.link_latency_s + payload_bytes * (gpus - 1) / self.link_bytes_per_s
        if domains > 1:
            across = payload_bytes * (gpus - inside) / inside / self.nic_bytes_per_s
            seconds += self.nic_latency_s + across
        return seconds

    def scatter_s(
        self, tokens: float, copies: int, token_bytes: float, gpus: int, copies_by_domain: float
    ) -> float:
        """Tokens of one GPU to their experts, one way.

        `copies` experts take a token; `copies_by_domain` is how many domains it is sent to, the
        own one among them, or `copies` when each copy travels alone.
        """
        if gpus <= 1:
            return 0.0
        domains = self.domains(gpus)
        inside = min(gpus, self.link_domain)
        # With many domains, the share that stays at home goes over links as well.
        over_links = tokens * copies * token_bytes * (inside - 1) / inside / self.link_bytes_per_s
        least_s = LEAST_SCATTER_S[min(len(LEAST_SCATTER_S), domains.bit_length()) - 1]
        if domains == 1:
            return max(least_s, self.link_latency_s + over_links)
        away = (domains - 1) / domains
        over_nics = tokens * copies_by_domain * away * token_bytes / self.nic_bytes_per_s
        if copies_by_domain < copies:
            return max(least_s, self.nic_latency_s + max(over_nics, over_links))
        return max(least_s, self.nic_latency_s + max(over_nics, over_links * (1 - away)))


def expected_domains(copies: int, domains: int, limit: int | None) -> float:
    """Distinct domains that `copies` random experts lie in.

    `domains · (1 - (1 - 1/domains)^copies)`, at most `limit` when routing is limited to so many.
    """
    distinct = domains * (1 - (1 - 1 / domains) ** copies)
    return distinct if limit is None else min(distinct, float(limit))
