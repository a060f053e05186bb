"""How many tokens the router sent to each expert: what a rank reports, and how to ask for it.

Free of torch and vLLM, so that any process may read and add up loads.
"""

import asyncio
import re
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from expertmesh.errors import UpstreamUnavailable

WireLoad = list[tuple[int, list[tuple[int, int]]]]
"""Per layer its index and (expert, tokens) pairs: what vLLM's engine protocol can carry."""


@dataclass(frozen=True, slots=True)
class LayerLoad:
    """Tokens since the engine started that one layer's router sent to experts of one share.

    A token counts once for each expert it is sent to. Each expert is counted by one worker of its
    group, so the sum over all ranks is tokens x top_k. Dummy batches of idle ranks do not count.
    """

    layer: int
    tokens: tuple[tuple[int, int], ...]
    """Pairs of global expert id and tokens, by id."""


class Engine(Protocol):
    """The part of vLLM's AsyncLLM that is needed here."""

    async def collective_rpc(self, method: str) -> list[Any]: ...


class ExpertLoadExtension:
    """Mixed into vLLM's worker by `worker_extension_cls`; `ExpertWorker` brings it along.

    Only the CPU worker counts. On another the load is empty.
    """

    def expert_load(self) -> WireLoad:
        return [counter.read() for counter in getattr(self, "expert_counters", ())]


async def read_expert_load(engine: Engine, timeout_s: float = 5.0) -> tuple[LayerLoad, ...]:
    """The load of this engine's share: of all its workers together, one `LayerLoad` a layer.

    The engine answers between two steps, so a busy one takes as long as the step it is in.
    """
    try:
        shares = await asyncio.wait_for(engine.collective_rpc("expert_load"), timeout_s)
    except TimeoutError as error:
        raise UpstreamUnavailable(
            f"the engine did not report its expert load within {timeout_s:g} s: it is in a longer "
            "step, or stuck; ask again later"
        ) from error
    return add_loads(loads_from_wire(share) for share in shares)


def add_loads(shares: Iterable[Sequence[LayerLoad]]) -> tuple[LayerLoad, ...]:
    """One load from those of several workers or ranks."""
    totals: dict[int, dict[int, int]] = {}
    for share in shares:
        for load in share:
            layer = totals.setdefault(load.layer, {})
            for expert, tokens in load.tokens:
                layer[expert] = layer.get(expert, 0) + tokens
    return tuple(LayerLoad(layer, tuple(sorted(totals[layer].items()))) for layer in sorted(totals))


class RecentLoads:
    """The loads of the last readings of one share, a minute with one every 5 s."""

    def __init__(self, readings: int = 13) -> None:
        self._loads: deque[tuple[LayerLoad, ...]] = deque(maxlen=readings)

    def saw(self, loads: tuple[LayerLoad, ...]) -> None:
        """Totals never fall: a new process begins with no reading."""
        self._loads.append(loads)

    def peaks(self) -> dict[str, tuple[int, int, int]]:
        """By layer: tokens of the busiest expert and of all between the oldest and the newest
        reading, and how many experts there are; without layers that had no token."""
        if len(self._loads) < 2:
            return {}
        before = {load.layer: dict(load.tokens) for load in self._loads[0]}
        found = {}
        for load in self._loads[-1]:
            known = before.get(load.layer, {})
            grown = [tokens - known.get(expert, 0) for expert, tokens in load.tokens]
            if any(grown):
                found[str(load.layer)] = (max(grown), sum(grown), len(grown))
        return found


def layer_index(layer_name: str) -> int:
    """vLLM's layer name, such as `model.layers.3.mlp.experts`, to the layer's number."""
    number = re.search(r"\.(\d+)\.", layer_name)
    assert number, f"vLLM layer name without a number: {layer_name}"
    return int(number.group(1))


def loads_from_wire(share: WireLoad) -> tuple[LayerLoad, ...]:
    return tuple(
        LayerLoad(layer, tuple((expert, count) for expert, count in tokens))
        for layer, tokens in share
    )
