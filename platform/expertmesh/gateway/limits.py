"""Bounds and times of one gateway worker, each default written once."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class GatewayLimits:
    body_bytes: int = 8 * 1024 * 1024
    """Largest request body; beyond it the answer is 413."""
    body_timeout_s: float = 60.0
    """A client must have sent its body by then."""
    head_bytes: int = 64 * 1024
    """Largest request line and header fields together; beyond it the answer is 431."""
    head_timeout_s: float = 10.0
    keep_alive_s: float = 75.0
    """Longer than clients keep idle connections, so that none is used while it closes."""
    headers: int = 100
    """Most header fields of a request; beyond it the answer is 431."""
    waiting_requests: int = 1000
    """Requests of one model that may wait at once; beyond it the answer is 429."""
    waiting_tokens: int = 50_000_000
    """The same in tokens, prompts and completions as estimated."""
    waiting_bytes: int = 256 * 1024 * 1024
    """Bodies of the waiting requests of one model, which stay in memory."""
    most_wait_s: float | None = None
    """Longest wait of any request; None: as long as its model allows."""
    hold_silent_s: float = 15.0
    """A stream that waits for longer gets its head and comments, so that nothing on the way takes
    the connection for a dead one. From then on errors can only come as events."""
    hold_comment_s: float = 10.0
    """Time between two comments."""
    max_attempts: int = 2
    """Groups or ranks that one request may visit."""
    connect_timeout_s: float = 2.0
    """To a rank, which is in the same network."""
    first_byte_timeout_s: float = 300.0
    """From sending a request to the first event of its stream: queue in the engine plus prefill."""
    whole_answer_timeout_s: float = 900.0
    """The same for an answer that is not streamed, whose first byte comes after its decoding."""
    stall_timeout_s: float = 60.0
    """Longest silence within an answer."""
    whole_answer_bytes: int = 64 * 1024 * 1024
    """Largest answer that is not streamed."""
    client_stall_timeout_s: float = 120.0
    """A client that reads nothing for so long has its request aborted."""
    end_grace_s: float = 0.5
    """For the end of a stream's body to come after its last event, so that the connection can be
    used again."""
    lost_grace_s: float = 2.0
    """Longest silence of a group that the controller calls lost."""
    exchange_period_s: float = 1.0
    exchange_timeout_s: float = 2.0
    probe_timeout_s: float = 2.0
    """For a rank that was ejected to show that it is back."""
    keys_period_s: float = 1.0
    """A revoked key is refused at the latest two periods later."""
    ledger_period_s: float = 0.5
    flush_timeout_s: float = 4.0
    """At shutdown the ledger is tried for so long; the journal keeps the rest for the next
    start."""
    drain_delay_s: float = 0.0
    """From turning unready to refusing connections, for load balancers to notice."""
    drain_timeout_s: float = 120.0
    """At shutdown open requests may finish for so long."""
