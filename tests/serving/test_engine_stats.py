"""What a rank reads of its engine: its configuration, as vLLM completes it after the start, and the
figures that vLLM counts."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace as Thing

import pytest
from vllm.config import CacheConfig, SchedulerConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.v1.metrics.loggers import PrometheusStatLogger
from vllm.v1.metrics.prometheus import unregister_vllm_metrics
from vllm.v1.metrics.stats import IterationStats, PrefillStats, SchedulerStats

from expertmesh.serving.engine_stats import EngineCapacity, EngineLoad, read_capacity, read_load

# vLLM's configuration imports what torch deprecates.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

MODEL = Path(__file__).parents[2] / "models/tiny-qwen3-moe"


def engine(cache: object, scheduler: object = None) -> Thing:
    config = Thing(cache_config=cache, scheduler_config=scheduler)
    return Thing(_engine_client=Thing(vllm_config=config))


def test_the_names_are_those_of_the_installed_vllm() -> None:
    cache = CacheConfig(block_size=16)
    cache.num_gpu_blocks = 100
    scheduler = SchedulerConfig(
        max_num_seqs=32, max_num_batched_tokens=2048, max_model_len=1024, is_encoder_decoder=False
    )
    assert cache.kv_cache_size_tokens is None
    assert read_capacity(engine(cache, scheduler)) == EngineCapacity(1600, 32)
    cache.kv_cache_size_tokens = 1500
    assert read_capacity(engine(cache, scheduler)) == EngineCapacity(1500, 32)


@pytest.mark.parametrize(
    "given",
    [
        pytest.param(None, id="no engine"),
        pytest.param(Thing(), id="another engine"),
        pytest.param(Thing(_engine_client=None), id="not started"),
        pytest.param(Thing(_engine_client=Thing(vllm_config=None)), id="no configuration"),
        pytest.param(engine(None), id="no cache"),
        pytest.param(engine(Thing(num_gpu_blocks=None, block_size=16)), id="before the start"),
        pytest.param(
            engine(
                Thing(num_gpu_blocks="many", block_size=16, kv_cache_size_tokens=-1),
                Thing(max_num_seqs=2.5),
            ),
            id="odd values",
        ),
    ],
)
def test_what_the_engine_does_not_say_is_zero(given: object) -> None:
    assert read_capacity(given) == EngineCapacity(0, 0)


@pytest.fixture
def logger() -> Iterator[PrometheusStatLogger]:
    """What the engine of rank 3 writes its figures with."""
    config = AsyncEngineArgs(
        model=str(MODEL), max_model_len=512, enforce_eager=True
    ).create_engine_config()
    yield PrometheusStatLogger(config, [3])
    unregister_vllm_metrics()


def step(prompt: tuple[int, int, int], output: int, preempted: int) -> IterationStats:
    """`prompt`: all tokens, those of the local cache, those that came from elsewhere."""
    stats = IterationStats()
    prefill = PrefillStats()
    prefill.set(*prompt)
    stats.prompt_token_stats.update_from_output(prefill)
    stats.num_generation_tokens = output
    stats.num_preempted_reqs = preempted
    return stats


def test_totals_are_of_what_the_engine_computed_itself(logger: PrometheusStatLogger) -> None:
    assert read_load() == EngineLoad()
    now = SchedulerStats(num_running_reqs=3, num_waiting_reqs=1, kv_cache_usage=0.5)
    logger.record(now, step((100, 60, 8), output=7, preempted=2), engine_idx=3)
    assert read_load() == EngineLoad(3, 1, 0.5, 32, 7, 2, 68)
    logger.record(SchedulerStats(), step((50, 0, 0), output=1, preempted=0), engine_idx=3)
    assert read_load() == EngineLoad(0, 0, 0.0, 82, 8, 2, 68)


def test_an_engine_that_writes_nothing_reads_as_zero() -> None:
    unregister_vllm_metrics()
    assert read_load() == EngineLoad()
