"""Balance of the planner's expert placements beside that of the published greedy algorithm.

`python -m benchmarks.expert_placement [--layers N] [--vllm]`: with `--vllm` also through vLLM's own
default policy, where vLLM is installed. Everything is computed; no GPU and no engine takes part.
"""

import argparse
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from benchmarks.figures import Conditions, Figure, Row
from rich.console import Console

from expertmesh.core.planner.expert_load import power_law
from expertmesh.core.planner.expert_packing import replicate
from expertmesh.core.planner.placement import (
    TRIALS,
    Loads,
    Placement,
    Ranks,
    balancedness,
    first_placement,
    place,
    rank_loads,
)
from expertmesh.core.planner.redundancy import memory_bound_rate, redundancy, redundant_counts
from expertmesh.core.planner.replan import replan

EXPERTS = 256
LAYERS = 8
"""Enough for the second digit after the point; the whole table for 58 takes minutes."""
V3_LAYERS = 58
V3_EXPERT_BYTES = 44_000_000
"""One expert of DeepSeek-V3 in FP8."""
_SAME = 1e-9


def published_greedy(loads: Loads, ranks: Ranks) -> Placement:
    """Written from the description in the README of deepseek-ai/EPLB.

    Hierarchical: expert groups are packed onto nodes, then each node replicates its experts and
    packs the replicas onto its ranks; else the same over all ranks. vLLM's default policy differs
    only in keeping an expert that stays on a rank in its slot.
    """
    layers = [_published_layer(layer, ranks) for layer in loads]
    return Placement(len(loads[0]), ranks.count, tuple(layers))


def _published_layer(loads: Sequence[float], ranks: Ranks) -> tuple[int, ...]:
    nodes, groups = (ranks.nodes, ranks.groups) if ranks.groups % ranks.nodes == 0 else (1, 1)
    size = len(loads) // groups
    sums = [sum(loads[group * size : (group + 1) * size]) for group in range(groups)]
    slots: list[int] = []
    for held in _packed(sums, nodes):
        experts = [group * size + index for group in held for index in range(size)]
        replicas = list(experts)
        counts = dict.fromkeys(experts, 1)
        for _ in range(ranks.redundant // nodes):
            hottest = max(experts, key=lambda expert: loads[expert] / counts[expert])
            counts[hottest] += 1
            replicas.append(hottest)
        shares = [loads[expert] / counts[expert] for expert in replicas]
        for packed in _packed(shares, ranks.count // nodes):
            slots += [replicas[index] for index in packed]
    return tuple(slots)


def _packed(weights: Sequence[float], packs: int) -> list[list[int]]:
    """The heaviest first, each to the lightest pack with room."""
    room = len(weights) // packs
    packed: list[list[int]] = [[] for _ in range(packs)]
    sums = [0.0] * packs
    for item in sorted(range(len(weights)), key=lambda item: -weights[item]):
        pack = min((p for p in range(packs) if len(packed[p]) < room), key=sums.__getitem__)
        packed[pack].append(item)
        sums[pack] += weights[item]
    return packed


# Loads


def zipf(exponent: float, layers: int, experts: int = EXPERTS, seed: int = 7) -> Loads:
    """The n-th hottest expert has a load of n to the power of -exponent, other ones each layer.

    Layers differ: the exponent varies by up to a fifth, and every load by a few percent.
    """
    rng = random.Random(seed)
    loads = []
    for _ in range(layers):
        own = exponent * rng.uniform(0.8, 1.2)
        layer = [rank**-own * rng.uniform(0.95, 1.05) for rank in range(1, experts + 1)]
        rng.shuffle(layer)
        loads.append(layer)
    return loads


def uniform(layers: int, experts: int = EXPERTS, seed: int = 7) -> Loads:
    rng = random.Random(seed)
    return [[rng.random() for _ in range(experts)] for _ in range(layers)]


def lognormal(layers: int, experts: int = EXPERTS, seed: int = 7) -> Loads:
    rng = random.Random(seed)
    return [[rng.lognormvariate(0.0, 1.0) for _ in range(experts)] for _ in range(layers)]


def families(layers: int) -> dict[str, Loads]:
    return {
        "uniform": uniform(layers),
        "log-normal, sigma 1": lognormal(layers),
        **{f"zipf {exponent:g}": zipf(exponent, layers) for exponent in (0.5, 0.75, 1, 1.25, 1.5)},
        **{
            f"density {exponent:g}": power_law(EXPERTS, layers, exponent)
            for exponent in (0.5, 1.01, 1.2, 1.5)
        },
    }


# Tables


@dataclass(frozen=True, slots=True)
class Compared:
    ranks: Ranks
    loads: str
    first: float
    """Before any measurement: in order, no redundant experts where the ranks divide them."""
    greedy: float
    ours: float
    bound: float
    """Nothing can be better."""
    worse_layers: int
    doubled: tuple[int, int]
    """Slots whose expert is on their rank already, with greedy and with ours."""
    seconds: float


def compare(ranks: Ranks, name: str, loads: Loads) -> Compared:
    greedy = published_greedy(loads, ranks)
    start = time.process_time()
    ours = place(loads, ranks)
    seconds = time.process_time() - start
    heaviest_greedy = [max(layer) for layer in rank_loads(greedy, loads)]
    heaviest = [max(layer) for layer in rank_loads(ours, loads)]
    layers, experts = len(loads), len(loads[0])
    redundant = -experts % ranks.count
    return Compared(
        ranks=ranks,
        loads=name,
        first=balancedness(first_placement(layers, experts, ranks.count, redundant), loads),
        greedy=balancedness(greedy, loads),
        ours=balancedness(ours, loads),
        bound=bound(ranks, loads),
        worse_layers=sum(
            new > old * (1.0 + _SAME) for new, old in zip(heaviest, heaviest_greedy, strict=True)
        ),
        doubled=(doubled(greedy), doubled(ours)),
        seconds=seconds,
    )


def bound(ranks: Ranks, loads: Loads) -> float:
    """No placement can be better balanced; whether one is as good is open."""
    slots = len(loads[0]) + ranks.redundant
    means = [sum(layer) / ranks.count for layer in loads]
    limits = [
        max(mean, _largest_share(layer, slots), _heaviest_node(layer, ranks))
        for mean, layer in zip(means, loads, strict=True)
    ]
    return sum(means) / sum(limits)


def _largest_share(loads: Sequence[float], slots: int) -> float:
    counts = replicate(loads, slots, None)
    return max(load / count for load, count in zip(loads, counts, strict=True))


def _heaviest_node(loads: Sequence[float], ranks: Ranks) -> float:
    """Its mean rank, where each node has two expert groups: the heaviest goes with the lightest."""
    if not ranks.hierarchical or ranks.groups != 2 * ranks.nodes:
        return 0.0
    size = len(loads) // ranks.groups
    sums = sorted(sum(loads[start : start + size]) for start in range(0, len(loads), size))
    pairs = zip(sums[: ranks.nodes], reversed(sums[ranks.nodes :]), strict=True)
    return max(map(sum, pairs)) * ranks.nodes / ranks.count


def doubled(placement: Placement) -> int:
    return sum(
        len(rank) - len(set(rank))
        for layer in range(len(placement.slots))
        for rank in placement.by_rank(layer)
    )


def balance_figure(layers: int) -> Figure:
    loads = families(layers)
    groups = [
        Ranks(8, 32),
        Ranks(16, 32),
        Ranks(32, 32),
        Ranks(32, 32, nodes=4, groups=8),
        Ranks(36, 32),
        Ranks(64, 64),
        Ranks(72, 32),
        Ranks(96, 32),
        Ranks(144, 32),
        Ranks(128, 128),
    ]
    rows = [compare(ranks, name, of) for ranks in groups for name, of in loads.items()]
    return Figure(
        f"Balancedness (mean / heaviest rank), {EXPERTS} experts, {layers} layers",
        (
            "ranks",
            "redundant",
            "loads",
            "in order",
            "greedy",
            "ours",
            "bound",
            "gap closed",
            "CPU s",
        ),
        tuple(_row(row) for row in rows),
        (
            f"worse than greedy in {sum(row.worse_layers for row in rows)} of "
            f"{layers * len(rows)} layers; ahead in {sum(_ahead(row) for row in rows)} of "
            f"{len(rows)} rows, equal in the others",
            "slots whose expert is on their rank already: greedy "
            f"{sum(row.doubled[0] for row in rows)}, ours {sum(row.doubled[1] for row in rows)}",
            "bound: the mean rank, the largest share of an expert or the heaviest node; it may be "
            "out of reach",
            f"longest placement: {max(row.seconds for row in rows):.2f} s of one core",
        ),
    )


def _ahead(row: Compared) -> bool:
    return row.ours > row.greedy * (1.0 + _SAME)


def _row(row: Compared) -> Row:
    ranks = row.ranks
    gap = row.bound - row.greedy
    return (
        _label(ranks),
        f"{ranks.redundant}",
        row.loads,
        f"{row.first:.3f}",
        f"{row.greedy:.4f}",
        f"{row.ours:.4f}",
        f"{row.bound:.4f}",
        f"{(row.ours - row.greedy) / gap:.0%}" if gap > 1e-6 else "-",
        f"{row.seconds:.2f}",
    )


def drifted(loads: Loads, sigma: float, seed: int = 3) -> Loads:
    rng = random.Random(seed)
    return [[load * rng.lognormvariate(0.0, sigma) for load in layer] for layer in loads]


def moves_figure(layers: int) -> Figure:
    loads = power_law(EXPERTS, layers, 1.01)
    rows: list[Row] = []
    for ranks in (Ranks(32, 32), Ranks(32, 32, nodes=4, groups=8), Ranks(144, 32)):
        for sigma in (0.1, 0.3, 1.0):
            new = drifted(loads, sigma)
            greedy_before = published_greedy(loads, ranks)
            greedy_after = published_greedy(new, ranks)
            current = place(loads, ranks)
            row = [
                _label(ranks),
                f"{sigma:g}",
                f"{balancedness(current, new):.4f}",
                f"{balancedness(greedy_after, new):.4f}",
                _gigabytes(_moved(greedy_before, greedy_after), layers),
            ]
            for slack in (0.0, 0.02, 0.05):
                after = replan(current, new, ranks, V3_EXPERT_BYTES, slack)
                row += [f"{after.after:.4f}", _gigabytes(after.moved_experts, layers)]
            rows.append(tuple(row))
    return Figure(
        "Moved experts (GB over all ranks) and balancedness after loads have changed, density 1.01",
        (
            "ranks",
            "drift",
            "unmoved",
            "greedy",
            "GB",
            "slack 0",
            "GB",
            "slack 2 %",
            "GB",
            "slack 5 %",
            "GB",
        ),
        tuple(rows),
        (
            "drift: sigma of the log-normal factor on every load",
            f"GB: {V3_LAYERS} layers with experts of {V3_EXPERT_BYTES / 1e6:g} MB each "
            "(DeepSeek-V3, FP8)",
            "greedy counts an expert that stays on its rank as not moved, as vLLM does",
        ),
    )


def _moved(before: Placement, after: Placement) -> int:
    return sum(
        len(set(new) - set(old))
        for layer in range(len(before.slots))
        for old, new in zip(before.by_rank(layer), after.by_rank(layer), strict=True)
    )


def _gigabytes(experts: int, layers: int) -> str:
    """In all layers of DeepSeek-V3, as in these."""
    return f"{experts * V3_LAYERS / layers * V3_EXPERT_BYTES / 1e9:.0f}"


def redundancy_figure(layers: int) -> Figure:
    rows: list[Row] = []
    slot_bytes = V3_LAYERS * V3_EXPERT_BYTES
    for ranks in (Ranks(16), Ranks(32), Ranks(72), Ranks(144)):
        rate = memory_bound_rate(
            expert_share=0.4,
            kv_bytes=40 * 10**9,
            fixed_share=0.6,
            bytes_per_copy=slot_bytes / ranks.count,
        )
        for exponent in (1.01, 1.5):
            loads = power_law(EXPERTS, layers, exponent)

            def balance(redundant: int, loads: Loads = loads, ranks: Ranks = ranks) -> float:
                placed = place(loads, replace(ranks, redundant=redundant), trials=1)
                return balancedness(placed, loads)

            counts = redundant_counts(EXPERTS, ranks.count, 3)
            found = redundancy(counts, ranks.count, slot_bytes, balance, rate)
            rows += [
                (
                    f"{ranks.count}",
                    f"{exponent:g}",
                    f"{option.redundant}" + (" (best)" if option is found.best else ""),
                    f"{option.bytes_per_rank / 1e9:.2f}",
                    f"{option.balancedness:.4f}",
                    f"{option.rate:.4f}",
                    f"{option.gain_per_slot:+.1%}" if option is not found.options[0] else "-",
                )
                for option in found.options
            ]
    return Figure(
        "Redundant experts: what they cost and bring",
        ("ranks", "density", "redundant", "GB a rank", "balancedness", "rate", "gain a slot"),
        tuple(rows),
        (
            "rate: 1 is perfect balance without redundant experts; experts take 40 % of a step, a "
            "smaller batch leaves 60 % of its time, the cache has 40 GB a rank",
        ),
    )


def vllm_figure(layers: int) -> Figure:
    """vLLM's own code on the same loads: that the greedy column stands for it."""
    import torch
    from vllm.distributed.eplb.policy.default import DefaultEplbPolicy

    rows: list[Row] = []
    for ranks in (Ranks(32, 32), Ranks(32, 32, nodes=4, groups=8), Ranks(144, 32)):
        for name, loads in families(layers).items():
            groups = ranks.groups if ranks.hierarchical else 1
            slots = DefaultEplbPolicy.rebalance_experts(
                torch.tensor(loads),
                len(loads[0]) + ranks.redundant,
                groups,
                ranks.nodes,
                ranks.count,
            )
            theirs = Placement(len(loads[0]), ranks.count, tuple(map(tuple, slots.tolist())))
            rows.append(
                (
                    _label(ranks),
                    name,
                    f"{balancedness(theirs, loads):.4f}",
                    f"{balancedness(published_greedy(loads, ranks), loads):.4f}",
                    f"{balancedness(place(loads, ranks), loads):.4f}",
                )
            )
    return Figure(
        "vLLM's default policy", ("ranks", "loads", "vLLM", "greedy", "ours"), tuple(rows)
    )


def time_figure(_layers: int) -> Figure:
    """At the size of DeepSeek-V3."""
    rows: list[Row] = []
    for ranks in (Ranks(32, 32), Ranks(32, 32, nodes=4, groups=8), Ranks(72, 32), Ranks(144, 32)):
        for name, loads in (("zipf 1", zipf(1.0, V3_LAYERS)), ("uniform", uniform(V3_LAYERS))):
            seconds = [_seconds(loads, ranks, trials) for trials in (1, TRIALS)]
            rows.append((_label(ranks), name, *(f"{value:.2f}" for value in seconds)))
    return Figure(
        f"CPU seconds on one core, {V3_LAYERS} layers",
        ("ranks", "loads", "1 trial", f"{TRIALS} trials"),
        tuple(rows),
    )


def _seconds(loads: Loads, ranks: Ranks, trials: int) -> float:
    start = time.process_time()
    place(loads, ranks, trials)
    return time.process_time() - start


def _label(ranks: Ranks) -> str:
    return f"{ranks.count}" + (f" on {ranks.nodes} nodes" if ranks.hierarchical else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--vllm", action="store_true", help="also run vLLM's own policy")
    options = parser.parse_args()
    conditions = Conditions.now()
    figures = [balance_figure, time_figure, moves_figure, redundancy_figure]
    if options.vllm:
        figures.append(vllm_figure)
    console = Console(width=140)
    for figure in figures:
        made = figure(options.layers)
        console.print(made.to_rich())
        for note in made.notes:
            console.print(f"  {note}")
    console.print(f"  {conditions.until_now()}")


if __name__ == "__main__":
    main()
