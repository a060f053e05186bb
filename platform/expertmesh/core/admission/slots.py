"""Whether a group has room for one more request, from its last report and what was sent since."""

from dataclasses import dataclass

from expertmesh.core.domain.fleet import GroupLoad


@dataclass(frozen=True, slots=True)
class SlotRules:
    kv_ceiling: float = 0.95
    """Share of the KV cache that may be in use; above it engines begin to preempt."""
    waiting_per_rank: int = 1
    """Requests that may queue inside the engine, so that its batch is filled again at once."""
    max_in_flight_per_rank: int = 256
    """Where the engine does not say how many sequences it batches."""
    kv_overcommit: float | None = None
    """Most tokens in flight of this gateway, completions at their maximum, as a multiple of the KV
    cache; None for no such bound, since most completions end early."""


def has_room(
    rules: SlotRules,
    load: GroupLoad,
    ranks: int,
    elsewhere: int,
    in_flight: int,
    tokens_in_flight: int,
    prompt_tokens_since: int,
    prompt_tokens: int,
    tokens: int,
) -> bool:
    """Room for a request of `prompt_tokens`, and `tokens` with its longest completion.

    `load` is as last reported, `elsewhere` what other gateways had in flight then. `in_flight`,
    `tokens_in_flight` and `prompt_tokens_since` (sent since that report) are this gateway's, now.
    A group with nothing in flight always has room, or a long prompt would never be served.
    """
    total = in_flight + elsewhere
    if total <= 0:
        return True
    if load.max_running > 0:
        if total >= load.max_running + rules.waiting_per_rank * ranks:
            return False
    elif total >= rules.max_in_flight_per_rank * ranks:
        return False
    kv_tokens = load.kv_tokens
    if kv_tokens <= 0:
        return True
    used = load.kv_usage * kv_tokens + prompt_tokens_since
    if used + prompt_tokens > rules.kv_ceiling * kv_tokens:
        return False
    overcommit = rules.kv_overcommit
    return overcommit is None or tokens_in_flight + tokens <= overcommit * kv_tokens
