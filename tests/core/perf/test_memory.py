"""Memory against what vLLM logs, against its own rules, and refusals that name what is possible."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertmesh.core.domain.accelerator import Accelerator
from expertmesh.core.domain.model_shape import (
    Attention,
    Dtype,
    Experts,
    FullAttention,
    LatentAttention,
    LinearAttention,
    ModelShape,
    Quantisation,
)
from expertmesh.core.perf.fabric import Exchange
from expertmesh.core.perf.kv_cache import kv_cache
from expertmesh.core.perf.layout import Layout
from expertmesh.core.perf.memory import (
    EngineLimits,
    Reason,
    engine_limits,
    memory,
    refusal,
    widened,
)
from expertmesh.core.perf.parameters import checkpoint_bytes, parameters
from expertmesh.core.perf.weights import expert_slot_bytes, weights
from expertmesh.spec.catalog import models
from expertmesh.spec.catalog_hardware import accelerators

GIB = 2**30
BLOCK_FP8 = Quantisation(Dtype.FP8, Dtype.FP8, 4 / 128**2, 4 / 128**2)

QWEN3_30B = ModelShape(
    architecture="Qwen3MoeForCausalLM",
    layers=48,
    hidden=2048,
    vocab=151936,
    max_position_embeddings=40960,
    attention=(FullAttention(layers=48, heads=32, kv_heads=4, head_dim=128),),
    experts=Experts(layers=48, count=128, per_token=8, width=768),
    dense_width=0,
)
QWEN3_235B = dataclasses.replace(
    QWEN3_30B,
    layers=94,
    hidden=4096,
    attention=(FullAttention(layers=94, heads=64, kv_heads=4, head_dim=128),),
    experts=Experts(layers=94, count=128, per_token=8, width=1536),
    quantisation=BLOCK_FP8,
)
MLA = LatentAttention(
    layers=61,
    heads=128,
    q_lora_rank=1536,
    kv_lora_rank=512,
    nope_head_dim=128,
    rope_head_dim=64,
    v_head_dim=128,
)
DEEPSEEK_V3 = ModelShape(
    architecture="DeepseekV3ForCausalLM",
    layers=61,
    hidden=7168,
    vocab=129280,
    max_position_embeddings=163840,
    attention=(MLA,),
    experts=Experts(layers=58, count=256, per_token=8, width=2048, shared_width=2048),
    dense_width=18432,
    quantisation=BLOCK_FP8,
)
GPT_OSS_120B = ModelShape(
    architecture="GptOssForCausalLM",
    layers=36,
    hidden=2880,
    vocab=201088,
    max_position_embeddings=131072,
    attention=(
        FullAttention(layers=18, heads=64, kv_heads=8, head_dim=64),
        FullAttention(layers=18, heads=64, kv_heads=8, head_dim=64, window=128),
    ),
    experts=Experts(layers=36, count=128, per_token=4, width=2880, balanceable=False),
    dense_width=0,
    quantisation=Quantisation(Dtype.FP4, Dtype.BF16, 1 / 32),
)
QWEN3_NEXT = ModelShape(
    architecture="Qwen3NextForCausalLM",
    layers=48,
    hidden=2048,
    vocab=151936,
    max_position_embeddings=262144,
    attention=(
        FullAttention(layers=12, heads=16, kv_heads=2, head_dim=256, gated=True),
        LinearAttention(
            layers=36, key_heads=16, value_heads=32, key_head_dim=128, value_head_dim=128
        ),
    ),
    experts=Experts(layers=48, count=512, per_token=10, width=512, shared_width=512),
    dense_width=0,
)
DENSE_72B = ModelShape(
    architecture="Qwen2ForCausalLM",
    layers=80,
    hidden=8192,
    vocab=152064,
    max_position_embeddings=131072,
    attention=(FullAttention(layers=80, heads=64, kv_heads=8, head_dim=128),),
    experts=None,
    dense_width=29568,
)
SHAPES = (QWEN3_30B, QWEN3_235B, DEEPSEEK_V3, GPT_OSS_120B, QWEN3_NEXT, DENSE_72B)


def gpu(name: str) -> Accelerator:
    return accelerators()[name]


def only(shape: ModelShape, *attention: Attention) -> ModelShape:
    return dataclasses.replace(
        shape, attention=attention, layers=sum(kind.layers for kind in attention), experts=None
    )


@pytest.mark.parametrize(
    ("shape", "layout", "logged_gib", "tolerance"),
    [
        # vllm#16692: V3 on 16 H800, "Model loading took 40.3173 GiB".
        (DEEPSEEK_V3, Layout(tensor=16), 40.3173, 0.002),
        # vllm#23278: gpt-oss-120b on one H100 with Marlin, 65.9651 GiB.
        (GPT_OSS_120B, Layout(), 65.9651, 0.004),
    ],
)
def test_weights_as_vllm_logs_them(
    shape: ModelShape, layout: Layout, logged_gib: float, tolerance: float
) -> None:
    assert weights(shape, layout).total / GIB == pytest.approx(logged_gib, rel=tolerance)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.architecture)
def test_on_one_gpu_the_weights_are_all_parameters(shape: ModelShape) -> None:
    """But for what is there for the hardware: padding, and copies of latent projections."""
    plain = dataclasses.replace(shape, quantisation=Quantisation())
    counts = parameters(plain)
    held = weights(plain, Layout())
    assert held.attention == 2 * counts.attention
    assert held.dense == 2 * counts.dense
    assert held.experts == 2 * counts.experts
    assert held.shared == 2 * counts.shared
    assert held.other == 2 * counts.other
    assert 0 <= held.embeddings - 2 * counts.embeddings < 2 * 2 * 64 * shape.hidden


def test_quantised_latent_projections_are_kept_in_bf16_as_well() -> None:
    plain = dataclasses.replace(DEEPSEEK_V3, quantisation=Quantisation(Dtype.FP8, Dtype.BF16))
    fp8 = dataclasses.replace(DEEPSEEK_V3, quantisation=Quantisation(Dtype.FP8, Dtype.FP8))
    copies = 2 * 61 * 512 * 128 * (128 + 128)
    assert weights(fp8, Layout()).attention == weights(plain, Layout()).attention / 2 + copies


def test_key_heads_repeat_when_there_are_more_gpus() -> None:
    """4 key heads over 8 GPUs: each holds a whole one, so that half of them are copies."""
    heads = FullAttention(layers=1, heads=32, kv_heads=4, head_dim=128)
    shape = only(QWEN3_30B, heads)
    query_and_output = 2 * 2048 * 32 * 128
    for tensor, local in ((1, 4), (2, 2), (4, 1), (8, 1), (16, 1)):
        expected = 2 * (query_and_output / tensor + 2048 * local * 2 * 128)
        assert weights(shape, Layout(tensor)).attention == expected
        assert kv_cache(shape, tensor).bytes_per_token == local * 2 * 128 * 2


def test_a_latent_cache_is_whole_on_each_gpu() -> None:
    cached = {kv_cache(DEEPSEEK_V3, tensor).bytes_per_token for tensor in (1, 2, 8, 16)}
    assert cached == {35136 * 2}
    assert kv_cache(DEEPSEEK_V3, 8, Dtype.FP8).bytes_per_token == 35136


def test_a_sparse_latent_cache_in_fp8() -> None:
    """656 bytes a token and layer (FlashMLA's README), beside the indexer's keys with a scale."""
    sparse = dataclasses.replace(MLA, index_heads=64, index_head_dim=128)
    shape = dataclasses.replace(DEEPSEEK_V3, attention=(sparse,))
    assert kv_cache(shape, 8, Dtype.FP8).bytes_per_token == 61 * (656 + 132)
    assert kv_cache(shape, 8).bytes_per_token == 61 * (2 * 576 + 132)


@pytest.mark.parametrize(
    ("shape", "elements"),
    [
        (QWEN3_30B, 49152),
        (QWEN3_235B, 96256),
        (DEEPSEEK_V3, 35136),
        (DENSE_72B, 163840),
        (QWEN3_NEXT, 12288),
        (GPT_OSS_120B, 36864 / 2),
    ],
    ids=lambda value: getattr(value, "architecture", ""),
)
def test_cache_per_token_of_the_published_shapes(shape: ModelShape, elements: float) -> None:
    """A window's half of gpt-oss costs nothing once it is full."""
    assert kv_cache(shape, 1).bytes_per_token == 2 * elements


def test_a_compressed_cache_is_taken_as_published() -> None:
    """DeepSeek-V4-Pro: 9.62 GiB for a sequence of 1M tokens in BF16, whatever the cut."""
    published = 9.62 * GIB
    shape = dataclasses.replace(
        DEEPSEEK_V3, kv_bytes_per_token_layer=published / 2**20 / 61, max_position_embeddings=2**20
    )
    for tensor in (1, 8):
        cache = kv_cache(shape, tensor)
        assert cache.sequence_bytes(2**20) == pytest.approx(published, rel=1e-4)
        half = kv_cache(shape, tensor, Dtype.FP8)
        assert half.sequence_bytes(2**20) == pytest.approx(published / 2, rel=1e-4)


def test_windows_bound_what_a_sequence_takes() -> None:
    cache = kv_cache(GPT_OSS_120B, 1, in_flight_tokens=64)
    page = 18 * 16 * 8 * 2 * 64 * 2
    assert cache.block_bytes == page
    # 127 of the window and 64 in flight are 12 blocks, and one as it may start within a block.
    assert cache.sequence_bytes(16000) == page * (1000 + 13)
    assert cache.sequence_bytes(32000) - cache.sequence_bytes(16000) == page * 1000
    assert cache.state_bytes_per_sequence == page * 13
    # A sequence shorter than the window takes what it has.
    assert cache.blocks(16) == 1 + 2


def test_linear_layers_take_a_state_per_sequence() -> None:
    """Blocks of the 12 full layers are made as large as a state: 36 layers are three groups."""
    cache = kv_cache(QWEN3_NEXT, 1, states_per_sequence=1)
    state = 32 * 128 * 128 * 4 + 3 * (2 * 16 * 128 + 32 * 128) * 2
    per_token = 2 * (256 + 256) * 2
    tokens = -(-state // (16 * per_token)) * 16
    assert cache.block_bytes == 12 * tokens * per_token >= 12 * state
    assert cache.bytes_per_token == 12 * per_token
    assert cache.state_bytes_per_sequence == 3 * cache.block_bytes
    assert cache.blocks(tokens) == 4 and cache.blocks(tokens + 1) == 5
    with_prefixes = kv_cache(QWEN3_NEXT, 1)
    assert with_prefixes.state_bytes_per_sequence == 2 * cache.state_bytes_per_sequence


def test_kinds_of_nearly_equal_count_are_padded_not_split() -> None:
    full = FullAttention(layers=12, heads=8, kv_heads=8, head_dim=64)
    window = dataclasses.replace(full, layers=13, window=128)
    assert len(kv_cache(only(QWEN3_30B, full, window), 1).tables) == 2
    window = dataclasses.replace(full, layers=18, window=128)
    assert len(kv_cache(only(QWEN3_30B, full, window), 1).tables) == 3


def test_experts_and_their_copies() -> None:
    one = 3 * 7168 * 2048 * (1 + 4 / 128**2)
    for layout, slots in (
        (Layout(data=8, expert=8), 32),
        (Layout(data=32, expert=32, redundant_experts=32), 9),
        (Layout(tensor=8, data=4, expert=32, redundant_experts=32), 9),
        (Layout(data=144, expert=144, redundant_experts=32), 2),
    ):
        assert weights(DEEPSEEK_V3, layout).experts == pytest.approx(58 * slots * one, rel=1e-9)
    cut = weights(DEEPSEEK_V3, Layout(tensor=2, data=8)).experts
    assert cut == pytest.approx(58 * 256 * one / 16, rel=1e-9)
    # The published cost of one more slot on each GPU is 2.55 GB.
    assert expert_slot_bytes(DEEPSEEK_V3) == pytest.approx(2.55e9, rel=0.002)
    assert expert_slot_bytes(DENSE_72B) == 0


def test_data_ranks_repeat_all_but_experts() -> None:
    one = weights(DEEPSEEK_V3, Layout(tensor=2, expert=2))
    more = weights(DEEPSEEK_V3, Layout(tensor=2, data=4, expert=8))
    assert (more.attention, more.dense, more.embeddings) == (
        one.attention,
        one.dense,
        one.embeddings,
    )
    assert more.experts * 4 == pytest.approx(one.experts)
    # Sequence parallelism: shared experts are whole as soon as both kinds of ranks are there.
    assert more.shared == 2 * one.shared


def test_the_parts_add_up_to_the_gpu() -> None:
    for exchange in Exchange:
        plan = memory(DEEPSEEK_V3, gpu("H200"), Layout(data=8, expert=8), exchange=exchange)
        parts = plan.weights.total + plan.activation_bytes + plan.buffer_bytes + plan.graph_bytes
        assert parts + plan.headroom_bytes + plan.kv_bytes == gpu("H200").memory_bytes
        assert plan.fits and plan.short_by_bytes == 0


def test_v3_on_eight_h100_is_short_and_says_by_how_much() -> None:
    plan = memory(DEEPSEEK_V3, gpu("H100"), Layout(tensor=8, expert=8), context_tokens=32768)
    assert not plan.fits
    assert plan.kv_tokens == 0 and plan.max_sequences(32768) == 0
    assert plan.longest_context_tokens == 0
    more = dataclasses.replace(
        gpu("H100"), memory_bytes=gpu("H100").memory_bytes + int(plan.short_by_bytes / 0.92) + 2
    )
    same_limits = memory(
        DEEPSEEK_V3, more, Layout(tensor=8, expert=8), context_tokens=32768, limits=plan.limits
    )
    assert same_limits.fits and same_limits.max_sequences(32768) == 1


def test_the_longest_context_that_fits() -> None:
    plan = memory(GPT_OSS_120B, gpu("H100"), Layout())
    assert not plan.fits and 0 < plan.longest_context_tokens < 131072
    longest = plan.longest_context_tokens
    assert memory(GPT_OSS_120B, gpu("H100"), Layout(), context_tokens=longest).fits
    assert not memory(GPT_OSS_120B, gpu("H100"), Layout(), context_tokens=longest + 1).fits


def test_capacity_is_counted_in_whole_blocks() -> None:
    cache = kv_cache(QWEN3_30B, 1)
    space = 100 * cache.block_bytes + 1
    assert cache.tokens(space, 1600) == 1600
    assert cache.sequences(space, 1600) == 1
    assert cache.sequences(space, 1601) == 0
    assert cache.sequences(space, 800) == 2
    assert cache.sequences(space, 801) == 1
    assert cache.tokens(cache.block_bytes - 1, 1600) == 0
    assert cache.tokens(-1, 1600) == 0 == cache.sequences(-1, 1600)


def test_the_engine_s_limit_on_sequences_counts() -> None:
    plan = memory(QWEN3_30B, gpu("B200"), Layout())
    assert plan.limits == EngineLimits(16384, 1024)
    assert plan.max_sequences(16) == 1024
    assert 1 <= plan.max_sequences(40960) < 1024


def test_limits_are_vllm_s_defaults() -> None:
    by_name = {name: engine_limits(gpu(name)) for name in ("A100", "L40S", "H100", "H200", "B200")}
    assert by_name == {
        "A100": EngineLimits(2048, 256),
        "L40S": EngineLimits(2048, 256),
        "H100": EngineLimits(8192, 1024),
        "H200": EngineLimits(8192, 1024),
        "B200": EngineLimits(16384, 1024),
    }


def test_low_latency_buffers() -> None:
    """DeepEP's own hint for 256 experts, 256 tokens and 7168 elements is 3.76 GB."""
    layout = Layout(data=16, expert=16)
    plan = memory(DEEPSEEK_V3, gpu("H200"), layout, exchange=Exchange.DEEP_EP, decode_only=True)
    hint = 4 * 256 * 256 * (16 + 2 * 7168)
    assert plan.buffer_bytes == hint + 1024 * 2**20 + 360 * 2**20
    assert plan.limits.batched_tokens == 256
    mixed = memory(DEEPSEEK_V3, gpu("H200"), layout, exchange=Exchange.DEEP_EP)
    assert mixed.buffer_bytes == 2 * 1024 * 2**20 + 360 * 2**20
    inside = memory(DEEPSEEK_V3, gpu("H200"), Layout(data=8, expert=8), exchange=Exchange.DEEP_EP)
    assert inside.buffer_bytes == 1024 * 2**20 + 360 * 2**20
    alone = memory(QWEN3_30B, gpu("H200"), Layout(), exchange=Exchange.DEEP_EP, decode_only=True)
    assert alone.buffer_bytes == 0 and alone.limits == engine_limits(gpu("H200"))


def test_gathering_the_tokens_of_all_ranks_takes_work_space_for_all() -> None:
    layout = Layout(data=16, expert=16)
    gathered = memory(DEEPSEEK_V3, gpu("H200"), layout).activation_bytes
    sent = memory(DEEPSEEK_V3, gpu("H200"), layout, exchange=Exchange.DEEP_EP).activation_bytes
    spaces = 2 * 8192 * 8 * 2 * 7168
    assert gathered - sent == 15 * spaces


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.architecture)
@given(
    tensor=st.sampled_from([1, 2, 4, 8]),
    data=st.sampled_from([1, 2, 4, 8]),
    parallel=st.booleans(),
    context=st.integers(1, 40960),
    more=st.integers(0, 200),
)
def test_properties(
    shape: ModelShape, tensor: int, data: int, parallel: bool, context: int, more: int
) -> None:
    parallel = parallel and shape.experts is not None
    layout = Layout(tensor, data, tensor * data if parallel else 1)
    plan = memory(shape, gpu("B200"), layout, context_tokens=context)
    assert plan.fits == (plan.kv_bytes >= plan.cache.sequence_bytes(context))
    assert plan.fits == (plan.longest_context_tokens == context)
    if plan.fits:
        assert plan.kv_tokens >= context and plan.max_sequences(context) >= 1
    assert plan.max_sequences(context + more) <= plan.max_sequences(context)
    assert plan.cache.sequence_bytes(context + more) >= plan.cache.sequence_bytes(context)
    # The group holds each parameter at least once.
    whole = weights(shape, Layout()).total
    assert plan.weights.total * layout.world_size >= whole * (1 - 1e-6)
    assert plan.weights.total <= whole * (1 + 1e-6)
    wider = memory(
        shape, gpu("B200"), layout, context_tokens=context, utilization=0.95, limits=plan.limits
    )
    assert wider.kv_bytes > plan.kv_bytes


def test_a_gpu_without_memory_is_refused() -> None:
    empty = dataclasses.replace(gpu("H100"), memory_bytes=0)
    refused = refusal(QWEN3_30B, empty, Layout())
    assert refused is not None and refused.reason is Reason.MEMORY
    assert "H100 has no memory" in str(refused)


def test_fp8_weights_on_a_gpu_without_fp8_are_widened() -> None:
    assert refusal(QWEN3_235B, gpu("A100"), Layout(tensor=4)) is None
    plan = memory(QWEN3_235B, gpu("A100"), Layout(tensor=4))
    assert plan.computed_in is Dtype.BF16
    assert plan.weights == memory(QWEN3_235B, gpu("H100"), Layout(tensor=4)).weights
    said = widened(QWEN3_235B, gpu("A100"))
    assert said is not None and "A100 has no arithmetic in FP8" in said and "BF16" in said
    assert widened(QWEN3_235B, gpu("H100")) is None
    assert widened(QWEN3_30B, gpu("A100")) is None


def test_weights_that_no_kernel_takes_are_refused() -> None:
    bare = dataclasses.replace(gpu("A100"), weights_only=frozenset())
    refused = refusal(QWEN3_235B, bare, Layout(tensor=4))
    assert refused is not None and refused.reason is Reason.DTYPE
    assert str(refused) == "A100 cannot work with weights in FP8; it takes checkpoints in BF16"
    refused = refusal(QWEN3_30B, gpu("A100"), Layout(), kv=Dtype.FP8)
    assert refused is not None and "it keeps one in BF16" in str(refused)
    assert refusal(QWEN3_30B, gpu("H100"), Layout(), kv=Dtype.FP8) is None


@pytest.mark.parametrize("context", [0, -1, 40961])
def test_a_context_beyond_the_model_s_is_refused(context: int) -> None:
    refused = refusal(QWEN3_30B, gpu("H100"), Layout(), context_tokens=context)
    assert refused is not None and refused.reason is Reason.CONTEXT
    assert "from 1 to 40,960 is possible" in str(refused)
    assert refusal(QWEN3_30B, gpu("H100"), Layout(), context_tokens=40960) is None


@pytest.mark.parametrize(
    ("shape", "layout", "possible"),
    [
        (QWEN3_30B, Layout(tensor=3), "tensor may be 1, 2, 4, 8, 16, 32"),
        (QWEN3_30B, Layout(tensor=64), "tensor may be 1, 2, 4, 8, 16, 32"),
        (DEEPSEEK_V3, Layout(tensor=16, data=8), "expert may be 128"),
        (DEEPSEEK_V3, Layout(data=72, expert=72), "with 32 redundant experts they do"),
        (GPT_OSS_120B, Layout(data=3, expert=3), "take a divisor of 128"),
        (GPT_OSS_120B, Layout(data=2, expert=2, redundant_experts=2), "must be 0"),
        (DENSE_72B, Layout(data=2, expert=2), "expert must be 1"),
    ],
)
def test_layouts_that_vllm_cannot_cut_are_refused(
    shape: ModelShape, layout: Layout, possible: str
) -> None:
    refused = refusal(shape, gpu("H100"), layout)
    assert refused is not None and refused.reason is Reason.LAYOUT
    assert possible in str(refused)


def test_the_nearest_layout_that_a_refusal_names_is_possible() -> None:
    layout = Layout(data=72, expert=72, redundant_experts=32)
    assert refusal(DEEPSEEK_V3, gpu("H100"), layout) is None


def test_blocks_of_fp8_may_be_halved_to_cut_experts() -> None:
    """1536 over 8 GPUs is 192, which blocks of 64 divide; over 64 it is 24, which none does."""
    assert refusal(QWEN3_235B, gpu("H100"), Layout(tensor=8)) is None
    assert refusal(QWEN3_235B, gpu("H100"), Layout(tensor=8, data=8)) is not None
    bf16 = dataclasses.replace(QWEN3_235B, quantisation=Quantisation())
    assert refusal(bf16, gpu("H100"), Layout(tensor=8, data=8)) is None


def test_linear_heads_are_cut_whole() -> None:
    assert refusal(QWEN3_NEXT, gpu("H100"), Layout(tensor=16, expert=16)) is None
    refused = refusal(QWEN3_NEXT, gpu("H100"), Layout(tensor=32, expert=32))
    assert refused is not None and "tensor may be 1, 2, 4, 8, 16" in str(refused)


@pytest.mark.parametrize("name", models())
def test_known_models(name: str) -> None:
    """One GPU holds the checkpoint, but for padding of FP4 and copies of latent projections. The
    cache of a token is cut at most by the number of GPUs, and about halved by FP8."""
    shape = models()[name].shape
    held = weights(shape, Layout()).total
    padded = shape.quantisation.experts is Dtype.FP4
    assert -1e-4 < held / checkpoint_bytes(shape) - 1 < (0.09 if padded else 0.004)

    whole = kv_cache(shape, 1).bytes_per_token
    for tensor in (2, 4, 8):
        assert whole / tensor * (1 - 1e-4) <= kv_cache(shape, tensor).bytes_per_token <= whole
    halved = kv_cache(shape, 1, Dtype.FP8).bytes_per_token
    assert whole / 2 * (1 - 1e-4) <= halved < whole * 0.65
