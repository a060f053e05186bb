"""Steps and rates: the shape of the answers, whatever the efficiencies."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertmesh.core.domain.accelerator import Accelerator, Era
from expertmesh.core.domain.model_shape import (
    Dtype,
    Experts,
    FullAttention,
    LatentAttention,
    LinearAttention,
    ModelShape,
    Quantisation,
)
from expertmesh.core.perf.efficiency import Efficiency
from expertmesh.core.perf.fabric import LEAST_SCATTER_S, Exchange, Fabric, expected_domains
from expertmesh.core.perf.layout import Layout
from expertmesh.core.perf.rates import (
    Served,
    decode_rate,
    mixed_rate,
    prefill_rate,
    prefill_rate_within,
)
from expertmesh.core.perf.step_time import decode_step, prefill_step
from expertmesh.core.perf.work import coverage

FP8 = Quantisation(Dtype.FP8, Dtype.FP8)
LATENT = ModelShape(
    "DeepseekV3ForCausalLM",
    61,
    7168,
    129280,
    163840,
    (LatentAttention(61, 128, 1536, 512, 128, 64, 128),),
    Experts(58, 256, 8, 2048, shared_width=2048, groups=8, groups_per_token=4),
    18432,
    quantisation=FP8,
)
SPARSE = replace(LATENT, attention=(LatentAttention(61, 128, 1536, 512, 128, 64, 128, 64, 128),))
GROUPED = ModelShape(
    "Qwen3MoeForCausalLM",
    48,
    2048,
    151936,
    40960,
    (FullAttention(48, 32, 4, 128),),
    Experts(48, 128, 8, 768),
    0,
)
HYBRID = ModelShape(
    "Qwen3NextForCausalLM",
    48,
    2048,
    151936,
    262144,
    (FullAttention(12, 16, 2, 256, gated=True), LinearAttention(36, 16, 32, 128, 128)),
    Experts(48, 512, 10, 512, shared_width=512),
    0,
)
WINDOWED = ModelShape(
    "GptOssForCausalLM",
    36,
    2880,
    201088,
    131072,
    (FullAttention(18, 64, 8, 64), FullAttention(18, 64, 8, 64, window=128)),
    Experts(36, 128, 4, 2880),
    0,
    quantisation=Quantisation(Dtype.FP4, Dtype.BF16, 1 / 32),
)
DENSE = ModelShape(
    "Qwen2ForCausalLM", 80, 8192, 152064, 131072, (FullAttention(80, 64, 8, 128),), None, 29568
)
SHAPES = (LATENT, SPARSE, GROUPED, HYBRID, WINDOWED, DENSE)

H100 = Accelerator(
    "H100",
    Era.HOPPER,
    85 * 10**9,
    3.35e12,
    {Dtype.BF16: 989e12, Dtype.FP8: 1979e12},
    450e9,
    8,
    50e9,
)
GB200 = Accelerator(
    "GB200",
    Era.BLACKWELL,
    198 * 10**9,
    8e12,
    {Dtype.BF16: 2500e12, Dtype.FP8: 5000e12, Dtype.FP4: 10000e12},
    900e9,
    72,
    100e9,
)
LAYOUTS = (
    Layout(),
    Layout(tensor=8),
    Layout(tensor=8, expert=8),
    Layout(data=8, expert=8),
    Layout(tensor=2, data=4, expert=8),
    Layout(data=32, expert=32, redundant_experts=32),
    Layout(data=4),
)

shapes = st.sampled_from(SHAPES)
accelerators = st.sampled_from((H100, GB200))
layouts = st.sampled_from(LAYOUTS)
exchanges = st.sampled_from(list(Exchange))
overlaps = st.booleans()
batches = st.integers(1, 10_000)
contexts = st.integers(1, 200_000)


def decode_s(
    shape: ModelShape,
    accelerator: Accelerator,
    layout: Layout,
    batch: float,
    context: float,
    exchange: Exchange = Exchange.DEEP_EP,
    overlap: bool = True,
) -> float:
    fabric = Fabric.of(accelerator, exchange)
    return decode_step(shape, accelerator, layout, fabric, batch, context, overlap=overlap).total_s


@given(shapes, accelerators, layouts, exchanges, overlaps, batches, contexts)
def test_parts_of_a_step_add_up_and_are_sane(
    shape: ModelShape,
    accelerator: Accelerator,
    layout: Layout,
    exchange: Exchange,
    overlap: bool,
    batch: int,
    context: int,
) -> None:
    fabric = Fabric.of(accelerator, exchange)
    for step in (
        decode_step(shape, accelerator, layout, fabric, batch, context, overlap=overlap),
        prefill_step(shape, accelerator, layout, fabric, batch, context, overlap=overlap),
    ):
        parts = (
            step.attention_s,
            step.experts_s,
            step.dense_s,
            step.network_s,
            step.fixed_s,
            step.hidden_s,
            step.memory_bound_s,
        )
        assert all(math.isfinite(part) and part >= 0 for part in parts)
        assert step.total_s == pytest.approx(sum(parts[:5]) - step.hidden_s)
        assert step.hidden_s <= step.network_s
        assert step.memory_bound_s <= sum(parts[:3]) * (1 + 1e-9)
        assert 0 < step.total_s < 3600
        assert step.limit in ("memory", "compute", "network", "fixed")


@given(shapes, accelerators, layouts, exchanges, batches, batches, contexts)
def test_more_sequences_never_take_less_time(
    shape: ModelShape,
    accelerator: Accelerator,
    layout: Layout,
    exchange: Exchange,
    one: int,
    other: int,
    context: int,
) -> None:
    fewer, more = sorted((one, other))
    assert decode_s(shape, accelerator, layout, fewer, context, exchange) <= decode_s(
        shape, accelerator, layout, more, context, exchange
    ) * (1 + 1e-9)


@given(shapes, accelerators, layouts, batches, contexts, contexts)
def test_a_longer_context_never_takes_less_time(
    shape: ModelShape,
    accelerator: Accelerator,
    layout: Layout,
    batch: int,
    one: int,
    other: int,
) -> None:
    shorter, longer = sorted((one, other))
    assert decode_s(shape, accelerator, layout, batch, shorter) <= decode_s(
        shape, accelerator, layout, batch, longer
    ) * (1 + 1e-9)


@given(
    shapes,
    layouts,
    batches,
    contexts,
    st.sampled_from(("memory_bytes_per_s", "link_bytes_per_s", "nic_bytes_per_s", "flops_per_s")),
    st.floats(1.0, 20.0),
)
def test_faster_hardware_never_takes_more_time(
    shape: ModelShape, layout: Layout, batch: int, context: int, field: str, factor: float
) -> None:
    if field == "flops_per_s":
        faster = replace(
            H100, flops_per_s={dtype: f * factor for dtype, f in H100.flops_per_s.items()}
        )
    else:
        faster = replace(H100, **{field: getattr(H100, field) * factor})
    assert decode_s(shape, faster, layout, batch, context) <= decode_s(
        shape, H100, layout, batch, context
    ) * (1 + 1e-9)


def test_a_lone_sequence_waits_for_the_weights() -> None:
    """Against arithmetic by hand: 80 layers of a dense model in BF16, read once."""
    ideal = Efficiency(1.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0, 0)
    step = decode_step(DENSE, H100, Layout(), Fabric.of(H100), 1, 0, reached=ideal)
    assert step.total_s == pytest.approx((72.7e9 - 152064 * 8192) * 2 / 3.35e12, rel=0.01)
    assert step.limit == "memory"
    assert step.network_s == 0


def test_a_prompt_waits_for_the_arithmetic() -> None:
    ideal = Efficiency(1.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0, 0)
    step = prefill_step(DENSE, H100, Layout(), Fabric.of(H100), 8192, 8192, reached=ideal)
    products = 2 * 8192 * (72.7e9 - 2 * 152064 * 8192)
    attention = 2 * 8192 * 64 * 256 * 4096 * 80
    assert step.total_s == pytest.approx((products + attention) / 989e12, rel=0.02)
    assert step.limit == "compute"


def test_the_cache_is_cut_over_its_heads_and_no_further() -> None:
    ideal = Efficiency(1.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0, 0)

    def cache_s(tensor: int) -> float:
        long, short = (
            decode_step(
                GROUPED, H100, Layout(tensor=tensor), Fabric.of(H100), 64, context, reached=ideal
            ).attention_s
            for context in (10_000, 0)
        )
        return long - short

    assert cache_s(4) == pytest.approx(cache_s(1) / 4)
    assert cache_s(8) == pytest.approx(cache_s(4))
    # 64 sequences of 10,000 tokens, 49,152 elements each, in BF16.
    assert cache_s(1) == pytest.approx(64 * 10_000 * 49_152 * 2 / 3.35e12)


def test_a_window_bounds_what_is_read() -> None:
    layout = Layout()
    near = decode_s(WINDOWED, H100, layout, 64, 128)
    only_windows = replace(WINDOWED, attention=(FullAttention(36, 64, 8, 64, window=128),))
    assert decode_s(only_windows, H100, layout, 64, 100_000) == pytest.approx(
        decode_s(only_windows, H100, layout, 64, 128)
    )
    assert decode_s(WINDOWED, H100, layout, 64, 100_000) > near


def test_sparse_attention_pays_on_long_contexts_only() -> None:
    layout = Layout(data=8, expert=8)
    assert decode_s(SPARSE, H100, layout, 32, 100_000) < decode_s(LATENT, H100, layout, 32, 100_000)
    assert decode_s(SPARSE, H100, layout, 32, 1_000) >= decode_s(LATENT, H100, layout, 32, 1_000)


@pytest.mark.parametrize(("tokens", "share"), [(8, 0.22), (32, 0.64), (64, 0.87), (128, 0.98)])
def test_coverage_of_256_experts(tokens: int, share: float) -> None:
    assert coverage(256, 8, tokens) == pytest.approx(share, abs=0.006)


@given(st.integers(1, 512), st.floats(0, 1e5), st.floats(0, 1e5))
def test_coverage_grows_to_one(per_token: int, one: float, other: float) -> None:
    fewer, more = sorted((one, other))
    assert 0 <= coverage(512, per_token, fewer) <= coverage(512, per_token, more) <= 1


def test_the_busiest_gpu_makes_the_others_wait() -> None:
    layout = Layout(data=32, expert=32)
    even, uneven = (
        decode_step(LATENT, H100, layout, Fabric.of(H100), 256, 2_000, skew=skew, overlap=False)
        for skew in (1.0, 2.5)
    )
    assert uneven.experts_s > even.experts_s and uneven.network_s > even.network_s
    assert uneven.attention_s == even.attention_s


def test_splitting_is_for_large_batches() -> None:
    """Small ones are never split; large ones between nodes gain from it."""
    layout = Layout(data=64, expert=64, redundant_experts=32)
    for batch in (1, 31):
        whole = decode_s(LATENT, H100, layout, batch, 2_000, overlap=False)
        assert decode_s(LATENT, H100, layout, batch, 2_000) == whole
    step = prefill_step(LATENT, H100, layout, Fabric.of(H100), 16_384, 2_000)
    whole_step = prefill_step(LATENT, H100, layout, Fabric.of(H100), 16_384, 2_000, overlap=False)
    assert step.hidden_s > 0 == whole_step.hidden_s
    assert 1.1 < whole_step.total_s / step.total_s < 1.5


def test_skew_slows_the_busiest_gpu() -> None:
    layout = Layout(data=32, expert=32)
    even, skewed = (
        prefill_step(LATENT, H100, layout, Fabric.of(H100), 16_384, 4_096, skew=skew).total_s
        for skew in (1.0, 2.0)
    )
    assert even < skewed < 2 * even


def test_scatter_matches_deep_ep_between_nodes() -> None:
    """Low-latency kernels on H800, 128 tokens of 7168 to 8 experts, at EP 64."""
    fabric = Fabric.of(replace(H100, link_bytes_per_s=200e9))
    assert fabric.scatter_s(128, 8, 7168, 64, 8) == pytest.approx(173e-6, rel=0.1)
    assert fabric.scatter_s(128, 8, 2 * 7168, 64, 8) == pytest.approx(314e-6, rel=0.1)


def test_scatter_has_a_floor_and_none_on_one_gpu() -> None:
    fabric = Fabric.of(H100)
    assert fabric.scatter_s(1, 8, 7168, 8, 8) == LEAST_SCATTER_S[0]
    assert fabric.scatter_s(1, 8, 7168, 16, 8) == LEAST_SCATTER_S[1]
    assert fabric.scatter_s(1, 8, 7168, 4096, 8) == LEAST_SCATTER_S[-1]
    assert fabric.scatter_s(1, 8, 7168, 1, 8) == 0


def test_one_copy_a_node_is_cheaper_than_one_an_expert() -> None:
    fabric = Fabric.of(H100)
    domains = expected_domains(8, 8, 4)
    assert domains == 4
    assert expected_domains(8, 8, None) == pytest.approx(5.25, abs=0.01)
    assert fabric.scatter_s(16_384, 8, 7168, 64, domains) < fabric.scatter_s(16_384, 8, 7168, 64, 8)


def test_a_fabric_says_whom_it_reaches() -> None:
    alone = replace(H100, nic_bytes_per_s=0.0)
    assert Fabric.of(alone).reaches(8)
    assert not Fabric.of(alone).reaches(9)
    assert Fabric.of(H100).reaches(144)
    assert Fabric.of(replace(alone, link_bytes_per_s=0.0)).reaches(1)
    with pytest.raises(ValueError, match="16 GPUs of H100 cannot reach each other"):
        decode_s(GROUPED, alone, Layout(data=16, expert=16), 1, 1)


def test_weights_without_arithmetic_of_their_own_are_unpacked() -> None:
    fast = replace(WINDOWED, quantisation=Quantisation(Dtype.BF16, Dtype.BF16))
    packed = prefill_step(WINDOWED, H100, Layout(), Fabric.of(H100), 16_384, 2_000)
    plain = prefill_step(fast, H100, Layout(), Fabric.of(H100), 16_384, 2_000)
    assert packed.experts_s == pytest.approx(plain.experts_s)
    with pytest.raises(ValueError, match="names no FLOPs"):
        decode_s(DENSE, replace(H100, flops_per_s={Dtype.FP8: 1e15}), Layout(), 1, 1)


@pytest.mark.parametrize(("batch", "context"), [(0, 1), (-1, 1), (1, -1)])
def test_steps_of_nothing_are_refused(batch: float, context: float) -> None:
    with pytest.raises(ValueError, match="no decode step"):
        decode_s(DENSE, H100, Layout(), batch, context)
    with pytest.raises(ValueError, match="no prefill step"):
        prefill_step(DENSE, H100, Layout(), Fabric.of(H100), batch, 0)


@pytest.mark.parametrize(
    "parts",
    [
        {"tensor": 0},
        {"data": 4, "expert": 2},
        {"tensor": 8, "redundant_experts": 8},
        {"data": 2, "expert": 2, "redundant_experts": -1},
    ],
)
def test_layouts_that_cannot_be_are_refused(parts: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"layout|expert"):
        Layout(**parts)


def test_a_layout_counts_gpus_nodes_and_slots() -> None:
    layout = Layout(tensor=2, data=18, expert=36, redundant_experts=32)
    assert (layout.world_size, layout.nodes(8), layout.expert_slots(256)) == (36, 5, 8)
    assert Layout(tensor=8).expert_slots(256) == 256


def served(layout: Layout = LAYOUTS[5], shape: ModelShape = LATENT) -> Served:
    return Served(shape, H100, layout, Fabric.of(H100))


def test_rates_are_of_the_whole_group() -> None:
    group = served()
    rate = decode_rate(group, 64, 2_000)
    assert rate.tokens_per_s == pytest.approx(64 * 32 / rate.tpot_s)
    drafted = replace(group, tokens_per_sequence=2, accepted_per_step=1.8)
    assert drafted.decode(64, 2_000).total_s == pytest.approx(
        decode_rate(drafted, 64, 2_000).tpot_s * 1.8
    )
    prompts = prefill_rate(group, 16_384, 2_048)
    assert prompts.tokens_per_s == pytest.approx(16_384 * 32 / prompts.step_s)


@given(batches, st.integers(1, 50_000), st.integers(1, 8_000))
def test_doing_both_is_slower_than_decoding_alone(batch: int, prompt: int, output: int) -> None:
    group = served(Layout(tensor=8), GROUPED)
    both = mixed_rate(group, batch, prompt, output)
    alone = decode_rate(group, batch, prompt + output / 2)
    assert math.isfinite(both.tpot_s)
    assert both.tpot_s > alone.tpot_s
    longer = mixed_rate(group, batch, prompt * 2, output)
    assert longer.tpot_s > both.tpot_s


@given(batches, st.integers(1, 50_000), st.integers(1, 8_000))
def test_what_it_does_alone_adds_up_to_both(batch: int, prompt: int, output: int) -> None:
    """A request takes the time of its prompt and that of its tokens, and no other."""
    both = mixed_rate(served(), batch, prompt, output)
    assert both.prefill_tokens_per_s is not None
    seconds = prompt / both.prefill_tokens_per_s + output / both.decode_tokens_per_s
    assert seconds * both.tokens_per_s / output == pytest.approx(1.0)
    alone = decode_rate(served(), batch, prompt + output / 2)
    assert both.decode_tokens_per_s == pytest.approx(alone.tokens_per_s)
    assert alone.prefill_tokens_per_s is None


def test_a_tighter_target_costs_prefill_rate() -> None:
    group = served()
    most = prefill_rate(group, 16_384, 2_048).tokens_per_s
    rates = []
    for ttft_s in (0.3, 1.0, 5.0, 60.0):
        found = prefill_rate_within(group, ttft_s, 2_048)
        assert found is not None
        assert found.ttft_s <= ttft_s
        rates.append(found.tokens_per_s)
    assert rates == sorted(rates)
    assert rates[0] < 0.8 * most < rates[-1] < most
    assert prefill_rate_within(group, 0.001, 2_048) is None


def test_a_prompt_longer_than_a_step_takes_several() -> None:
    group = served()
    step_s = prefill_rate(group, 4_096, 32_768).step_s
    assert prefill_rate_within(group, 7.9 * step_s, 32_768, at_most=4_096) is None
    assert prefill_rate_within(group, 8.5 * step_s, 32_768, at_most=4_096) is not None
