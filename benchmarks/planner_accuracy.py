"""The planner's rates and energies against published ones, and the fit of its efficiencies.

    python -m benchmarks.planner_accuracy                # tables, with the committed efficiencies
    python -m benchmarks.planner_accuracy --fit          # fit them again and print them
    python -m benchmarks.planner_accuracy --write-docs   # into docs/performance.md

Five numbers an era are fitted: the share of bandwidth for plain weights and caches, that for
experts' weights, the share of FLOPs, and a fixed time a layer and a sequence. The fit is the least
sum of squared logs of predicted over published rates, by a pattern search that always ends in the
same place. Two more were chosen once, for both eras, among a few values: that half of an exchange
hides behind the other half of a batch, and the smallest tile. All else comes from elsewhere.
"""

import argparse
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, median
from typing import Any

import yaml
from benchmarks.figures import Figure, show, write_block
from rich.console import Console

from expertmesh.core.domain.accelerator import Accelerator, Era
from expertmesh.core.domain.model_shape import Dtype, ModelShape, Quantisation
from expertmesh.core.perf.efficiency import EFFICIENCIES, Efficiency
from expertmesh.core.perf.energy import DRAWS, watts
from expertmesh.core.perf.fabric import Exchange, Fabric
from expertmesh.core.perf.layout import Layout
from expertmesh.core.perf.memory import memory
from expertmesh.core.perf.rates import Served, decode_rate, mixed_rate, prefill_rate
from expertmesh.core.planner.balance import Balances
from expertmesh.spec.catalog import models
from expertmesh.spec.catalog_hardware import accelerators
from expertmesh.spec.planning import RACK_GPUS_PER_NODE

DATA = Path(__file__).with_name("published_throughput.yaml")
ENERGY_DATA = Path(__file__).with_name("published_energy.yaml")
ENERGY_PROMPT = 150.0
"""Tokens of the chats' prompts."""
DOCUMENT = Path(__file__).parents[1] / "docs/performance.md"
ERAS = (Era.HOPPER, Era.BLACKWELL)
SERIES_WEIGHT = 1.5
MEDIAN_GOAL = 0.15
WORST_GOAL = 0.40

START = (0.7, 0.5, 0.5, 150e-6, 10e-6)
LOWEST = (0.1, 0.1, 0.1, 10e-6, 5e-6)
HIGHEST = (0.9, 0.9, 0.9, 600e-6, 25e-6)
"""Of memory: FlashMLA on H800 reads 90 % of it. A sequence costs the host 5 to 25 µs."""
NAMES = (
    "memory",
    "experts_memory",
    "compute",
    "fixed_s_per_layer",
    "fixed_s_per_sequence",
)
PRIOR_WEIGHT = 0.02
"""Of a parameter's distance from START, in squared logs: it decides only where no row does."""

Constants = tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Row:
    """One published figure, and what to ask the planner for it."""

    number: int | None
    label: str
    era: Era
    served: Served
    phase: str
    load: Mapping[str, float]
    published: float
    fitted: bool
    live: bool
    """A day's mean of a service, which is idle for a part of it."""
    why: str
    series: str
    compare: str
    source: str

    def predicted(self, reached: Efficiency) -> float:
        """Tokens a second per GPU."""
        served = replace(self.served, reached=reached)
        load = self.load
        if self.phase == "prefill":
            rate = prefill_rate(served, load["tokens_per_rank"], load["prompt"]).tokens_per_s
        elif self.phase == "decode":
            rate = decode_rate(served, load["batch_per_rank"], load["context"]).tokens_per_s
        else:
            rate = mixed_rate(
                served, load["batch_per_rank"], load["prompt"], load["output"]
            ).tokens_per_s
        return rate / served.layout.world_size

    def error(self, reached: Efficiency) -> float:
        """Of the prediction, as a share of the published figure."""
        return self.predicted(reached) / self.published - 1


@dataclass(frozen=True, slots=True)
class EnergyRow:
    label: str
    era: Era
    served: Served
    batch_per_rank: float
    context: float
    joules: float
    """Published, of an output token."""
    watts: float | None
    """Published, of a GPU."""
    without: frozenset[str]
    """Series of rates from the same runs."""

    @property
    def drawn(self) -> float | None:
        """Share of TDP."""
        return None if self.watts is None else self.watts / self.served.accelerator.tdp_watts

    def batch(self) -> float:
        """Published is the most that vLLM may run at once; the cache may hold fewer."""
        served = self.served
        length = round(self.context)
        plan = memory(served.shape, served.accelerator, served.layout, context_tokens=2 * length)
        return min(self.batch_per_rank, float(plan.max_sequences(length)))

    def error(self, reached: Efficiency, share: float) -> float:
        """Of the energy predicted from the predicted rate and a share of TDP."""
        served = replace(self.served, reached=reached)
        output = 2 * (self.context - ENERGY_PROMPT)
        rate = mixed_rate(served, self.batch(), ENERGY_PROMPT, output).tokens_per_s
        gpus = served.layout.world_size
        return gpus * watts(served.accelerator, 1.0, share) / rate / self.joules - 1


@dataclass(frozen=True, slots=True)
class Unpredictable:
    number: int
    label: str
    published: float
    why: str


def read_rows(
    shapes: Mapping[str, ModelShape],
    accelerators: Mapping[str, Accelerator],
    data: Path = DATA,
) -> tuple[list[Row], list[Unpredictable]]:
    rows: list[Row] = []
    skipped: list[Unpredictable] = []
    balances = Balances()
    for entry in yaml.safe_load(data.read_text())["rows"]:
        if "unpredictable" in entry:
            skipped.append(
                Unpredictable(
                    entry["row"], entry["label"], entry["published"], entry["unpredictable"]
                )
            )
        else:
            rows.append(_row(entry, shapes, accelerators, balances))
    return rows, skipped


def energy_rows(data: Path = ENERGY_DATA) -> list[EnergyRow]:
    """With the models and GPUs of the catalog."""
    shapes = {name: known.shape for name, known in models().items()}
    balances, known = Balances(), accelerators()
    rows: list[EnergyRow] = []
    for entry in yaml.safe_load(data.read_text())["rows"]:
        shape, accelerator = shapes[entry["model"]], known[entry["accelerator"]]
        layout = Layout(**entry["layout"])
        rows.append(
            EnergyRow(
                label=f"{entry['label']} ({entry['accelerator']})",
                era=accelerator.era,
                served=Served(
                    shape,
                    accelerator,
                    layout,
                    Fabric.of(accelerator, Exchange.ALL_GATHER),
                    skew=_skew(shape, layout, accelerator, balances),
                ),
                batch_per_rank=float(entry["batch_per_rank"]),
                context=float(entry["context"]),
                joules=float(entry["joules"]),
                watts=entry.get("watts"),
                without=frozenset(entry["without"]),
            )
        )
    return rows


@dataclass(frozen=True, slots=True)
class EnergyError:
    row: EnergyRow
    committed: float
    """With the committed efficiencies and draws."""
    row_out: float
    """With a fit of neither this row nor those of the same runs."""


def energy_report(rows: Sequence[Row], energies: Sequence[EnergyRow]) -> list[EnergyError]:
    fits: dict[tuple[Era, frozenset[str]], Efficiency] = {}
    found: list[EnergyError] = []
    for one in energies:
        key = (one.era, one.without)
        if key not in fits:
            rest = [
                row
                for row in rows
                if row.era is one.era and row.fitted and row.series not in one.without
            ]
            fits[key] = as_efficiency(fit(rest))
        draws = [other.drawn for other in energies if other is not one and other.era is one.era]
        found.append(
            EnergyError(
                one,
                one.error(EFFICIENCIES[one.era], DRAWS[one.era].expected),
                one.error(fits[key], mean(draw for draw in draws if draw is not None)),
            )
        )
    return found


def published_rows() -> tuple[list[Row], list[Unpredictable]]:
    """Of the shipped file, with the models and GPUs of the catalog."""
    return read_rows({name: known.shape for name, known in models().items()}, accelerators())


def _row(
    entry: Mapping[str, Any],
    shapes: Mapping[str, ModelShape],
    accelerators: Mapping[str, Accelerator],
    balances: Balances,
) -> Row:
    shape = shapes[entry["model"]]
    if "weights" in entry:
        experts, others = Dtype(entry["weights"]["experts"]), Dtype(entry["weights"]["others"])
        # NVFP4 has a scale byte for 16 elements; FP8 in blocks of 128 by 128 has next to none.
        scale = 1 / 16 if experts is Dtype.FP4 else 0.0
        shape = replace(shape, quantisation=Quantisation(experts, others, scale, 0.0))
    accelerator = accelerators[entry["accelerator"]]
    if "nic_gb_per_s" in entry:
        accelerator = replace(accelerator, nic_bytes_per_s=entry["nic_gb_per_s"] * 1e9)
    if "memory_gb_per_s" in entry:
        accelerator = replace(accelerator, memory_bytes_per_s=entry["memory_gb_per_s"] * 1e9)
    parts = entry["layout"]
    layout = Layout(
        parts.get("tensor", 1),
        parts.get("data", 1),
        parts.get("expert", 1),
        parts.get("redundant", 0),
    )
    drafted = entry.get("drafted", {})
    served = Served(
        shape,
        accelerator,
        layout,
        Fabric.of(accelerator, Exchange(entry.get("exchange", "deep-ep"))),
        kv=Dtype(entry.get("kv", "bf16")),
        overlap=entry.get("overlap", True),
        tokens_per_sequence=drafted.get("tokens_per_sequence", 1),
        accepted_per_step=drafted.get("accepted", 1.0),
        skew=entry.get("skew") or _skew(shape, layout, accelerator, balances),
    )
    names = ("tokens_per_rank", "batch_per_rank", "prompt", "output", "context")
    return Row(
        number=entry.get("row"),
        label=f"{entry['label']} ({entry['accelerator']})",
        era=accelerator.era,
        served=served,
        phase=entry["phase"],
        load={name: float(entry[name]) for name in names if name in entry},
        published=float(entry["published"]),
        fitted=entry.get("fit", True),
        live=entry.get("live", False),
        why=entry.get("why", ""),
        series=entry.get("series", ""),
        compare=entry.get("compare", ""),
        source=entry["source"],
    )


def _skew(shape: ModelShape, layout: Layout, accelerator: Accelerator, balances: Balances) -> float:
    """As the planner has it, for the usual load of experts."""
    gpus_per_node = RACK_GPUS_PER_NODE if accelerator.link_domain > 8 else 8
    found = balances.of(shape, layout, gpus_per_node)
    return 1.0 if found is None else found.skew


def as_efficiency(constants: Constants) -> Efficiency:
    memory, experts_memory, compute, layer_s, sequence_s = constants
    return Efficiency(memory, experts_memory, compute, layer_s, sequence_s, 1.0, 1.0, 0)


def fit(rows: Sequence[Row], start: Constants = START) -> Constants:
    """The five numbers that fit `rows` best."""
    sizes = Counter(row.series for row in rows if row.series)
    weights = [min(1.0, SERIES_WEIGHT / sizes[row.series]) if row.series else 1.0 for row in rows]

    def loss(constants: Constants) -> float:
        reached = as_efficiency(constants)
        squares = sum(
            weight * math.log(row.predicted(reached) / row.published) ** 2
            for row, weight in zip(rows, weights, strict=True)
        )
        drift = sum(math.log(c / s) ** 2 for c, s in zip(constants, START, strict=True))
        return squares + PRIOR_WEIGHT * drift

    return _pattern_search(loss, start)


def _pattern_search(loss: Callable[[Constants], float], start: Constants) -> Constants:
    best, least, step = list(start), loss(start), 1.3
    while step > 1.005:
        improved = False
        for place in range(len(best)):
            for factor in (step, 1 / step):
                trial = list(best)
                trial[place] = min(HIGHEST[place], max(LOWEST[place], best[place] * factor))
                value = loss(tuple(trial))
                if value < least - 1e-9:
                    best, least, improved = trial, value, True
        if not improved:
            step = math.sqrt(step)
    return tuple(best)


def with_range(
    constants: Constants, rows: Sequence[Row], held_out: Mapping[str, float]
) -> Efficiency:
    """With the range in which four of five rows lie when they are left out of the fit."""
    low, high = _range(rows, held_out)
    memory, experts_memory, compute, layer_s, sequence_s = constants
    return Efficiency(
        round(memory, 3),
        round(experts_memory, 3),
        round(compute, 3),
        round(layer_s, 6),
        round(sequence_s, 7),
        low,
        high,
        len(rows),
    )


def _range(rows: Sequence[Row], errors: Mapping[str, float]) -> tuple[float, float]:
    """Published over predicted rate of the tenth and the ninetieth of a hundred rows."""
    ratios = sorted(1 / (1 + errors[row.label]) for row in rows)
    return (
        round(min(1.0, _quantile(ratios, 0.1)), 2),
        round(max(1.0, _quantile(ratios, 0.9)), 2),
    )


def _quantile(ordered: Sequence[float], share: float) -> float:
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


@dataclass(frozen=True, slots=True)
class Report:
    rows: Sequence[Row]
    committed: Mapping[str, float]
    """Error of each row with the committed efficiencies."""
    without_row: Mapping[str, float]
    without_era: Mapping[str, float]
    fitted: Mapping[Era, Efficiency]


def report(rows: Sequence[Row]) -> Report:
    without_row: dict[str, float] = {}
    without_era: dict[str, float] = {}
    fitted: dict[Era, Efficiency] = {}
    for era in ERAS:
        own = [row for row in rows if row.era is era and row.fitted]
        constants = fit(own)
        others = as_efficiency(fit([row for row in rows if row.era is not era and row.fitted]))
        for row in rows:
            if row.era is not era:
                continue
            rest = [other for other in own if other is not row]
            if row.fitted:
                without_row[row.label] = row.error(as_efficiency(fit(rest, constants)))
            else:
                without_row[row.label] = row.error(as_efficiency(constants))
            without_era[row.label] = row.error(others)
        fitted[era] = with_range(constants, own, without_row)
    committed = {row.label: row.error(EFFICIENCIES[row.era]) for row in rows}
    return Report(rows, committed, without_row, without_era, fitted)


def wrong_orders(rows: Sequence[Row], reached: Mapping[Era, Efficiency]) -> list[str]:
    """Choices between rows measured side by side in which the planner would pick another one."""
    wrong = []
    for name in sorted({row.compare for row in rows if row.compare}):
        rivals = [row for row in rows if row.compare == name]
        best = max(rivals, key=lambda row: row.published)
        chosen = max(rivals, key=lambda row: row.predicted(reached[row.era]))
        if chosen is not best:
            wrong.append(f"{name}: {chosen.label} instead of {best.label}")
    return wrong


def rates_figure(found: Report, skipped: Sequence[Unpredictable]) -> Figure:
    rows = [
        (
            row.label,
            f"{row.number or ''}",
            f"{row.published:,.0f}",
            f"{row.published * (1 + found.committed[row.label]):,.0f}",
            *(
                f"{errors[row.label]:+.0%}"
                for errors in (found.committed, found.without_row, found.without_era)
            ),
            "live" if row.live else "" if row.fitted else "not fitted",
        )
        for row in found.rows
    ]
    notes = [f"{row.label} is not fitted: {row.why}" for row in found.rows if row.why]
    notes += [
        f"row {one.number}, {one.label}, {one.published:,.0f}: not predicted, {one.why}"
        for one in skipped
    ]
    return Figure(
        "Rates: output or prompt tokens/s of a GPU",
        ("", "row", "published", "predicted", "error", "row out", "era out", "class"),
        tuple(rows),
        tuple(notes),
    )


def errors_figure(found: Report) -> Figure:
    tabled = [row for row in found.rows if row.number is not None]
    rows: list[tuple[str, ...]] = []
    for title, among in (("rows of the paper table", tabled), ("all rows", found.rows)):
        for name, errors in (
            ("fitted", found.committed),
            ("row left out", found.without_row),
            ("era left out", found.without_era),
        ):
            sizes = sorted(abs(errors[row.label]) for row in among if row.fitted)
            rows.append((f"{title}, {name}", *_summary(sizes)))
    steady = sorted(abs(found.committed[row.label]) for row in tabled if not row.live)
    rows.append(("rows of the paper table at full load, fitted or not", *_summary(steady)))
    wrong = wrong_orders(found.rows, EFFICIENCIES)
    live = [row for row in found.rows if row.live]
    notes = [
        f"goal, fitted rows of the table: median within {MEDIAN_GOAL:.0%} and worst within "
        f"{WORST_GOAL:.0%}: {_met(_reached(found, [row for row in tabled if row.fitted]))}",
        "goal, all rows of the table at full load: "
        f"{_met(_reached(found, [row for row in tabled if not row.live]))}",
        "goal, the right side of EP or not: " + "; ".join([_met(not wrong), *wrong]),
    ]
    notes += [
        f"{row.label}: busy for {1 / (1 + found.committed[row.label]):.0%} of the day, if the "
        "prediction is right"
        for row in live
    ]
    return Figure(
        "Errors of rates", ("", "rows", "median", "worst", "above 40 %"), tuple(rows), tuple(notes)
    )


def _summary(sizes: Sequence[float]) -> tuple[str, ...]:
    above = sum(size > WORST_GOAL for size in sizes)
    return (f"{len(sizes)}", f"{median(sizes):.0%}", f"{max(sizes):.0%}", f"{above}")


def _reached(found: Report, rows: Sequence[Row]) -> bool:
    sizes = [abs(found.committed[row.label]) for row in rows]
    return median(sizes) <= MEDIAN_GOAL and max(sizes) <= WORST_GOAL


def energy_figure(errors: Sequence[EnergyError]) -> Figure:
    rows = [
        (
            one.row.label,
            "" if one.row.watts is None else f"{one.row.watts:,.0f}",
            f"{DRAWS[one.row.era].expected * one.row.served.accelerator.tdp_watts:,.0f}",
            f"{one.row.joules:.3g}",
            f"{one.row.joules * (1 + one.committed):.3g}",
            f"{one.committed:+.0%}",
            f"{one.row_out:+.0%}",
        )
        for one in errors
    ]
    notes = []
    for name, sizes in (
        ("fitted", [abs(one.committed) for one in errors]),
        ("row left out", [abs(one.row_out) for one in errors]),
    ):
        notes.append(f"{name}: median {median(sizes):.0%}, worst {max(sizes):.0%}")
    return Figure(
        "Energy of an output token, from the predicted rate and the usual draw",
        ("", "W", "W predicted", "J", "J predicted", "error", "row out"),
        tuple(rows),
        tuple(notes),
    )


def _met(is_met: bool) -> str:
    return "met" if is_met else "MISSED"


def print_efficiencies(report: Report) -> None:
    for era, found in report.fitted.items():
        print(f"    Era.{era.name}: Efficiency(")
        print(f"        memory={found.memory},")
        print(f"        experts_memory={found.experts_memory},")
        print(f"        compute={found.compute},")
        print(f"        fixed_s_per_layer={found.fixed_s_per_layer * 1e6:.0f}e-6,")
        print(f"        fixed_s_per_sequence={found.fixed_s_per_sequence * 1e6:.1f}e-6,")
        print(f"        rate_low={found.rate_low},")
        print(f"        rate_high={found.rate_high},")
        print(f"        rows={found.rows},")
        print("    ),")
        for name, low, high in zip(NAMES, LOWEST, HIGHEST, strict=True):
            if getattr(found, name) in (low, high):
                print(f"    # {name} is at its bound")
    rows = [row for row in report.rows if row.fitted]
    low, high = _range(rows, report.without_era)
    print(f"BORROWED_RATE_LOW = {low}")
    print(f"BORROWED_RATE_HIGH = {high}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fit", action="store_true", help="fit again and print the constants")
    parser.add_argument("--write-docs", action="store_true", help=f"write {DOCUMENT.name}")
    options = parser.parse_args()
    rows, skipped = published_rows()
    found = report(rows)
    figures = [
        errors_figure(found),
        rates_figure(found, skipped),
        energy_figure(energy_report(rows, energy_rows())),
    ]
    show(Console(width=140), figures)
    if options.fit:
        print_efficiencies(found)
    if options.write_docs:
        write_block(DOCUMENT, "planner-accuracy", figures)


if __name__ == "__main__":
    main()
