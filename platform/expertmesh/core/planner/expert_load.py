"""How often each expert of each layer is asked: measured in a running group, or assumed.

By layer and expert, in any unit: only ratios within a layer count.
"""

from collections.abc import Iterable, Mapping
from math import exp, log

SPREAD = 5000.0
"""Load of the hottest over that of the coldest expert of a layer.

With exponent 1.01 it gives DeepSeek-R1's imbalance over 32 ranks of 8 experts each: the heaviest
rank has 2.6 times the mean load (TensorRT-LLM, tech blog 4: (max - mean) / mean = 1.564).
"""

_MASK = (1 << 64) - 1


def power_law(
    experts: int, layers: int, exponent: float, spread: float = SPREAD
) -> list[list[float]]:
    """Loads x between 1 and `spread` with a density of x to the power of -exponent.

    Every layer has the same loads in another order, which is mixed but always the same. Published
    exponents: 1.01 for DeepSeek-V3, 1.2 for Qwen3-235B (aiconfigurator,
    docs/POWER_LAW_DISTRIBUTION.md, whose formula this is); an exponent of 0 spreads loads evenly
    between the limits. A spread of 1 makes all equal. Raises ValueError below that.
    """
    if experts < 1 or layers < 1 or not spread >= 1.0:
        raise ValueError(
            f"a power law needs experts, layers and a spread of at least 1, got {experts}, "
            f"{layers} and {spread:g}"
        )
    loads = [_quantile((index + 0.5) / experts, exponent, spread) for index in range(experts)]
    return [_mixed(loads, layer) for layer in range(layers)]


def measured_by_layer(
    shares: Iterable[Mapping[int, Mapping[str, int]]], experts: int
) -> list[list[float]]:
    """From the answers of all ranks to `GET /em/experts`: by layer, expert id to tokens.

    Layers in order of their number; an expert that nobody reports has no load. Raises ValueError
    for an expert beyond the model's, or when no layer is reported.
    """
    layers: dict[int, list[float]] = {}
    for share in shares:
        for layer, tokens in share.items():
            _add(layers.setdefault(layer, [0.0] * experts), tokens)
    if not layers:
        raise ValueError("no rank has reported tokens of its experts yet")
    return [layers[layer] for layer in sorted(layers)]


def _add(loads: list[float], tokens: Mapping[str, int]) -> None:
    for name, count in tokens.items():
        expert = int(name)
        if not 0 <= expert < len(loads):
            raise ValueError(f"tokens of expert {expert}, but the model has {len(loads)} experts")
        if count < 0:
            raise ValueError(f"expert {expert} has a negative number of tokens: {count}")
        loads[expert] += count


def _quantile(share: float, exponent: float, spread: float) -> float:
    """The load that this share of the experts stays below."""
    power = 1.0 - exponent
    if abs(power) < 1e-9:
        return exp(log(spread) * share)
    return exp(log((exp(log(spread) * power) - 1.0) * share + 1.0) / power)


def _mixed(loads: list[float], layer: int) -> list[float]:
    """In an order that looks random and depends on the layer alone (splitmix64)."""
    keys = [_splitmix(layer * len(loads) + index) for index in range(len(loads))]
    return [load for _, load in sorted(zip(keys, loads, strict=True))]


def _splitmix(number: int) -> int:
    number = (number + 1) * 0x9E3779B97F4A7C15 & _MASK
    number = (number ^ (number >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    number = (number ^ (number >> 27)) * 0x94D049BB133111EB & _MASK
    return number ^ (number >> 31)
