"""How long one step of a group takes: a roofline a kind of layer, exchanges, and a fixed cost.

Everything is of the busiest GPU; the group waits for it. Efficiencies are an era's
(`core.perf.efficiency`), exchanges those of a `Fabric`.
"""

from dataclasses import dataclass

from expertmesh.core.domain.accelerator import Accelerator
from expertmesh.core.domain.model_shape import Dtype, ModelShape
from expertmesh.core.perf.efficiency import Efficiency, efficiency
from expertmesh.core.perf.fabric import Exchange, Fabric, expected_domains
from expertmesh.core.perf.layout import Layout
from expertmesh.core.perf.work import (
    Model,
    Tokens,
    Work,
    attention_work,
    dense_work,
    expert_work,
)

OVERLAP_DECODE_TOKENS = 32
OVERLAP_PREFILL_TOKENS = 512
"""Fewer tokens on a rank are never split into two batches: vLLM's DBO thresholds."""
HIDDEN_SHARE = 0.5
"""Of the exchanges of one half, behind the other half: kernels share the GPU, and halves differ in
length. Full overlap would make splitting twice the gain that SGLang saw (lmsys 2025-05-05)."""


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of one step; the parts less what is hidden add up to `total_s`."""

    attention_s: float
    experts_s: float
    dense_s: float
    """Dense layers, shared experts and the output head."""
    network_s: float
    fixed_s: float
    hidden_s: float
    """Of the network, behind the other half of the batch."""
    memory_bound_s: float
    """Of the first three: what memory bandwidth limits. The rest of them is arithmetic."""

    @property
    def total_s(self) -> float:
        busy_s = self.attention_s + self.experts_s + self.dense_s + self.fixed_s
        return busy_s + self.network_s - self.hidden_s

    @property
    def limit(self) -> str:
        """What takes most: `memory`, `compute`, `network` or `fixed`."""
        layers_s = self.attention_s + self.experts_s + self.dense_s
        parts = {
            "memory": self.memory_bound_s,
            "compute": layers_s - self.memory_bound_s,
            "network": self.network_s - self.hidden_s,
            "fixed": self.fixed_s,
        }
        return max(parts, key=lambda name: parts[name])


def decode_step(
    shape: ModelShape,
    accelerator: Accelerator,
    layout: Layout,
    fabric: Fabric,
    batch_per_rank: float,
    context: float,
    *,
    kv: Dtype = Dtype.BF16,
    overlap: bool = True,
    tokens_per_sequence: int = 1,
    skew: float = 1.0,
    reached: Efficiency | None = None,
    model: Model | None = None,
) -> StepTime:
    """One token for each of `batch_per_rank` sequences of an attention rank.

    `context` is the mean of cached tokens a sequence. `tokens_per_sequence` is above 1 when drafted
    tokens are checked; how many of them are accepted is the caller's to apply. With `overlap` a
    batch is split in two when that is faster. `skew` is the load of the busiest GPU's experts over
    the mean; `reached` is the era's efficiency unless given; `model` is `Model.of(shape, layout)`,
    for callers who ask often.
    """
    if batch_per_rank <= 0 or context < 0 or tokens_per_sequence < 1:
        raise ValueError(f"no decode step of {batch_per_rank} sequences at context {context}")
    tokens = Tokens(batch_per_rank * tokens_per_sequence, batch_per_rank, context, prefill=False)
    minimum = OVERLAP_DECODE_TOKENS if overlap else None
    model = model or Model.of(shape, layout)
    return _step(model, accelerator, fabric, tokens, kv, minimum, skew, reached)


def prefill_step(
    shape: ModelShape,
    accelerator: Accelerator,
    layout: Layout,
    fabric: Fabric,
    tokens_per_rank: float,
    context: float,
    *,
    kv: Dtype = Dtype.BF16,
    overlap: bool = True,
    skew: float = 1.0,
    reached: Efficiency | None = None,
    model: Model | None = None,
) -> StepTime:
    """`tokens_per_rank` tokens of prompts of `context` tokens each, on each attention rank."""
    if tokens_per_rank <= 0 or context <= 0:
        raise ValueError(f"no prefill step of {tokens_per_rank} tokens at context {context}")
    tokens = Tokens(tokens_per_rank, tokens_per_rank / context, context, prefill=True)
    minimum = OVERLAP_PREFILL_TOKENS if overlap else None
    model = model or Model.of(shape, layout)
    return _step(model, accelerator, fabric, tokens, kv, minimum, skew, reached)


def _step(
    model: Model,
    accelerator: Accelerator,
    fabric: Fabric,
    tokens: Tokens,
    kv: Dtype,
    overlap_from: int | None,
    skew: float,
    reached: Efficiency | None,
) -> StepTime:
    reached = reached or efficiency(accelerator.era)
    layout = model.layout
    if not fabric.reaches(layout.world_size):
        raise ValueError(f"{layout.world_size} GPUs of {accelerator.name} cannot reach each other")
    whole = _pass(model, accelerator, fabric, tokens, kv, skew, reached)
    exchanges = layout.expert_parallel and layout.data > 1 and fabric.exchange is Exchange.DEEP_EP
    if overlap_from is None or not exchanges or tokens.count < overlap_from:
        return whole
    half_tokens = Tokens(tokens.count / 2, tokens.sequences / 2, tokens.context, tokens.prefill)
    half = _pass(model, accelerator, fabric, half_tokens, kv, skew, reached)
    busy_s = 2 * (half.attention_s + half.experts_s + half.dense_s + half.fixed_s)
    split = StepTime(
        attention_s=2 * half.attention_s,
        experts_s=2 * half.experts_s,
        dense_s=2 * half.dense_s,
        network_s=2 * half.network_s,
        fixed_s=2 * half.fixed_s,
        hidden_s=HIDDEN_SHARE * min(busy_s, 2 * half.network_s),
        memory_bound_s=2 * half.memory_bound_s,
    )
    return min(whole, split, key=lambda step: step.total_s)


def _pass(
    model: Model,
    accelerator: Accelerator,
    fabric: Fabric,
    tokens: Tokens,
    kv: Dtype,
    skew: float,
    reached: Efficiency,
) -> StepTime:
    shape = model.shape
    others = _peak(accelerator, shape.quantisation.others)
    experts = _peak(accelerator, shape.quantisation.experts)
    cache = _peak(accelerator, kv)
    bandwidth = accelerator.memory_bytes_per_s
    plain = bandwidth * reached.memory
    parts = [
        _roofline(work, weights_rate, plain, peak * reached.compute, cache * reached.compute)
        for work, weights_rate, peak in (
            (attention_work(model, tokens, kv), plain, others),
            (expert_work(model, tokens, skew), bandwidth * reached.experts_memory, experts),
            (dense_work(model, tokens), plain, others),
        )
    ]
    return StepTime(
        attention_s=parts[0][0],
        experts_s=parts[1][0],
        dense_s=parts[2][0],
        network_s=_network_s(shape, accelerator, model.layout, fabric, tokens, skew),
        fixed_s=reached.fixed_s_per_layer * shape.layers
        + reached.fixed_s_per_sequence * tokens.sequences,
        hidden_s=0.0,
        memory_bound_s=sum(memory_s for _, memory_s in parts),
    )


def _roofline(
    work: Work,
    weight_bytes_per_s: float,
    bytes_per_s: float,
    flops_per_s: float,
    cache_flops_per_s: float,
) -> tuple[float, float]:
    """Seconds, and how many of them memory limits: products with weights and with the cache run
    one after the other, each as fast as the slower of memory and arithmetic."""
    weights_s = work.weight_bytes / weight_bytes_per_s
    products_s = work.flops / flops_per_s
    others_s = work.other_bytes / bytes_per_s
    cache_s = work.attention_flops / cache_flops_per_s
    memory_s = (weights_s if weights_s >= products_s else 0.0) + (
        others_s if others_s >= cache_s else 0.0
    )
    return max(weights_s, products_s) + max(others_s, cache_s), memory_s


def _peak(accelerator: Accelerator, dtype: Dtype) -> float:
    """FLOPs a second for weights or a cache of `dtype`: where the GPU has no such arithmetic, they
    are unpacked to BF16."""
    flops = accelerator.flops_per_s
    for usable in (dtype, Dtype.BF16, Dtype.FP32):
        if usable in flops:
            return flops[usable]
    raise ValueError(f"{accelerator.name} names no FLOPs for {dtype} or BF16")


def _network_s(
    shape: ModelShape,
    accelerator: Accelerator,
    layout: Layout,
    fabric: Fabric,
    tokens: Tokens,
    skew: float,
) -> float:
    hidden_bytes = tokens.count * shape.hidden * Dtype.BF16.bytes_per_element
    reduce_s = fabric.all_reduce_s(hidden_bytes, layout.tensor)
    seconds = reduce_s * shape.layers
    experts = shape.experts
    expert_layers = experts.layers if experts is not None else 0
    seconds += reduce_s * (shape.layers - expert_layers)
    if experts is None:
        return seconds
    if layout.data == 1:
        # Every GPU has all tokens already; the sum over experts is one more all-reduce.
        return seconds + reduce_s * expert_layers
    width = experts.latent or shape.hidden
    if not layout.expert_parallel or fabric.exchange is Exchange.ALL_GATHER:
        share = tokens.count / layout.tensor * width * Dtype.BF16.bytes_per_element
        return seconds + 2 * fabric.all_gather_s(share, layout.world_size) * expert_layers
    dispatched = width * _dispatch_bytes(accelerator, shape.quantisation.experts)
    combined = width * Dtype.BF16.bytes_per_element
    copies: float = experts.per_token
    if tokens.prefill and not fabric.copies_alone:
        limit = experts.groups_per_token if experts.groups > 1 else None
        copies = expected_domains(experts.per_token, fabric.domains(layout.expert), limit)
    one_way = [
        fabric.scatter_s(
            tokens.count / layout.tensor, experts.per_token, token_bytes, layout.expert, copies
        )
        for token_bytes in (dispatched, combined)
    ]
    # What the busiest GPU sends is the mean, what it receives is more.
    return seconds + sum(one_way) * (1 + (skew - 1) / 2) * expert_layers


def _dispatch_bytes(accelerator: Accelerator, experts: Dtype) -> float:
    """Tokens travel to FP8 experts in FP8, to FP4 ones in FP4 where the GPU computes in it."""
    if experts in (Dtype.FP8, Dtype.FP4) and experts in accelerator.flops_per_s:
        return experts.bytes_per_element
    return Dtype.BF16.bytes_per_element
