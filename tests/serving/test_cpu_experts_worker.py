"""What the CPU worker puts into a loaded model, on stand-ins for the model's layers."""

from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.forward_context import create_forward_context, override_forward_context

from expertmesh.errors import SetupError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(name="worker")
def import_worker() -> ModuleType:
    """Imported late: its import warns of what torch deprecates."""
    from expertmesh.serving import cpu_worker

    return cpu_worker


EXPERT_MAP = torch.tensor([-1, -1, 0, 1], dtype=torch.int32)


def loaded_model(experts: Any, expert_map: torch.Tensor | None, tp_rank: int = 0) -> Any:
    layer = SimpleNamespace(
        quant_method=SimpleNamespace(moe_kernel=SimpleNamespace(fused_experts=experts)),
        expert_map=expert_map,
        global_num_experts=4,
        moe_config=SimpleNamespace(moe_parallel_config=SimpleNamespace(tp_rank=tp_rank)),
    )
    name = "model.layers.5.mlp.experts"
    return SimpleNamespace(
        compilation_config=SimpleNamespace(
            fast_moe_cold_start=False,
            static_all_moe_layers=[name],
            static_forward_context={name: SimpleNamespace(routed_experts=layer)},
        )
    )


def unquantised_experts(worker: ModuleType) -> Any:
    """A kernel object of vLLM's class whose router always chooses experts 0 and 3."""
    experts = worker.CPUUnquantizedExperts.__new__(worker.CPUUnquantizedExperts)
    experts._select_experts = lambda states: (
        torch.full((len(states), 2), 0.5),
        torch.tensor([[0, 3]] * len(states), dtype=torch.int32),
    )
    return experts


def route(config: Any, experts: Any, rows: int, real: int) -> tuple[list[Any], list[Any]]:
    metadata = {"attention": SimpleNamespace(num_actual_tokens=real)}
    with override_forward_context(create_forward_context(metadata, config)):
        weights, ids = experts._select_experts(torch.zeros(rows, 1))
    return weights.tolist(), ids.tolist()


def test_share_of_an_expert_parallel_rank(worker: ModuleType) -> None:
    experts = unquantised_experts(worker)
    config = loaded_model(experts, EXPERT_MAP)
    [counter] = worker.route_locally(config)
    assert route(config, experts, rows=2, real=1) == ([[0.0, 0.5]] * 2, [[0, 1]] * 2)
    assert counter.read() == (5, [(2, 0), (3, 1)])


def test_rank_that_holds_all_experts_only_counts(worker: ModuleType) -> None:
    experts = unquantised_experts(worker)
    config = loaded_model(experts, None)
    [counter] = worker.route_locally(config)
    assert route(config, experts, rows=2, real=2) == ([[0.5, 0.5]] * 2, [[0, 3]] * 2)
    assert counter.read() == (5, [(0, 2), (1, 0), (2, 0), (3, 2)])


def test_second_slice_of_the_same_experts_does_not_count_again(worker: ModuleType) -> None:
    experts = unquantised_experts(worker)
    config = loaded_model(experts, None, tp_rank=1)
    assert worker.route_locally(config) == ()
    assert route(config, experts, rows=1, real=1) == ([[0.5, 0.5]], [[0, 3]])


def test_quantised_experts_refuse_expert_parallelism(worker: ModuleType) -> None:
    class CPUExpertsFp8:
        pass

    with pytest.raises(SetupError, match=r"layers\.5.*CPUExpertsFp8.*unquantised"):
        worker.route_locally(loaded_model(CPUExpertsFp8(), EXPERT_MAP))


def test_quantised_experts_of_one_rank_are_served_uncounted(worker: ModuleType) -> None:
    assert worker.route_locally(loaded_model(object(), None)) == ()


def test_sinks_become_what_the_attention_kernel_reads(worker: ModuleType) -> None:
    attention = SimpleNamespace(impl=SimpleNamespace(sinks=torch.tensor([0.5, -1.0])))
    without = SimpleNamespace(impl=SimpleNamespace(sinks=None))
    layers = {"a": attention, "b": without, "c": SimpleNamespace()}
    config = SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context=layers))
    worker.keep_sinks_in_bfloat16(config)
    assert attention.impl.sinks.dtype == torch.bfloat16
    assert attention.impl.sinks.tolist() == [0.5, -1.0]
    assert without.impl.sinks is None


def test_every_head_of_a_query_is_rotated(worker: ModuleType) -> None:
    """Against vLLM's own plain implementation, with queries in the shape of latent attention."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding import get_rope

    worker.rotate_every_head()
    worker.rotate_every_head()
    parameters = {"rope_theta": 10000.0, "rope_type": "default"}
    with set_current_vllm_config(VllmConfig()):
        rotary = get_rope(64, 512, is_neox_style=False, rope_parameters=parameters)
    positions = torch.arange(5)
    query, key = torch.randn(5, 4, 64), torch.randn(5, 1, 64)
    expected = rotary.forward_native(positions, query.clone(), key.clone())
    rotated = rotary.forward_cpu(positions, query.clone(), key.clone())
    torch.testing.assert_close(rotated, expected)
    flat = rotary.forward_cpu(positions, query.flatten(1).clone(), key.flatten(1).clone())
    torch.testing.assert_close(flat[0].view_as(query), expected[0])
