"""What a rank reads of its engine's configuration, as vLLM completes it after the start."""

from types import SimpleNamespace as Thing

import pytest
from vllm.config import CacheConfig, SchedulerConfig

from expertmesh.serving.engine_stats import EngineCapacity, read_capacity


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
