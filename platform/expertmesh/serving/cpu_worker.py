"""The CPU worker that keeps to its rank's share of the experts and counts the tokens they get.

It also mends two kernels of vLLM's CPU engine for two of the model families it serves.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
from vllm.v1.worker.cpu_worker import CPUWorker

from expertmesh.errors import SetupError
from expertmesh.serving.expert_load import ExpertLoadExtension, layer_index
from expertmesh.serving.expert_routing import define_operator, keep_local

Router = Callable[..., tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True, slots=True)
class ExpertCounter:
    """Counts one layer's tokens by global expert id; reports the experts of this rank's share."""

    layer: int
    share: tuple[int, ...]
    tokens: torch.Tensor

    def read(self) -> tuple[int, list[tuple[int, int]]]:
        tokens = self.tokens.tolist()
        return self.layer, [(expert, tokens[expert]) for expert in self.share]


class ExpertWorker(CPUWorker, ExpertLoadExtension):
    def load_model(self, *args: Any, **kwargs: Any) -> None:
        rotate_every_head()
        super().load_model(*args, **kwargs)
        keep_sinks_in_bfloat16(self.vllm_config)
        self.expert_counters = route_locally(self.vllm_config)


def rotate_every_head() -> None:
    """Patched: `RotaryEmbedding.forward_cpu`. Its kernel counts heads in the last dimension, so of
    the [tokens, heads, dim] queries of multi-head latent attention (DeepSeek) it would rotate wrong
    ones; the plain implementation does not."""
    if hasattr(RotaryEmbedding.forward_cpu, "expertmesh_original"):
        return
    original = RotaryEmbedding.forward_cpu

    def forward_cpu(
        self: Any, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        forward = original if query.dim() == 2 else RotaryEmbedding.forward_native
        return forward(self, positions, query, key)

    forward_cpu.expertmesh_original = original  # type: ignore[attr-defined]
    RotaryEmbedding.forward_cpu = forward_cpu


def keep_sinks_in_bfloat16(vllm_config: VllmConfig) -> None:
    """Patched: `sinks` of each attention layer that has them (gpt-oss). The attention kernel reads
    them as bfloat16 whatever the model's dtype, and refuses others in the middle of a step."""
    for layer in vllm_config.compilation_config.static_forward_context.values():
        attention = getattr(layer, "impl", None)
        sinks = getattr(attention, "sinks", None)
        if attention is not None and sinks is not None:
            attention.sinks = sinks.to(torch.bfloat16)


def route_locally(vllm_config: VllmConfig) -> tuple[ExpertCounter, ...]:
    """Puts this rank's share between router and kernel of every MoE layer of the loaded model."""
    define_operator()
    compilation = vllm_config.compilation_config
    counters = []
    for name in compilation.static_all_moe_layers:
        layer = compilation.static_forward_context[name].routed_experts
        kernel = layer.quant_method.moe_kernel
        experts = kernel.fused_experts if kernel else None
        if isinstance(experts, CPUUnquantizedExperts):
            counter = _counter(name, layer)
            # Patched: `_select_experts` of this layer's kernel object, the step before the kernel,
            # which takes the ids as rows of the local weights and crashes on those it lacks.
            experts._select_experts = _local_router(
                experts._select_experts, layer.expert_map, counter
            )
            if counter:
                counters.append(counter)
        elif layer.expert_map is not None:
            raise SetupError(
                f"enable_expert_parallel=True: layer {name} has quantised experts "
                f"({type(experts or layer.quant_method).__name__}), whose CPU kernel cannot skip "
                "experts of other ranks. Serve unquantised weights, or without expert parallelism."
            )
    return tuple(counters)


def _counter(name: str, layer: Any) -> ExpertCounter | None:
    """Without expert parallelism the workers of a tensor-parallel group hold slices of the same
    experts and see the same tokens: only the first counts."""
    if layer.moe_config.moe_parallel_config.tp_rank != 0:
        return None
    experts = layer.global_num_experts
    share = range(experts) if layer.expert_map is None else (layer.expert_map >= 0).nonzero()
    return ExpertCounter(
        layer_index(name), tuple(int(e) for e in share), torch.zeros(experts, dtype=torch.int64)
    )


def _local_router(
    select_experts: Router, expert_map: torch.Tensor | None, counter: ExpertCounter | None
) -> Router:
    def select_local_experts(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        weights, expert_ids = select_experts(*args, **kwargs)
        if counter is not None:
            torch.ops.expertmesh.count_tokens(expert_ids, counter.tokens)
        if expert_map is not None:
            weights, expert_ids = keep_local(weights, expert_ids, expert_map)
        return weights, expert_ids

    return select_local_experts
