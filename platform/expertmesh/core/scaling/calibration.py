"""How well what decisions expected came true, over the records of a journal."""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from expertmesh.core.scaling.outcome import Start, expected, happened
from expertmesh.core.scaling.replay import DecisionRecord

_SLACK_S = 90.0
"""The journal has an entry at least every minute: what is further away is another moment."""
_LEAST_S = 25.0
"""Between two forecasts that are looked at: errors of the same moment are one error."""


@dataclass(frozen=True, slots=True)
class Quantiles:
    count: int
    p10: float
    p50: float
    p90: float


@dataclass(frozen=True, slots=True)
class StartsSeen:
    option: str
    expected_s: float
    """Mean of what was expected of those that became ready."""
    took_s: Quantiles | None
    """None: none became ready."""
    failed: int
    given_up: int


@dataclass(frozen=True, slots=True)
class Calibration:
    model: str
    decisions: int
    span_s: float
    starts: tuple[StartsSeen, ...]
    load_error: Quantiles | None
    """Load at the end of the horizon less the expected one, in units of a group; None: nothing was
    forecast."""
    within_spare: float | None
    """Share of these loads that the expected one and its spare carried; to be compared with the
    attainment that is asked for."""
    attainment: float
    wait_error_s: Quantiles | None
    """Oldest wait that was seen less the predicted one, where a wait was predicted."""


def calibrate(records: Iterable[DecisionRecord]) -> tuple[Calibration, ...]:
    """By model; records in their order, of any models."""
    models: dict[str, list[DecisionRecord]] = {}
    for record in records:
        models.setdefault(record.decision.model, []).append(record)
    return tuple(_of_model(model, models[model]) for model in sorted(models))


def _of_model(model: str, records: list[DecisionRecord]) -> Calibration:
    times = [record.now_s for record in records]
    errors: list[float] = []
    within = 0
    waits: list[float] = []
    last_s = float("-inf")
    for index, record in enumerate(records):
        load = record.decision.load
        if 0 < load.wait_s < _SLACK_S * 10:
            seen = _at(records, times, record.now_s + load.wait_s, index)
            if seen is not None:
                waits.append(seen.decision.demand.oldest_wait_s - load.wait_s)
        if not load.by_tokens or record.now_s - last_s < _LEAST_S:
            continue
        then = _at(records, times, record.now_s + expected(record).horizon_s, index)
        if then is None or not then.decision.load.by_tokens:
            continue
        last_s = record.now_s
        errors.append(then.decision.load.now - load.expected)
        within += then.decision.load.now <= load.expected + load.spare + 1e-9
    return Calibration(
        model=model,
        decisions=len(records),
        span_s=times[-1] - times[0],
        starts=_starts(records),
        load_error=quantiles(errors),
        within_spare=within / len(errors) if errors else None,
        attainment=records[-1].config.slo.attainment,
        wait_error_s=quantiles(waits),
    )


def _at(
    records: list[DecisionRecord], times: list[float], at_s: float, after: int
) -> DecisionRecord | None:
    """The last record until then; None when it is too old, or the records end before."""
    found = bisect_right(times, at_s) - 1
    if found <= after or (found == len(times) - 1 and times[found] < at_s):
        return None
    return records[found] if at_s - times[found] <= _SLACK_S else None


def _starts(records: list[DecisionRecord]) -> tuple[StartsSeen, ...]:
    pairs: dict[str, list[tuple[Start, Start]]] = {}
    for index, record in enumerate(records):
        if not any(action.kind == "start" for action in record.decision.actions):
            continue
        after = happened(record, records[index + 1 :])
        if after is None:
            continue
        for planned, seen in zip(expected(record).starts, after.starts, strict=True):
            pairs.setdefault(planned.option, []).append((planned, seen))
    found = []
    for option, starts in sorted(pairs.items()):
        ready = [(p, s) for p, s in starts if s.ready_in_s is not None]
        planned_s = [p.ready_in_s for p, _ in ready if p.ready_in_s is not None]
        found.append(
            StartsSeen(
                option=option,
                expected_s=sum(planned_s) / len(planned_s) if planned_s else 0.0,
                took_s=quantiles([s.ready_in_s for _, s in ready if s.ready_in_s is not None]),
                failed=sum(s.fate == "failed" for _, s in starts),
                given_up=sum(s.fate == "given up" for _, s in starts),
            )
        )
    return tuple(found)


def quantiles(values: Sequence[float]) -> Quantiles | None:
    """By the nearest rank."""
    if not values:
        return None
    ordered = sorted(values)

    def at(share: float) -> float:
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    return Quantiles(len(ordered), at(0.1), at(0.5), at(0.9))
