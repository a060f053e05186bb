"""Bounds and times of one gateway worker, each default written once."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class GatewayLimits:
    body_bytes: int = 8 * 1024 * 1024
    """Largest request body; beyond it the answer is 413."""
    body_timeout_s: float = 60.0
    """A client must have sent its body by then."""
    headers: int = 100
    """Most header fields of a request; beyond it the answer is 431."""
    waiting_requests: int = 1000
    """Requests that may wait for a group at once; beyond it the answer is 429."""
    waiting_bytes: int = 256 * 1024 * 1024
    """Bodies of the waiting requests, which stay in memory."""
    connect_timeout_s: float = 2.0
    """To a rank, which is in the same network."""
    first_byte_timeout_s: float = 300.0
    """From sending a request to the first event of its stream: queue in the engine plus prefill."""
    whole_answer_timeout_s: float = 900.0
    """The same for an answer that is not streamed, whose first byte comes after its decoding."""
    stall_timeout_s: float = 60.0
    """Longest silence within an answer."""
    client_stall_timeout_s: float = 120.0
    """A client that reads nothing for so long has its request aborted."""
    lost_grace_s: float = 2.0
    """Longest silence of a group that the controller calls lost."""
    exchange_period_s: float = 1.0
    exchange_timeout_s: float = 2.0
    keys_period_s: float = 1.0
    """A revoked key is refused at the latest two periods later."""
    ledger_period_s: float = 0.5
    flush_timeout_s: float = 15.0
    """At shutdown the ledger is tried for so long."""
    drain_delay_s: float = 0.0
    """From turning unready to refusing connections, for load balancers to notice."""
    drain_timeout_s: float = 120.0
    """At shutdown open requests may finish for so long."""
