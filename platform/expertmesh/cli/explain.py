"""`expertmesh explain`: what the controller decided, in words and numbers."""

from typing import Annotated

import msgspec
import typer

from expertmesh.cli.store import StoreOption, with_store
from expertmesh.cli.times import shown
from expertmesh.core.scaling.contract import GroupRecord
from expertmesh.core.scaling.replay import DecisionRecord, read_record
from expertmesh.store.database import Database
from expertmesh.store.journal import Journal, JournalEntry

_DECISION = "decision"


def explain(
    decision_id: Annotated[
        int | None,
        typer.Argument(metavar="[ID]", min=1, help="A decision's number. Default: the last ones."),
    ] = None,
    last: Annotated[int, typer.Option(min=1, max=1000, help="How many, without an ID.")] = 10,
    model: Annotated[str | None, typer.Option(help="Decisions about this model only.")] = None,
    store: StoreOption = None,
) -> None:
    """Print the controller's last decisions, or one of them with all that it rests on."""

    async def read(database: Database) -> tuple[JournalEntry, ...]:
        journal = Journal(database)
        if decision_id is not None:
            found = await journal.read(after=decision_id - 1, limit=1)
            return tuple(entry for entry in found if entry.seq == decision_id)
        return await journal.read(limit=last, model=model, newest=True)

    entries = [entry for entry in with_store(store, False, read) if entry.kind == _DECISION]
    if not entries:
        what = "no decisions yet" if decision_id is None else f"{decision_id}: no such decision"
        typer.echo(f"error: {what}; see `expertmesh explain` for the last ones", err=True)
        raise typer.Exit(1)
    for entry in entries:
        if decision_id is None:
            typer.echo(one_line(entry))
        else:
            typer.echo("\n".join(in_full(entry)))


def one_line(entry: JournalEntry) -> str:
    reason = entry.payload.get("decision", {}).get("reason", "written by another version")
    return f"{entry.seq}  {shown(entry.at_s)}  {entry.model}: {reason}"


def in_full(entry: JournalEntry) -> list[str]:
    try:
        record = read_record(entry.payload)
    except msgspec.ValidationError:
        # Written by another version: its own words are still good.
        return [one_line(entry)]
    return [one_line(entry), *_demand(record), *_groups(record), *_pools(record), *_rules(record)]


def _demand(record: DecisionRecord) -> list[str]:
    demand = record.decision.demand
    age = "no report" if demand.oldest_report_s is None else f"{demand.oldest_report_s:.1f} s old"
    lines = [
        f"  work      {demand.work} requests: {demand.queued} queued (oldest waits "
        f"{demand.oldest_wait_s:.1f} s), {demand.running} running",
        f"  reports   {demand.live_gateways} live gateway workers, {demand.stale_gateways} silent; "
        f"{age}",
        f"  groups    {record.decision.need} needed, {record.decision.state.wanted} wanted "
        f"(before: {record.before.wanted})",
    ]
    if record.decision.pending:
        lines.append(f"  missing   {record.decision.pending}")
    return lines


def _groups(record: DecisionRecord) -> list[str]:
    lines = [
        f"  action    {action.kind.value} {action.group}: {action.why}"
        for action in record.decision.actions
    ]
    lines += [
        f"  change    {step.group}: {step.before.value if step.before else 'new'} -> "
        f"{step.after.value}{f': {step.why}' if step.why else ''}"
        for step in record.decision.transitions
    ]
    return lines + [_group(group, record.now_s) for group in record.decision.state.groups]


def _group(group: GroupRecord, now_s: float) -> str:
    note = f", {group.message}" if group.message else ""
    return (
        f"  group     {group.spec.name}: {group.state.value} for {now_s - group.since_s:.1f} s, "
        f"${group.spec.usd_per_hour:.2f}/h in pool {group.spec.pool}{note}"
    )


def _pools(record: DecisionRecord) -> list[str]:
    lines = []
    for pool in record.observation.pools:
        live = "unknown" if pool.live_workers is None else str(pool.live_workers)
        lines.append(
            f"  pool      {pool.name}: {live} workers on live nodes, "
            f"{pool.used_elsewhere} used by other models"
        )
    lines += [
        f"  back-off  pool {pool}: {backoff.failures} failed starts, left alone for "
        f"{max(0.0, backoff.until_s - record.now_s):.0f} s"
        for pool, backoff in sorted(record.decision.state.backoff.items())
    ]
    return lines


def _rules(record: DecisionRecord) -> list[str]:
    rules = record.config.rules
    budget = "no budget"
    if rules.usd_per_hour_budget is not None:
        budget = f"budget ${rules.usd_per_hour_budget:.2f}/h"
    return [
        f"  rules     {rules.min_groups} to {rules.max_groups} groups, "
        f"{rules.target_in_flight_per_group:g} requests each, up after {rules.up_delay_s:g} s, "
        f"down after {rules.down_delay_s:g} s, drained within {rules.drain_deadline_s:g} s, "
        f"{budget}"
    ]
