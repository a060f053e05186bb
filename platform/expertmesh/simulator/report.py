"""Several outcomes side by side, and against the least that the same load could have cost."""

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table

from expertmesh.simulator.oracle import Least
from expertmesh.simulator.outcome import Outcome, as_json

_HEADERS = (
    "cost $", "x oracle", "$/Mtok out", "attained", "worst 10 min", "refused", "cut", "starts",
    "wasted", "failed", "lost", "over h", "under h", "over budget",
)  # fmt: skip


def comparison(outcomes: Sequence[Outcome], oracle: Least | None, title: str = "") -> Table:
    """By cost. `attained` is the share of requests that met both targets, `over h` and `under h`
    are hours of groups too many and too few, `over budget` is a time."""
    table = Table(
        title=title or None,
        caption=f"oracle: the least cost {oracle.bound}" if oracle else None,
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("policy", overflow="fold")
    for header in _HEADERS:
        table.add_column(header, justify="right")
    for row in rows(outcomes, oracle):
        table.add_row(*row)
    return table


def rows(outcomes: Sequence[Outcome], oracle: Least | None) -> list[tuple[str, ...]]:
    """The table's; what does not apply is empty."""
    first = []
    if oracle is not None:
        first = [("oracle", f"{oracle.usd:,.0f}", "1.00", *[""] * (len(_HEADERS) - 2))]
    return first + [_row(outcome, oracle) for outcome in _by_cost(outcomes)]


def headers() -> tuple[str, ...]:
    return ("policy", *_HEADERS)


def comparison_json(outcomes: Sequence[Outcome], oracle: Least | None) -> dict[str, Any]:
    return {
        "oracle": None
        if oracle is None
        else {"usd": oracle.usd, "bound": oracle.bound, "missed_share": oracle.missed_share},
        "policies": [
            {**as_json(outcome), "times_oracle": _times(outcome, oracle)}
            for outcome in _by_cost(outcomes)
        ],
    }


def _by_cost(outcomes: Sequence[Outcome]) -> list[Outcome]:
    return sorted(outcomes, key=lambda outcome: (outcome.usd, outcome.policy))


def _times(outcome: Outcome, oracle: Least | None) -> float | None:
    return outcome.usd / oracle.usd if oracle is not None and oracle.usd > 0 else None


def _row(outcome: Outcome, oracle: Least | None) -> tuple[str, ...]:
    times, counts = _times(outcome, oracle), outcome.counts
    return (
        outcome.policy,
        f"{outcome.usd:,.0f}",
        "" if times is None else f"{times:.2f}",
        f"{outcome.usd_per_mtok_out:.2f}" if outcome.output_tokens > 0 else "",
        f"{outcome.attainment.both:.2%}",
        f"{outcome.worst_10min.both:.1%}",
        f"{outcome.refused:,.0f}",
        f"{outcome.cut:,.0f}",
        f"{counts.starts:,}",
        f"{outcome.wasted_share:.0%}" if counts.starts else "",
        f"{counts.failed_starts:,}",
        f"{counts.lost:,}",
        f"{outcome.over_group_hours:,.1f}",
        f"{outcome.under_group_hours:,.1f}",
        _duration(outcome.over_budget_s),
    )


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"
