"""What a group delivers: tokens a second and latencies, by batch and by target."""

from dataclasses import dataclass, field

from expertmesh.core.domain.accelerator import Accelerator
from expertmesh.core.domain.model_shape import Dtype, ModelShape
from expertmesh.core.perf.efficiency import Efficiency
from expertmesh.core.perf.fabric import Fabric
from expertmesh.core.perf.layout import Layout
from expertmesh.core.perf.queueing import busiest
from expertmesh.core.perf.step_time import StepTime, decode_step, prefill_step
from expertmesh.core.perf.work import Model

PREFILL_TOKENS = 16384
"""Of a rank's step at most, unless told otherwise."""

ATTAINMENT = 0.99
"""Share of requests that keep a target, unless told otherwise."""


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
    skew: float = 1.0
    """As in `decode_step`, like the next one."""
    reached: Efficiency | None = None
    model: Model = field(init=False, repr=False, compare=False)
    _steps: dict[tuple[bool, float, float], StepTime] = field(
        init=False, repr=False, compare=False, default_factory=dict
    )
    """Known ones: a search asks for the same step many times."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", Model.of(self.shape, self.layout))

    def decode(self, batch_per_rank: float, context: float) -> StepTime:
        key = (False, batch_per_rank, context)
        if key not in self._steps:
            self._steps[key] = self._decode(batch_per_rank, context)
        return self._steps[key]

    def prefill(self, tokens_per_rank: float, context: float) -> StepTime:
        key = (True, tokens_per_rank, context)
        if key not in self._steps:
            self._steps[key] = self._prefill(tokens_per_rank, context)
        return self._steps[key]

    def _decode(self, batch_per_rank: float, context: float) -> StepTime:
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
            model=self.model,
        )

    def _prefill(self, tokens_per_rank: float, context: float) -> StepTime:
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
            model=self.model,
        )


@dataclass(frozen=True, slots=True)
class DecodeRate:
    batch_per_rank: float
    tpot_s: float
    tokens_per_s: float
    """Of the group."""
    limit: str
    """As `StepTime.limit`."""
    decode_tokens_per_s: float
    """Of the group with this batch, if it only decoded."""
    prefill_tokens_per_s: float | None = None
    """Of its prompts, if it only read them: so that both parts add up to the time that a request
    takes. None for a group that reads none."""


@dataclass(frozen=True, slots=True)
class PrefillRate:
    tokens_per_rank: float
    """Of one step."""
    step_s: float
    ttft_s: float
    """With the wait for the steps before at this rate."""
    tokens_per_s: float
    """Of the group."""
    limit: str


def decode_rate(served: Served, batch_per_rank: float, context: float) -> DecodeRate:
    """Of a group that only decodes."""
    step = served.decode(batch_per_rank, context)
    tpot_s = step.total_s / served.accepted_per_step
    tokens_per_s = batch_per_rank * served.layout.data / tpot_s
    return DecodeRate(batch_per_rank, tpot_s, tokens_per_s, step.limit, tokens_per_s)


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
    prompts = batch_per_rank * served.accepted_per_step / output  # That a step has to begin.
    chunk = max(1.0, min(step_tokens, batch_per_rank * prompt))
    chunk_step = served.prefill(chunk, prompt)
    per_token_s = (chunk_step.total_s - chunk_step.fixed_s) / chunk
    # A step with a prompt in it is prepared anew and not replayed, however short the prompt.
    unprepared_s = step.fixed_s * min(1.0, prompts)
    prefill_s = prompts * prompt * per_token_s + unprepared_s
    total_s = step.total_s + prefill_s
    tpot_s = total_s / served.accepted_per_step
    tokens_per_s = batch_per_rank * served.layout.data / tpot_s
    limit = "prefill" if prefill_s > step.total_s else step.limit
    return DecodeRate(
        batch_per_rank,
        tpot_s,
        tokens_per_s,
        limit,
        decode_tokens_per_s=tokens_per_s * total_s / step.total_s,
        prefill_tokens_per_s=prompts * prompt * served.layout.data / prefill_s,
    )


def prefill_rate(served: Served, tokens_per_rank: float, prompt: float) -> PrefillRate:
    """Of a group that only prefills, with steps of `tokens_per_rank` back to back."""
    step = served.prefill(tokens_per_rank, prompt)
    tokens_per_s = tokens_per_rank * served.layout.data / step.total_s
    return PrefillRate(tokens_per_rank, step.total_s, step.total_s, tokens_per_s, step.limit)


def prefill_rate_within(
    served: Served,
    ttft_s: float,
    prompt: float,
    at_most: float = PREFILL_TOKENS,
    attainment: float = ATTAINMENT,
) -> PrefillRate | None:
    """The highest prefill rate at which this share of prompts has its first token in `ttft_s`.

    A prompt waits for the steps before it like a customer of a queue with constant service times
    and then takes one step. None when a lone prompt takes longer than that.
    """
    best: PrefillRate | None = None
    tokens = max(1.0, min(prompt, at_most))
    steps_a_prompt = max(1.0, prompt / at_most)
    while True:
        full = prefill_rate(served, tokens, prompt)
        service_s = full.step_s * steps_a_prompt
        if service_s < ttft_s:
            busy = busiest(service_s, ttft_s - service_s, attainment)
            found = PrefillRate(tokens, full.step_s, ttft_s, busy * full.tokens_per_s, full.limit)
            if best is None or found.tokens_per_s > best.tokens_per_s:
                best = found
        if tokens >= at_most:
            return best
        tokens = min(at_most, tokens * 2)
