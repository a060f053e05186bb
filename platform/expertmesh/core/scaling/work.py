"""The work of requests: how long they are, how many come, and the load that they make."""

import math
from dataclasses import dataclass, replace

from expertmesh.core.domain.option import GroupRates
from expertmesh.core.scaling.demand import Demand

_ARRIVALS_S = 30.0
"""Time constant of the rate of arrivals; bursts shorter than this are for the queue."""
_LENGTHS_S = 300.0
"""Of the mean lengths of requests."""
_SELDOM_S = 3600.0
"""Of the rate that tells how soon an idle model is asked again."""
_FEW = 3.0
"""Requests that must have finished before their mean length is believed."""


@dataclass(frozen=True, slots=True)
class Work:
    """Moving means over a model's requests, all gateways together."""

    arrivals_per_s: float = 0.0
    seldom_arrivals_per_s: float = 0.0
    done_per_s: float = 0.0
    """Requests that finished, of the same time as the arrivals."""
    finished_per_s: float = 0.0
    """Of as long a time as the next two."""
    prompt_tokens_per_s: float = 0.0
    """Uncached prompt tokens of the requests that finished."""
    output_tokens_per_s: float = 0.0
    finished: float = 0.0
    """Requests that these means rest on, the older ones forgotten."""
    for_s: float = 0.0
    """How long there have been reports: younger than their time constants, means are plain ones."""

    def seen(self, demand: Demand, over_s: float) -> "Work":
        if over_s <= 0:
            return self
        for_s = self.for_s + over_s
        arrivals = _share(over_s, min(_ARRIVALS_S, for_s))
        lengths = _share(over_s, min(_LENGTHS_S, for_s))
        seldom = _share(over_s, min(_SELDOM_S, for_s))
        flow = demand.flow
        return replace(
            self,
            arrivals_per_s=_towards(self.arrivals_per_s, flow.arrivals_per_s, arrivals),
            seldom_arrivals_per_s=_towards(self.seldom_arrivals_per_s, flow.arrivals_per_s, seldom),
            done_per_s=_towards(self.done_per_s, flow.finished_per_s, arrivals),
            finished_per_s=_towards(self.finished_per_s, flow.finished_per_s, lengths),
            prompt_tokens_per_s=_towards(
                self.prompt_tokens_per_s, flow.uncached_prompt_tokens_per_s, lengths
            ),
            output_tokens_per_s=_towards(
                self.output_tokens_per_s, flow.output_tokens_per_s, lengths
            ),
            # Lengths that were known stay so while nothing finishes here.
            finished=max(self.finished * (1 - lengths), min(self.finished, _FEW))
            + flow.finished_per_s * over_s,
            for_s=min(for_s, 2 * _SELDOM_S),
        )

    @property
    def is_known(self) -> bool:
        return self.finished >= _FEW and self.finished_per_s > 0

    @property
    def prompt_tokens(self) -> float:
        """Uncached, of a mean request."""
        return self.prompt_tokens_per_s / self.finished_per_s if self.finished_per_s else 0.0

    @property
    def output_tokens(self) -> float:
        return self.output_tokens_per_s / self.finished_per_s if self.finished_per_s else 0.0

    def seconds(self, rates: GroupRates) -> float | None:
        """Of a group's time that a mean request takes, as planned; None when that is not known."""
        if not self.is_known:
            return None
        seconds = rates.seconds(self.prompt_tokens, self.output_tokens)
        return seconds if seconds else None


def _share(over_s: float, constant_s: float) -> float:
    return 1.0 - math.exp(-over_s / constant_s) if constant_s > 0 else 1.0


def _towards(old: float, new: float, share: float) -> float:
    return old + share * (new - old)
