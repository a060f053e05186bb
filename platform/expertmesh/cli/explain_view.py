"""An explanation as a sentence and tables, for 80 columns and for pipes."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from expertmesh.cli.times import shown
from expertmesh.core.domain.deployment import ScalingMode
from expertmesh.core.scaling.calibration import Calibration, Quantiles
from expertmesh.core.scaling.candidates import Candidate
from expertmesh.core.scaling.contract import Action, Load
from expertmesh.core.scaling.explanation import Explanation
from expertmesh.core.scaling.outcome import Expected, Happened, Start
from expertmesh.core.scaling.replay import DecisionRecord
from expertmesh.store.journal import JournalEntry

_MOST_CANDIDATES = 9
"""In the table, beside the chosen one."""


def one_line(entry: JournalEntry) -> str:
    reason = entry.payload.get("decision", {}).get("reason", "written by another version")
    return f"{entry.seq}  {shown(entry.at_s)}  {entry.model}: {reason}"


def render(seq: int, told: Explanation) -> RenderableType:
    parts: list[RenderableType] = [
        Text(f"{told.model}: {told.sentence}", style="bold"),
        Text(f"decision {seq}, {shown(told.now_s)} UTC, mode {told.mode}"),
    ]
    if not told.replays:
        parts.append(
            Text(
                "This version decides otherwise: candidates and conditions are its own.",
                style="yellow",
            )
        )
    parts += [_head("did"), *_done(told)]
    parts += [_head("saw"), *_work(told), _inputs(told)]
    over = f"costs over {told.horizon_s / 60:.0f} min, $ more than the chosen"
    parts += [_head(f"candidates ({over})"), _candidates(told)]
    parts += [_head("bound by"), Text(f"  {told.binding_words}")]
    if told.pending:
        parts.append(Text(f"  {told.pending}"))
    if told.counterfactuals:
        parts.append(_head("would have changed it"))
        parts += [_item(each.text) for each in told.counterfactuals]
        tip = next((e.flips for e in told.counterfactuals if e.flips is not None), None)
        if tip is not None:
            parts.append(Text(f"  see it: expertmesh explain {seq} --what-if {tip}", style="dim"))
    parts += [_head("expected"), _item(_expected(told.expected))]
    parts += [_item(_start(start)) for start in told.expected.starts]
    if told.happened is not None:
        parts += [_head("happened"), *_happened(told.happened)]
    return Group(*parts)


def render_changed(
    seq: int,
    settings: Sequence[str],
    decided: tuple[DecisionRecord, Explanation],
    changed: tuple[DecisionRecord, Explanation],
) -> RenderableType:
    """Both decisions side by side."""
    (_, one), (_, other) = decided, changed
    same = one.candidates[0].groups == other.candidates[0].groups
    same = same and [_act(a) for a in _acts(one)] == [_act(a) for a in _acts(other)]
    what = " ".join(settings)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    table.add_column(f"decision {seq}", overflow="fold", ratio=1)
    table.add_column(f"with {what}", overflow="fold", ratio=1)
    rows = [
        (name, left, right)
        for (name, left), (_, right) in zip(_facts(one), _facts(other), strict=True)
    ]
    for name, left, right in rows:
        table.add_row(name, left, right, style="" if left == right else "bold")
    verdict = "nothing else would be done" if same else "it would be decided otherwise"
    return Group(Text(f"{one.model}: with {what} {verdict}", style="bold"), table)


def _facts(told: Explanation) -> list[tuple[str, str]]:
    chosen, load, demand = told.candidates[0], told.load, told.demand
    return [
        ("queued", f"{demand.queued}"),
        ("running", f"{demand.running}"),
        ("load", f"{load.now:.2f} now, {load.expected:.2f} expected, {load.needed:.2f} needed"),
        ("groups", _mix(chosen.groups)),
        ("$/h", f"{chosen.usd_per_hour:.2f}"),
        ("wait", f"{_wait(chosen.wait_now_s)} now, {_wait(chosen.wait_then_s)} then"),
        ("does", "\n".join(_act(action) for action in _acts(told)) or "nothing"),
        ("bound by", told.binding_words),
        ("missing", told.pending or "-"),
        ("reason", told.sentence),
    ]


def render_calibration(found: Sequence[Calibration]) -> RenderableType:
    parts: list[RenderableType] = []
    for each in found:
        hours = each.span_s / 3600
        parts.append(
            Text(f"{each.model}: {each.decisions} decisions over {hours:.1f} h", style="bold")
        )
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table.add_column("what", overflow="fold")
        for header in ("seen", "expected", "p10", "p50", "p90"):
            table.add_column(header, justify="right", no_wrap=True)
        table.add_column("", overflow="fold")
        for start in each.starts:
            note = f"{start.failed} failed, {start.given_up} given up"
            table.add_row(
                f"start of {start.option}, s",
                *_quantiles(start.took_s, f"{start.expected_s:.0f}", 0),
                note,
            )
        within = ""
        if each.within_spare is not None:
            within = f"{each.within_spare:.1%} within the spare (wanted {each.attainment:.1%})"
        table.add_row("load less forecast, groups", *_quantiles(each.load_error, "0", 2), within)
        table.add_row("wait less predicted, s", *_quantiles(each.wait_error_s, "0", 1), "")
        parts.append(table)
    return Group(*parts)


def _quantiles(found: Quantiles | None, expected: str, digits: int) -> tuple[str, ...]:
    if found is None:
        return ("0", "-", "-", "-", "-")
    values = (f"{value:.{digits}f}" for value in (found.p10, found.p50, found.p90))
    return (f"{found.count}", expected, *values)


# Parts


def _head(text: str) -> Text:
    return Text(f"\n{text}", style="bold cyan")


def _item(text: str) -> RenderableType:
    table = Table.grid(padding=(0, 1, 0, 0))
    table.add_column(width=1)
    table.add_column(overflow="fold")
    table.add_row("", Text(f"- {text}"))
    return table


def _acts(told: Explanation) -> tuple[Action, ...]:
    return told.actions or told.advice


def _act(action: Action) -> str:
    return f"{action.kind} {action.group}"


def _done(told: Explanation) -> list[RenderableType]:
    if told.actions:
        return [_item(f"{_act(action)}: {action.why}") for action in told.actions]
    if told.advice:
        would = [_item(f"would {_act(action)}: {action.why}") for action in told.advice]
        return [_item("nothing, since it only advises"), *would]
    if told.mode is ScalingMode.OBSERVE:
        return [_item("nothing, since it only observes")]
    return [_item("nothing")]


def _work(told: Explanation) -> list[RenderableType]:
    demand, load = told.demand, told.load
    lines = [
        f"{demand.work} requests: {demand.queued} queued (oldest waits "
        f"{demand.oldest_wait_s:.1f} s), {demand.running} running",
        _load(load),
        f"{told.need} groups needed, {told.wanted} wanted",
    ]
    return [_item(line) for line in lines]


def _load(load: Load) -> str:
    text = f"load in groups: {load.now:.2f} now"
    if load.by_tokens:
        text += f", {load.expected:.2f} expected, {load.spare:.2f} in hand"
    text += f", {load.needed:.2f} needed"
    if load.held > load.needed:
        text += f" ({load.held:.2f} in the last while)"
    return f"{text}; {load.ready:.2f} ready, {load.coming:.2f} on the way"


def _inputs(told: Explanation) -> RenderableType:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("from", overflow="fold")
    table.add_column("age", justify="right", no_wrap=True)
    table.add_column("says", overflow="fold")
    for each in told.inputs:
        age = "-" if each.age_s is None else f"{each.age_s:.1f} s"
        style = "" if each.is_believed else "yellow"
        table.add_row(each.source, age, each.says, style=style)
    return table


def _candidates(told: Explanation) -> RenderableType:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("groups", overflow="fold", min_width=16)
    for header in ("$/h", "carries", "wait", "then", "$ more"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("why", min_width=20)
    chosen, *others = told.candidates
    labels = _labels({name for each in told.candidates for name in each.groups})
    for each in (chosen, *others[:_MOST_CANDIDATES]):
        table.add_row(
            _groups(each, chosen, labels),
            f"{each.usd_per_hour:.2f}",
            f"{each.capacity:.2f}",
            _wait(each.wait_now_s),
            _wait(each.wait_then_s),
            "" if each.is_chosen else f"{each.more_usd:.2f}",
            each.why,
            style="bold" if each.is_chosen else "",
        )
    left_out = len(others) - _MOST_CANDIDATES
    if left_out <= 0:
        return table
    return Group(table, Text(f"  and {left_out} dearer ones: --json has them", style="dim"))


def _labels(options: Iterable[str]) -> dict[str, str]:
    """`h200-od x16` is `h200-od/t1d16e16`, unless that could be another option too."""
    labels = {}
    for name in options:
        pool, _, sizes = name.rpartition("/")
        found = re.fullmatch(r"t(\d+)d(\d+)e\d+", sizes)
        labels[name] = f"{pool} x{int(found[1]) * int(found[2])}" if found else name
    seen = Counter(labels.values())
    return {name: label if seen[label] == 1 else name for name, label in labels.items()}


def _groups(candidate: Candidate, chosen: Candidate, labels: Mapping[str, str]) -> str:
    """The chosen ones in full, of the others what is different."""
    if candidate.name == "provider":
        return "a provider"
    if candidate.is_chosen or not candidate.groups:
        return _mix({labels[name]: n for name, n in candidate.groups.items()})
    names = [*candidate.groups, *(name for name in chosen.groups if name not in candidate.groups)]
    changes = ((name, candidate.groups.get(name, 0) - chosen.groups.get(name, 0)) for name in names)
    return "\n".join(f"{n:+d} {labels[name]}" for name, n in changes if n) or "the same"


def _mix(groups: Mapping[str, int]) -> str:
    return "\n".join(f"{n} {name}" for name, n in groups.items()) or "none"


def _wait(wait_s: float | None) -> str:
    """`-`: the queue grows, or nothing is known."""
    if wait_s is None:
        return "-"
    return f"{wait_s:.1f} s" if wait_s < 99.5 else f"{wait_s / 60:.0f} min"


def _expected(expected: Expected) -> str:
    if expected.by_tokens:
        load = (
            f"a load of {expected.load:.2f} groups in {expected.horizon_s:.0f} s, "
            f"{expected.spare:.2f} in hand"
        )
    else:
        load = f"a load of {expected.load:.2f} groups, as now"
    wait = "a queue that grows until groups are ready"
    if expected.wait_s is not None:
        wait = f"a wait of {expected.wait_s:.1f} s"
    return f"{load}; {wait}; ${expected.usd_per_hour:.2f}/h"


def _start(start: Start) -> str:
    at = "" if start.ready_in_s is None else f" in {start.ready_in_s:.0f} s"
    return f"{start.group} ready{at}, ${start.usd_per_hour:.2f}/h"


def _happened(found: Happened) -> list[RenderableType]:
    lines = []
    for start in found.starts:
        after = "" if start.ready_in_s is None else f" after {start.ready_in_s:.0f} s"
        lines.append(f"{start.group}: {start.fate}{after}")
    if found.load is not None and found.load_error is not None:
        lines.append(
            f"a load of {found.load:.2f} groups then, {found.load_error:+.2f} to the forecast"
        )
    cost = "" if found.usd_per_hour is None else f"; ${found.usd_per_hour:.2f}/h then"
    lines.append(f"the oldest wait was {found.most_wait_s:.1f} s{cost}")
    return [_item(line) for line in lines]
