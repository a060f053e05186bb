"""What a group delivers: tokens a second and latencies, by batch and by target."""

from collections.abc import Callable
from dataclasses import dataclass

from expertmesh.core.domain.accelerator import Accelerator
from expertmesh.core.domain.model_shape import Dtype, ModelShape
from expertmesh.core.perf.efficiency import Efficiency
from expertmesh.core.perf.fabric import Fabric
from expertmesh.core.perf.layout import Layout
from expertmesh.core.perf.step_time import StepTime, decode_step, prefill_step

LARGEST_BATCH = 16384
PREFILL_TOKENS = 16384
"""Of a rank's step at most, unless told otherwise."""


@dataclass(frozen=True, slots=True)
class Served:
    """A model in one dtype, on GPUs laid out in one way: what all questions here are about."""

    shape: ModelShape
    accelerator: Accelerator
    layout: Layout
    fabric: Fabric
    kv: Dtype = Dtype.BF16
    overlap: bool = True
    tokens_per_sequence: int = 1
    accepted_per_step: float = 1.0
    """Tokens that a step yields a sequence; above 1 with drafted tokens."""
    skew: float | None = None
    reached: Efficiency | None = None

    def decode(self, batch_per_rank: float, context: float) -> StepTime:
        return decode_step(
            self.shape,
            self.accelerator,
            self.layout,
            self.fabric,
            batch_per_rank,
            context,
            kv=self.kv,
            overlap=self.overlap,
            tokens_per_sequence=self.tokens_per_sequence,
            skew=self.skew,
            reached=self.reached,
        )

    def prefill(self, tokens_per_rank: float, context: float) -> StepTime:
        return prefill_step(
            self.shape,
            self.accelerator,
            self.layout,
            self.fabric,
            tokens_per_rank,
            context,
            kv=self.kv,
            overlap=self.overlap,
            skew=self.skew,
            reached=self.reached,
        )


@dataclass(frozen=True, slots=True)
class DecodeRate:
    batch_per_rank: float
    tpot_s: float
    tokens_per_s: float
    """Of the group."""
    limit: str
    """As `StepTime.limit`."""


@dataclass(frozen=True, slots=True)
class PrefillRate:
    tokens_per_rank: float
    """Of one step."""
    step_s: float
    ttft_s: float
    """Mean, with the wait for the step before at this rate."""
    tokens_per_s: float
    """Of the group."""
    limit: str


def decode_rate(served: Served, batch_per_rank: float, context: float) -> DecodeRate:
    """Of a group that only decodes."""
    step = served.decode(batch_per_rank, context)
    tpot_s = step.total_s / served.accepted_per_step
    tokens_per_s = batch_per_rank * served.layout.data / tpot_s
    return DecodeRate(batch_per_rank, tpot_s, tokens_per_s, step.limit)


def mixed_rate(
    served: Served,
    batch_per_rank: float,
    prompt: float,
    output: float,
    step_tokens: float = PREFILL_TOKENS,
) -> DecodeRate:
    """Of a group that does both: while a sequence gets its tokens, others' prompts come in chunks.

    In the steady state each finished sequence makes room for one prompt, so every token of output
    carries `prompt / output` tokens of prefill, which all sequences of the rank wait for.
    `tokens_per_s` counts output only.
    """
    step = served.decode(batch_per_rank, prompt + output / 2)
    prefill_tokens = batch_per_rank * prompt / output * served.accepted_per_step
    chunk = max(1.0, min(step_tokens, batch_per_rank * prompt))
    chunk_step = served.prefill(chunk, prompt)
    # A chunk rides on a decode step: what the step costs anyway is not paid twice.
    extra_s = max(0.0, chunk_step.total_s - chunk_step.fixed_s)
    total_s = step.total_s + extra_s * prefill_tokens / chunk
    tpot_s = total_s / served.accepted_per_step
    tokens_per_s = batch_per_rank * served.layout.data / tpot_s
    limit = step.limit if step.total_s >= total_s / 2 else "prefill"
    return DecodeRate(batch_per_rank, tpot_s, tokens_per_s, limit)


def largest_batch(
    tpot_s: float, rate: Callable[[int], DecodeRate], at_most: int = LARGEST_BATCH
) -> DecodeRate | None:
    """The largest batch a rank whose time per token is within `tpot_s`; None when even 1 is slower.

    `rate` is one of the above as a function of the batch; `at_most` is what the cache holds.
    """
    if at_most < 1:
        return None
    best = rate(1)
    if best.tpot_s > tpot_s:
        return None
    slowest = rate(at_most)
    if slowest.tpot_s <= tpot_s:
        return slowest
    low, high = 1, at_most
    while high - low > 1:
        middle = (low + high) // 2
        found = rate(middle)
        if found.tpot_s <= tpot_s:
            low, best = middle, found
        else:
            high = middle
    return best


def prefill_rate(served: Served, tokens_per_rank: float, prompt: float) -> PrefillRate:
    """Of a group that only prefills, with steps of `tokens_per_rank` back to back."""
    step = served.prefill(tokens_per_rank, prompt)
    tokens_per_s = tokens_per_rank * served.layout.data / step.total_s
    return PrefillRate(tokens_per_rank, step.total_s, step.total_s, tokens_per_s, step.limit)


def prefill_rate_within(
    served: Served, ttft_s: float, prompt: float, at_most: float = PREFILL_TOKENS
) -> PrefillRate | None:
    """The highest prefill rate whose mean time to the first token is within `ttft_s`.

    A prompt waits for the steps before it like a customer of a queue with constant service times
    (M/D/1) and then takes one step. None when a lone prompt takes longer than that.
    """
    best: PrefillRate | None = None
    tokens = max(1.0, min(prompt, at_most))
    steps_a_prompt = max(1.0, prompt / at_most)
    while True:
        full = prefill_rate(served, tokens, prompt)
        service_s = full.step_s * steps_a_prompt
        if service_s < ttft_s:
            waits = (ttft_s - service_s) / service_s
            busy = 2 * waits / (1 + 2 * waits)
            found = PrefillRate(tokens, full.step_s, ttft_s, busy * full.tokens_per_s, full.limit)
            if best is None or found.tokens_per_s > best.tokens_per_s:
                best = found
        if tokens >= at_most:
            return best
        tokens = min(at_most, tokens * 2)
