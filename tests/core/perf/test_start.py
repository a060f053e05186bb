"""Time to ready of a group: what it reads, what it waits for."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertmesh.core.perf.layout import Layout
from expertmesh.core.perf.start import ENGINE_S, LOAD_BYTES_PER_S, node_bytes, start_s
from expertmesh.core.perf.weights import weights
from expertmesh.spec.catalog import models

V3 = models()["deepseek-ai/DeepSeek-V3"].shape
DENSE = models()["Qwen/Qwen2.5-72B"].shape


def seconds(layout: Layout) -> float:
    return start_s(weights(V3, layout), layout, gpus_per_node=8)


def test_one_node_reads_the_model_once() -> None:
    for layout in (Layout(1, 8, 8), Layout(8, 1, 8), Layout(8, 1)):
        read = node_bytes(weights(V3, layout), layout, 8)
        assert read == pytest.approx(680e9, rel=0.03)
        assert seconds(layout) == pytest.approx(ENGINE_S + read / LOAD_BYTES_PER_S)


def test_a_rank_of_less_than_a_node_reads_all_of_a_dense_model() -> None:
    for tensor in (1, 2, 8):
        layout = Layout(tensor)
        read = node_bytes(weights(DENSE, layout), layout, 8)
        assert read == pytest.approx(145.4e9, rel=0.02)


@given(st.sampled_from([8, 16, 32, 64]), st.sampled_from([1, 2, 4, 8]))
def test_more_nodes_each_read_less(gpus: int, tensor: int) -> None:
    small = Layout(tensor, gpus // tensor, gpus)
    large = Layout(tensor, 2 * gpus // tensor, 2 * gpus)
    read = [node_bytes(weights(V3, layout), layout, 8) for layout in (small, large)]
    assert read[1] < read[0]
    assert read[1] > read[0] / 2  # attention and the like are read by each of them


def test_published_starts_are_within_a_factor_of_three() -> None:
    """V3.2 on 32 GPUs takes 120 to 180 s, V4-Flash on one node 480 s."""
    flash = models()["deepseek-ai/DeepSeek-V4-Flash"].shape
    layout = Layout(8, 1, 8)
    assert 120 / 2 < seconds(Layout(1, 32, 32)) < 180 * 2
    assert 480 / 3 < start_s(weights(flash, layout), layout, 8) < 480 * 3
