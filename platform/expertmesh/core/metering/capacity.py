"""How long groups and nodes were held, and at what price: the cost side of the ledger."""

from dataclasses import dataclass

WHOLE_POOL = ""
"""In place of a node's id: while such a hold lasts, all nodes of the pool are known. It costs
nothing itself; without it, a pool without nodes could not be told from one nobody looked at."""


@dataclass(frozen=True, slots=True)
class CapacityHold:
    """A group, from the request to start it until its placement group is gone."""

    group: str
    model: str
    pool: str
    usd_per_hour: float
    """As in the group's spec; rated through its shortest decimal form, so 0.3 is exactly 0.3."""
    started_at_s: float
    """Unix time from which the group occupied nodes. A controller that re-adopts a group passes
    the start that the ledger already holds."""
    seen_at_s: float
    """Unix time at which the group was last known to be held; an open hold costs until then."""
    ended_at_s: float | None = None
    ready_at_s: float | None = None
    """When it could first serve; None: it has not been ready."""
    draining_at_s: float | None = None
    """Since when it gets no new requests; None: it does."""
    prefill_tokens_per_s: float | None = None
    """Like the next: what the group does if it does nothing else. Without both, requests in flight
    share the cost equally."""
    decode_tokens_per_s: float | None = None
    idle_watts: float | None = None
    """Of the accelerators that it occupies while nothing runs; None: not known."""
    busy_watts: float | None = None

    @property
    def held_until_s(self) -> float:
        return self.seen_at_s if self.ended_at_s is None else self.ended_at_s

    def work_s(self, uncached_tokens: int, output_tokens: int) -> tuple[float, float] | None:
        """Of the group's time for prefill and for decode; None when its rates are not known."""
        if not self.prefill_tokens_per_s or not self.decode_tokens_per_s:
            return None
        return (
            uncached_tokens / self.prefill_tokens_per_s,
            output_tokens / self.decode_tokens_per_s,
        )


@dataclass(frozen=True, slots=True)
class NodeHold:
    """A node, from when it was first seen until it is gone, whether or not a group uses it."""

    pool: str
    node_id: str
    """As Ray calls it, which gives no id twice; or WHOLE_POOL."""
    usd_per_hour: float
    started_at_s: float
    seen_at_s: float
    ended_at_s: float | None = None
    idle_watts: float | None = None
    """Of all its accelerators while nothing runs; None: not known."""

    @property
    def held_until_s(self) -> float:
        return self.seen_at_s if self.ended_at_s is None else self.ended_at_s
