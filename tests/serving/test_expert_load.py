"""Expert loads: adding up, and asking an engine."""

import asyncio
from typing import Any

import pytest

from expertmesh.errors import UpstreamUnavailable
from expertmesh.serving.expert_load import (
    ExpertLoadExtension,
    LayerLoad,
    RecentLoads,
    WireLoad,
    add_loads,
    layer_index,
    read_expert_load,
)


class Engine:
    def __init__(self, shares: list[WireLoad], delay_s: float = 0.0) -> None:
        self.shares, self.delay_s = shares, delay_s

    async def collective_rpc(self, method: str) -> list[Any]:
        assert hasattr(ExpertLoadExtension, method)
        await asyncio.sleep(self.delay_s)
        return self.shares


async def test_shares_of_an_engine_s_workers_become_one_load() -> None:
    engine = Engine([[(0, [(0, 5), (1, 7)])], [(0, [(2, 1), (3, 0)])]])
    assert await read_expert_load(engine) == (LayerLoad(0, ((0, 5), (1, 7), (2, 1), (3, 0))),)


async def test_engine_that_does_not_answer_is_given_up() -> None:
    with pytest.raises(UpstreamUnavailable, match=r"within 0\.01 s.*ask again later"):
        await read_expert_load(Engine([], delay_s=30.0), timeout_s=0.01)


async def test_worker_that_counts_nothing_has_an_empty_load() -> None:
    assert ExpertLoadExtension().expert_load() == []
    assert await read_expert_load(Engine([[], []])) == ()


def test_loads_of_ranks_add_up_layer_by_layer() -> None:
    first = (LayerLoad(1, ((0, 1),)), LayerLoad(3, ((0, 2),)))
    second = (LayerLoad(3, ((1, 4), (0, 3))),)
    assert add_loads([first, second]) == (LayerLoad(1, ((0, 1),)), LayerLoad(3, ((0, 5), (1, 4))))


@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("model.layers.0.mlp.experts", 0),
        ("language_model.model.layers.61.block_sparse_moe.experts", 61),
    ],
)
def test_layer_number_from_vllm_s_layer_name(name: str, index: int) -> None:
    assert layer_index(name) == index


def test_peaks_are_of_the_last_readings_alone() -> None:
    recent = RecentLoads(readings=2)
    assert recent.peaks() == {}
    recent.saw((LayerLoad(0, ((0, 100), (1, 0))), LayerLoad(1, ((0, 5), (1, 5)))))
    assert recent.peaks() == {}
    recent.saw((LayerLoad(0, ((0, 101), (1, 3))), LayerLoad(1, ((0, 5), (1, 5)))))
    # The second layer had no token.
    assert recent.peaks() == {"0": (3, 4, 2)}
    recent.saw((LayerLoad(0, ((0, 103), (1, 3))), LayerLoad(1, ((0, 9), (1, 5)))))
    assert recent.peaks() == {"0": (2, 2, 2), "1": (4, 4, 2)}
