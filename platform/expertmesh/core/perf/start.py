"""How long a group takes from being asked for to being ready, before that has been measured.

Right within a factor of two or so. Published: 120 to 180 s for DeepSeek-V3.2 on 32 GPUs (SGLang
and Mooncake, 2026-03), where this says 230; 480 s for DeepSeek-V4-Flash on one node
(vllm-project/vllm#43189), where it says 180. Storage and warm caches make the difference.
"""

from math import log2

from expertmesh.core.perf.layout import Layout
from expertmesh.core.perf.weights import Weights

LOAD_BYTES_PER_S = 2e9
"""That a node reads of a checkpoint, from a network file system or one disk; 9.5e9 has been seen
from memory (HabanaAI/vllm-fork#809)."""
ENGINE_S = 100.0
"""Processes, imports, communicators, torch.compile, profiling and CUDA graphs: about 40 s of it
compile and 60 s warm up (a Qwen3.6-35B on one GPU, route179.dev, 2026-06)."""
SLOWER_PER_DOUBLING = 0.1
"""A gang waits for its slowest node: the mean of the slowest of n whose times vary by a fifth."""
NODE_S = 240.0
"""To rent a node and pull the image; unverified. Ready times of 2 to over 8 minutes are reported
(llm-d/llm-d-autoscaling#1071)."""
UNPLANNED_S = 60.0
"""Where model or GPU is not known, and on CPUs: nobody's figure, soon replaced by measured ones."""


def start_s(held: Weights, layout: Layout, gpus_per_node: int) -> float:
    """On nodes that are there already; `held` is of one GPU."""
    nodes = layout.nodes(gpus_per_node)
    slowest = 1 + SLOWER_PER_DOUBLING * log2(nodes)
    seconds = ENGINE_S + node_bytes(held, layout, gpus_per_node) / LOAD_BYTES_PER_S
    return seconds * slowest


def node_bytes(held: Weights, layout: Layout, gpus_per_node: int) -> int:
    """Of the checkpoint, that a node reads: its ranks read what they have in common once."""
    experts = held.experts * min(layout.world_size, gpus_per_node)
    return experts + (held.total - held.experts) * layout.tensor
