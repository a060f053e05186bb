"""What a candidate delivers at the targets, or which of them it misses."""

from dataclasses import dataclass, replace

from expertmesh.core.domain.accelerator import Accelerator
from expertmesh.core.domain.model_shape import Dtype
from expertmesh.core.domain.option import GroupRates
from expertmesh.core.perf.fabric import Fabric
from expertmesh.core.perf.memory import MemoryPlan, engine_limits, memory
from expertmesh.core.perf.queueing import wait_s
from expertmesh.core.perf.rates import (
    DecodeRate,
    Served,
    decode_rate,
    mixed_rate,
    prefill_rate,
    prefill_rate_within,
)
from expertmesh.core.planner.candidates import Candidate, Constraint, Role, RuledOut
from expertmesh.core.planner.question import GpuPool, Targets

_STEP = 16
"""The largest batch is found within one of so many parts of it."""


@dataclass(frozen=True, slots=True)
class Rated:
    """A candidate that meets the targets, with as many users as it can."""

    candidate: Candidate
    memory: MemoryPlan
    batch_per_rank: int
    """Sequences of an attention rank at once; of a prefill group, tokens of its step."""
    tpot_s: float
    """0 for a group that only prefills."""
    ttft_s: float
    """0 for a group that only decodes."""
    tokens_per_s: float
    """Of output; of prompts for a group that only prefills."""
    lone_tpot_s: float
    """With one sequence on each rank."""
    limit: str
    """`tpot`, `ttft`, `kv cache` or `sequences`: what keeps the batch from growing."""
    time_limit: str
    """What takes most of a step: memory, compute, network, fixed or prefill."""
    overlapped: bool
    """A step is faster in two halves, of which one computes while the other is exchanged."""
    rates: GroupRates

    @property
    def gpus(self) -> int:
        return self.candidate.layout.world_size

    @property
    def users(self) -> int:
        return self.batch_per_rank * self.candidate.layout.data


def rate(
    candidate: Candidate, pool: GpuPool, targets: Targets, kv: Dtype, skew: float = 1.0
) -> Rated | RuledOut:
    """`skew`: load of the busiest GPU's experts over the mean."""
    plan = memory_of(candidate, pool.accelerator, targets.context_tokens, kv)
    gib = 2**30
    if not plan.fits:
        longest = plan.longest_context_tokens
        return RuledOut(
            candidate,
            Constraint.MEMORY,
            f"{plan.short_by_bytes / gib:.1f} GiB short on each of {candidate.layout.world_size} "
            "GPUs",
            f"a context of {longest:,} tokens fits" if longest else "more GPUs",
            missing=plan.short_by_bytes * candidate.layout.world_size,
        )
    served = Served(
        candidate.checkpoint.shape,
        pool.accelerator,
        candidate.layout,
        Fabric.of(pool.accelerator, candidate.backend.exchange, candidate.backend.low_latency),
        kv=kv,
        overlap=candidate.backend.overlaps,
        skew=skew,
    )
    if candidate.role is Role.PREFILL:
        return _rate_prefill(candidate, plan, served, targets)
    return _rate_decode(candidate, plan, served, targets)


def memory_of(
    candidate: Candidate, accelerator: Accelerator, context_tokens: int, kv: Dtype
) -> MemoryPlan:
    low_latency = candidate.backend.low_latency
    limits = engine_limits(accelerator, low_latency)
    if candidate.batched_tokens is not None:
        limits = replace(limits, batched_tokens=candidate.batched_tokens)
    return memory(
        candidate.checkpoint.shape,
        accelerator,
        candidate.layout,
        context_tokens=context_tokens,
        kv=kv,
        exchange=candidate.backend.exchange,
        decode_only=low_latency,
        limits=limits,
    )


def _rate_prefill(
    candidate: Candidate, plan: MemoryPlan, served: Served, targets: Targets
) -> Rated | RuledOut:
    prompt = float(targets.input_tokens)
    found = prefill_rate_within(
        served, targets.ttft_s, prompt, plan.limits.batched_tokens, targets.attainment
    )
    if found is None:
        chunk = min(prompt, plan.limits.batched_tokens)
        lone_s = prefill_rate(served, chunk, prompt).step_s * max(1.0, prompt / chunk)
        return _misses(candidate, Constraint.TTFT, lone_s, targets.ttft_s)
    return Rated(
        candidate,
        plan,
        batch_per_rank=int(found.tokens_per_rank),
        tpot_s=0.0,
        ttft_s=found.ttft_s,
        tokens_per_s=found.tokens_per_s,
        lone_tpot_s=0.0,
        limit="ttft",
        time_limit=found.limit,
        overlapped=served.prefill(found.tokens_per_rank, prompt).hidden_s > 0,
        rates=GroupRates(0.0, prefill_tokens_per_s=found.tokens_per_s),
    )


def _rate_decode(
    candidate: Candidate, plan: MemoryPlan, served: Served, targets: Targets
) -> Rated | RuledOut:
    prompt, output = float(targets.input_tokens), float(targets.output_tokens)
    chunk = plan.limits.batched_tokens
    both = candidate.role is Role.BOTH

    def at(batch: int) -> DecodeRate:
        if both:
            return mixed_rate(served, batch, prompt, output, chunk)
        return decode_rate(served, batch, prompt + output / 2)

    def first_token_s(found: DecodeRate) -> float:
        if not both:
            return 0.0
        return _first_token_s(served, found, prompt, output, chunk, targets.attainment)

    length = targets.input_tokens + targets.output_tokens
    sequences = min(plan.limits.sequences, targets.sequences_per_rank or plan.limits.sequences)
    most = min(plan.max_sequences(length), sequences)
    if most < 1:
        return RuledOut(
            candidate,
            Constraint.MEMORY,
            f"no room for a request of {length:,} tokens",
            f"{plan.kv_tokens:,} tokens fit on a rank",
        )
    lone = at(1)
    if lone.tpot_s > targets.tpot_s:
        return _misses(candidate, Constraint.TPOT, lone.tpot_s, targets.tpot_s)
    lone_first_s = first_token_s(lone)
    if lone_first_s > targets.ttft_s:
        return _misses(candidate, Constraint.TTFT, lone_first_s, targets.ttft_s)

    best, best_first_s = lone, lone_first_s
    limit = "kv cache" if most < sequences else "sequences"
    low, high = 1, most + 1
    guess = most
    while high - low > max(1, low // _STEP):
        found = at(guess)
        if found.tpot_s > targets.tpot_s:
            high, limit = guess, "tpot"
        else:
            first_s = first_token_s(found)
            if first_s > targets.ttft_s:
                high, limit = guess, "ttft"
            else:
                low, best, best_first_s = guess, found, first_s
        guess = (low + high) // 2
    return Rated(
        candidate,
        plan,
        batch_per_rank=int(best.batch_per_rank),
        tpot_s=best.tpot_s,
        ttft_s=best_first_s,
        tokens_per_s=best.tokens_per_s,
        lone_tpot_s=lone.tpot_s,
        limit=limit,
        time_limit=best.limit,
        overlapped=served.decode(best.batch_per_rank, prompt + output / 2).hidden_s > 0,
        rates=GroupRates(
            in_flight=best.batch_per_rank * candidate.layout.data,
            prefill_tokens_per_s=best.prefill_tokens_per_s,
            decode_tokens_per_s=best.decode_tokens_per_s,
            lone_tpot_s=lone.tpot_s,
        ),
    )


def _first_token_s(
    served: Served,
    found: DecodeRate,
    prompt: float,
    output: float,
    chunk: float,
    attainment: float,
) -> float:
    """Within which this share of prompts has its first token, while others get theirs.

    Steps with a full chunk of prompts follow one another like a server with constant service
    times; part of a step passes before the first of them.
    """
    batch = found.batch_per_rank
    whole = min(chunk, prompt)
    decode_s = served.decode(batch, prompt + output / 2).total_s
    step = served.prefill(whole, prompt)
    step_s = decode_s + max(0.0, step.total_s - step.fixed_s)
    service_s = step_s * max(1.0, prompt / chunk)
    prompts_per_s = batch / (output * found.tpot_s)
    # Several short prompts share a step.
    busy = prompts_per_s * service_s * min(1.0, prompt / chunk)
    return attainment * decode_s + service_s + wait_s(service_s, busy, attainment)


def _misses(
    candidate: Candidate, constraint: Constraint, best_s: float, target_s: float
) -> RuledOut:
    return RuledOut(
        candidate,
        constraint,
        f"{constraint.value.upper()} {best_s * 1000:,.0f} ms even for one user, "
        f"target {target_s * 1000:,.0f} ms",
        f"{best_s:.3g} s",
        missing=best_s,
    )
