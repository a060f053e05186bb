"""Read the kinds of attention of a model, layer by layer, from its config.json."""

from collections import Counter
from collections.abc import Callable

from expertmesh.core.domain.model_shape import (
    Attention,
    Dtype,
    FullAttention,
    LatentAttention,
    LinearAttention,
)
from expertmesh.spec.config_reader import ConfigReader

AttentionOf = Callable[[ConfigReader, int], tuple[Attention, ...]]
"""Takes the config and the count of layers."""


def grouped_query(
    *, qkv_bias: bool = False, o_bias: bool = False, sinks: bool = False, qk_norm: str = ""
) -> AttentionOf:
    """`qk_norm`: "head" for one over a head, "layer" for one over all heads, "" for what the config
    says."""

    def read(config: ConfigReader, layers: int) -> tuple[Attention, ...]:
        heads, kv_heads, head_dim = _heads(config)
        extras = 0
        if qkv_bias or config.flag("attention_bias"):
            extras += (heads + 2 * kv_heads) * head_dim
        if o_bias:
            extras += config.positive("hidden_size")
        if sinks:
            extras += heads
        norm = qk_norm or ("head" if config.flag("use_qk_norm") else "")
        if norm == "head":
            extras += 2 * head_dim
        elif norm == "layer":
            extras += (heads + kv_heads) * head_dim
        windowed, window = _windowed_layers(config, layers)
        whole = FullAttention(
            layers=layers - windowed,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            extras=extras,
        )
        short = FullAttention(
            layers=windowed,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            window=window,
            extras=extras,
        )
        return _present(whole, short)

    return read


def chunked(config: ConfigReader, layers: int) -> tuple[Attention, ...]:
    """Llama 4: three of four layers attend within a chunk."""
    heads, kv_heads, head_dim = _heads(config)
    chunk = config.count("attention_chunk_size", default=0)
    kinds = config.per_layer("layer_types", layers)
    if kinds is not None:
        local = Counter(kinds)["chunked_attention"]
    else:
        local = layers - layers // config.count("no_rope_layer_interval", default=4)
    if not chunk:
        local = 0
    return _present(
        FullAttention(layers=layers - local, heads=heads, kv_heads=kv_heads, head_dim=head_dim),
        FullAttention(
            layers=local, heads=heads, kv_heads=kv_heads, head_dim=head_dim, window=chunk or None
        ),
    )


def two_geometries(config: ConfigReader, layers: int) -> tuple[Attention, ...]:
    """MiMo V2: layers with a window have heads of their own."""
    heads, kv_heads, head_dim = _heads(config)
    pattern = config.per_layer("hybrid_layer_pattern", layers)
    if pattern is None:
        raise config.refuse("hybrid_layer_pattern is missing; it says which layers have a window")
    local = sum(1 for entry in pattern if entry)
    window_heads = config.count("swa_num_attention_heads", default=heads)
    return _present(
        FullAttention(
            layers=layers - local,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            v_head_dim=config.count("v_head_dim", default=head_dim),
            extras=heads if config.flag("add_full_attention_sink_bias") else 0,
        ),
        FullAttention(
            layers=local,
            heads=window_heads,
            kv_heads=config.count("swa_num_key_value_heads", default=kv_heads),
            head_dim=config.count("swa_head_dim", default=head_dim),
            v_head_dim=config.count("swa_v_head_dim", "v_head_dim", default=head_dim),
            window=config.positive("sliding_window"),
            extras=window_heads if config.flag("add_swa_attention_sink_bias") else 0,
        ),
    )


def block_sparse(config: ConfigReader, layers: int) -> tuple[Attention, ...]:
    """MiniMax M3: an indexer picks blocks of the context in most layers."""
    heads, kv_heads, head_dim = _heads(config)
    norms = 2 * head_dim
    sparse = config.section("sparse_attention_config")
    frequency = sparse.per_layer("sparse_attention_freq", layers) or ()
    indexed = sum(1 for entry in frequency if entry)
    index_heads = sparse.count("sparse_num_index_heads", default=0)
    index_dim = sparse.count("sparse_index_dim", default=0)
    hidden = config.positive("hidden_size")
    return _present(
        FullAttention(
            layers=layers - indexed,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            extras=norms,
        ),
        FullAttention(
            layers=indexed,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            index_heads=index_heads,
            index_head_dim=index_dim,
            extras=norms + hidden * (index_heads + 1) * index_dim + 2 * index_dim,
        ),
    )


def latent(config: ConfigReader, layers: int) -> tuple[Attention, ...]:
    """MLA, with or without the indexer of DSA; some layers use another's index."""
    q_rank = config.count("q_lora_rank", default=0)
    kv_rank = config.positive("kv_lora_rank")
    hidden = config.positive("hidden_size")
    index_heads = config.count("index_n_heads", default=0)
    index_dim = config.count("index_head_dim", default=0) if index_heads else 0
    kinds = config.per_layer("indexer_types", layers)
    indexed = layers if index_heads else 0
    if kinds is not None and index_heads:
        indexed = layers - Counter(kinds)["shared"]
    norms = q_rank + kv_rank

    def kind(count: int, *, with_index: bool) -> LatentAttention:
        index = index_heads if with_index else 0
        indexer = index * (q_rank * index_dim + hidden) + (hidden + 2) * index_dim
        return LatentAttention(
            layers=count,
            heads=config.positive("num_attention_heads"),
            q_lora_rank=q_rank,
            kv_lora_rank=kv_rank,
            nope_head_dim=config.positive("qk_nope_head_dim"),
            rope_head_dim=config.positive("qk_rope_head_dim"),
            v_head_dim=config.positive("v_head_dim"),
            index_heads=index,
            index_head_dim=index_dim if with_index else 0,
            gated=config.flag("mla_use_output_gate"),
            extras=norms + (indexer if with_index else 0),
        )

    return _present(kind(layers - indexed, with_index=False), kind(indexed, with_index=True))


def gated_delta(config: ConfigReader, layers: int) -> tuple[Attention, ...]:
    """Qwen3-Next and Qwen3.5: gated delta nets, and full attention every few layers."""
    heads, kv_heads, head_dim = _heads(config)
    kinds = config.per_layer("layer_types", layers)
    if kinds is not None:
        full = Counter(kinds)["full_attention"]
    else:
        full = layers // config.positive("full_attention_interval")
    hidden = config.positive("hidden_size")
    key_heads = config.positive("linear_num_key_heads")
    value_heads = config.positive("linear_num_value_heads")
    key_dim = config.positive("linear_key_head_dim")
    value_dim = config.positive("linear_value_head_dim")
    kernel = config.count("linear_conv_kernel_dim", default=4)
    convolution = (2 * key_heads * key_dim + value_heads * value_dim) * kernel
    return _present(
        FullAttention(
            layers=full,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            gated=config.flag("attn_output_gate", default=True),
            extras=2 * head_dim,
        ),
        LinearAttention(
            layers=layers - full,
            key_heads=key_heads,
            value_heads=value_heads,
            key_head_dim=key_dim,
            value_head_dim=value_dim,
            conv_kernel=kernel,
            state_dtype=_state_dtype(config),
            # Decay and step size of each value head, and the norm of a head.
            extras=convolution + 2 * hidden * value_heads + 2 * value_heads + value_dim,
        ),
    )


def kimi_delta(config: ConfigReader, layers: int) -> tuple[Attention, ...]:
    """Kimi Linear and K3: delta attention with a gate per channel, and MLA every few layers."""
    linear = config.section("linear_attn_config")
    delta = sum(1 for layer in set(linear.numbers("kda_layers")) if 0 < layer <= layers)
    if not delta:
        raise config.refuse("linear_attn_config.kda_layers is missing; it lists the linear layers")
    heads, head_dim = linear.positive("num_heads"), linear.positive("head_dim")
    kernel = linear.count("short_conv_kernel_size", default=4)
    hidden = config.positive("hidden_size")
    width = heads * head_dim
    full_rank = linear.flag("use_full_rank_gate")
    low_rank = head_dim * (hidden + width)
    return (
        *latent(config, layers - delta),
        LinearAttention(
            layers=delta,
            key_heads=heads,
            value_heads=heads,
            key_head_dim=head_dim,
            value_head_dim=head_dim,
            conv_kernel=kernel,
            gated=full_rank,
            # Forget gate (low rank), output gate (low rank unless full), step sizes, norm.
            extras=(1 if full_rank else 2) * low_rank
            + width * (3 * kernel + 1)
            + heads * (hidden + 1)
            + head_dim,
        ),
    )


def compressed(config: ConfigReader, layers: int) -> tuple[Attention, ...]:
    """DeepSeek V4: one shared key-value head, whose cache is compressed in most layers."""
    hidden = config.positive("hidden_size")
    heads, head_dim = config.positive("num_attention_heads"), config.positive("head_dim")
    q_rank = config.positive("q_lora_rank")
    index_heads = config.count("index_n_heads", default=0)
    index_dim = config.count("index_head_dim", default=0)
    ratios = config.per_layer("compress_ratios", layers)
    if ratios is None:
        raise config.refuse("compress_ratios is missing; it says how each layer's cache is kept")
    kinds: list[FullAttention] = []
    if not all(isinstance(ratio, int) and ratio >= 0 for ratio in ratios):
        raise config.refuse(f"compress_ratios: {ratios!r} are no whole numbers")
    for ratio, count in sorted(Counter(ratios).items()):
        # Only layers that compress little have an indexer: it picks among their entries.
        indexed = 0 < ratio <= _INDEXED_UP_TO
        entry = (2 if indexed else 1) * head_dim
        compressor = 2 * hidden * entry + ratio * entry + head_dim if ratio else 0
        indexer = 0
        if indexed:
            indexer = index_heads * (q_rank * index_dim + hidden) + index_dim
            indexer += 2 * index_dim * (2 * hidden + ratio)
        kinds.append(
            FullAttention(
                layers=count,
                heads=heads,
                kv_heads=config.count("num_key_value_heads", default=1),
                head_dim=head_dim,
                window=None if ratio else config.positive("sliding_window"),
                q_lora_rank=q_rank,
                o_lora_rank=config.positive("o_lora_rank"),
                o_groups=config.positive("o_groups"),
                values_are_keys=True,
                compression=max(ratio, 1),
                index_heads=index_heads if indexed else 0,
                index_head_dim=index_dim if indexed else 0,
                extras=q_rank + head_dim + heads + compressor + indexer,
            )
        )
    return tuple(kinds)


_INDEXED_UP_TO = 4


def _heads(config: ConfigReader) -> tuple[int, int, int]:
    heads = config.positive("num_attention_heads")
    kv_heads = config.count("num_key_value_heads", default=heads)
    head_dim = config.count("head_dim", default=config.positive("hidden_size") // heads)
    if kv_heads == 0 or heads % kv_heads:
        raise config.refuse(f"num_attention_heads {heads} is no multiple of {kv_heads} KV heads")
    return heads, kv_heads, head_dim


def _windowed_layers(config: ConfigReader, layers: int) -> tuple[int, int | None]:
    window = config.count("sliding_window", default=0)
    if not window or not config.flag("use_sliding_window", default=True):
        return 0, None
    kinds = config.per_layer("layer_types", layers)
    return (layers if kinds is None else Counter(kinds)["sliding_attention"]), window


def _state_dtype(config: ConfigReader) -> Dtype:
    """vLLM keeps the state in the model's dtype unless the config asks for more."""
    return Dtype.FP32 if config.text.get("mamba_ssm_dtype") == "float32" else Dtype.BF16


def _present(*kinds: Attention) -> tuple[Attention, ...]:
    return tuple(kind for kind in kinds if kind.layers)
