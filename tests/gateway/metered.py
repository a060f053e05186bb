"""Usage as the tests of journal and writer put it in."""

from expertmesh.core.metering.usage import Outcome
from expertmesh.gateway.usage_journal import Closed, Opened


def opened(number: int, prompt_tokens: int = 7) -> Opened:
    return Opened(
        request_id=f"req_{number}",
        at_s=1000.0,
        tenant="team-a",
        key_id="key_0",
        model="m",
        group="g",
        pool="p",
        endpoint="chat_completions",
        prompt_tokens=prompt_tokens,
        queue_s=0.25,
        ttft_s=0.5,
        usd_per_mtok_in=0.2,
        usd_per_mtok_cached=0.05,
        usd_per_mtok_out=0.6,
    )


def closed(number: int, completion_tokens: int = 56) -> Closed:
    return Closed(
        request_id=f"req_{number}",
        at_s=1000.0,
        tenant="team-a",
        key_id="key_0",
        model="m",
        group="g",
        pool="p",
        endpoint="chat_completions",
        outcome=Outcome.OK,
        prompt_tokens=1234,
        cached_tokens=234,
        completion_tokens=completion_tokens,
        queue_s=0.25,
        ttft_s=0.5,
        duration_s=2.0,
        usd_per_mtok_in=0.2,
        usd_per_mtok_cached=0.05,
        usd_per_mtok_out=0.6,
    )
