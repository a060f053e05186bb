"""Tables of what came out."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from benchmarks.autoscaling_bench.cases import Case, Situation
from benchmarks.autoscaling_bench.grids import Candidate
from benchmarks.autoscaling_bench.tuning import GOAL
from benchmarks.figures import Figure

from expertmesh.simulator.outcome import Outcome

LEVELS = (0.95, 0.98, 0.99, 0.995, 0.999)


@dataclass(frozen=True, slots=True)
class Measured:
    """One policy on one part, a run for each seed."""

    candidate: Candidate
    tuned: bool
    situations: tuple[Situation, ...]
    outcomes: tuple[Outcome, ...]

    @property
    def label(self) -> str:
        return f"{self.candidate.name}, {'tuned' if self.tuned else 'as published'}"

    @property
    def times_oracle(self) -> tuple[float, ...]:
        pairs = zip(self.situations, self.outcomes, strict=True)
        return tuple(outcome.usd / situation.oracle.usd for situation, outcome in pairs)

    @property
    def times_static(self) -> tuple[float, ...]:
        pairs = zip(self.situations, self.outcomes, strict=True)
        return tuple(outcome.usd / situation.static_usd for situation, outcome in pairs)

    @property
    def attained(self) -> tuple[float, ...]:
        return tuple(outcome.attainment.both for outcome in self.outcomes)


def policies_table(case: Case, part: str, measured: Sequence[Measured], mode: str) -> Figure:
    """Those that attain the goal first, by cost."""
    ordered = sorted(
        measured,
        key=lambda m: (
            median(m.attained) < GOAL,
            median(m.times_oracle) if median(m.attained) >= GOAL else -median(m.attained),
        ),
    )
    first = measured[0].situations
    usd = _spread([s.oracle.usd for s in first], "{:,.0f}")
    static = _spread([s.static_usd / s.oracle.usd for s in first], "{:.2f}")
    seeds = len(first)
    return Figure(
        f"{case.title}: {part}, {mode} mode",
        (
            "policy",
            "x oracle",
            "x static",
            "attained %",
            "TTFT %",
            "TPOT %",
            "worst 10 min %",
            "$/Mtok out",
            "starts",
            "wasted %",
            "over gh",
            "under gh",
        ),
        tuple(
            (
                m.label,
                _spread(m.times_oracle, "{:.2f}"),
                f"{median(m.times_static):.2f}",
                _spread([100 * a for a in m.attained], "{:.2f}"),
                _middle(m, lambda o: 100 * o.attainment.ttft, "{:.2f}"),
                _middle(m, lambda o: 100 * o.attainment.tpot, "{:.2f}"),
                _spread([100 * o.worst_10min.both for o in m.outcomes], "{:.0f}"),
                _middle(m, lambda o: o.usd_per_mtok_out, "{:.2f}"),
                _middle(m, lambda o: o.counts.starts, "{:,.0f}"),
                _middle(m, lambda o: 100 * o.wasted_share, "{:.0f}"),
                _middle(m, lambda o: o.over_group_hours, "{:.1f}"),
                _middle(m, lambda o: o.under_group_hours, "{:.1f}"),
            )
            for m in ordered
        ),
        (
            f"The oracle pays {usd} $. Static is the cheapest number of groups of one size on "
            f"demand that always suffices, known afterwards: {static} times the oracle.",
            f"{_seeds(seeds)}gh are group-hours above and below the load.",
        ),
    )


def _seeds(count: int) -> str:
    if count == 1:
        return "One seed; "
    return f"Medians of {count} seeds, with the smallest and largest beside some; "


def parameters_table(case: Case, tuned: Mapping[str, Candidate]) -> Figure:
    return Figure(
        f"{case.title}: what was chosen on the part for tuning",
        ("policy", "parameters"),
        tuple((name, candidate.parameters or "-") for name, candidate in tuned.items()),
    )


def front_table(case: Case, fronts: Mapping[str, Sequence[tuple[float, float]]]) -> Figure:
    """`fronts`: by policy, times the oracle's cost and attainment."""
    rows = []
    for name, points in fronts.items():
        cells = []
        for level in LEVELS:
            enough = [cost for cost, attained in points if attained >= level]
            cells.append(f"{min(enough):.2f}" if enough else "-")
        rows.append((name, *cells))
    return Figure(
        f"{case.title}: x oracle for an attainment of",
        ("policy", *(f"{100 * level:g} %" for level in LEVELS)),
        tuple(sorted(rows, key=lambda row: _order(row[1 + LEVELS.index(GOAL)]))),
        ("One seed, on the reported part; the parameters are the front of the part for tuning.",),
    )


def _order(cell: str) -> float:
    return float("inf") if cell == "-" else float(cell)


def _middle(measured: Measured, value: Callable[[Outcome], float], shown: str) -> str:
    return shown.format(median(value(outcome) for outcome in measured.outcomes))


def _spread(values: Sequence[float], shown: str) -> str:
    middle, low, high = (shown.format(f(values)) for f in (median, min, max))
    return middle if low == high else f"{middle} ({low} to {high})"
