"""The ways in which a group of a model can be run, and what one such group does."""

from dataclasses import dataclass, field
from functools import cache
from typing import Any

from expertmesh.core.domain.fleet import Parallelism


@dataclass(frozen=True, slots=True)
class GroupRates:
    """What one group does while it meets the latency targets."""

    in_flight: float
    """Requests at once."""
    prefill_tokens_per_s: float | None = None
    """Uncached prompt tokens, if it did nothing else; None: not known."""
    decode_tokens_per_s: float | None = None
    """Output tokens, if it did nothing else; None: not known."""
    lone_tpot_s: float | None = None
    """Time per output token of a request that is alone; None: not known."""

    def seconds(self, prompt_tokens: float, output_tokens: float) -> float | None:
        """Of one group's time that such a request takes; None when the rates are not known."""
        if self.prefill_tokens_per_s is None or self.decode_tokens_per_s is None:
            return None
        prefill_s = prompt_tokens / self.prefill_tokens_per_s
        return prefill_s + output_tokens / self.decode_tokens_per_s


@cache
def option_name(pool: str, parallelism: Parallelism) -> str:
    sizes = parallelism
    return f"{pool}/t{sizes.tensor}d{sizes.data}e{sizes.expert}"


@dataclass(frozen=True, slots=True)
class GroupOption:
    """One pool and one size: what the controller chooses among, and the price of a choice."""

    pool: str
    parallelism: Parallelism
    usd_per_hour: float
    """Of one group."""
    rates: GroupRates
    """As planned; what groups really do corrects them."""
    start_s: float
    """From asking for a group to its being ready, until that has been measured."""
    engine: dict[str, Any] = field(default_factory=dict)
    """vLLM engine arguments that belong to it."""

    @property
    def name(self) -> str:
        return option_name(self.pool, self.parallelism)

    @property
    def workers(self) -> int:
        return self.parallelism.data * self.parallelism.tensor
