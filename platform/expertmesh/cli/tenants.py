"""`expertmesh tenants`: set, list, disable and enable those who send traffic."""

import json
import re
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from expertmesh.cli.store import StoreOption, with_store
from expertmesh.cli.times import shown
from expertmesh.core.domain.tenant import Limits, Priority, Tenant
from expertmesh.store.database import Database
from expertmesh.store.tenants import TenantBook, TenantRecord

tenants_app = typer.Typer(
    help="Tenants: their share of the capacity and their limits.", no_args_is_help=True
)

_NONE = "none"
_NUMBER = re.compile(r"\d+")
_AMOUNT = re.compile(r"\d+(\.\d+)?|\.\d+")

NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="As `tenants list` shows it.")]


@tenants_app.command("set")
def set_tenant(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Created when there is none.")],
    priority: Annotated[
        Priority | None, typer.Option(help="Served in this order when there is a queue.")
    ] = None,
    weight: Annotated[
        float | None,
        typer.Option(
            help="Share of the tokens among waiting tenants of one priority, in proportion."
        ),
    ] = None,
    requests_per_min: Annotated[
        str | None, typer.Option(metavar="N|none", help="Requests a minute.")
    ] = None,
    tokens_per_min: Annotated[
        str | None,
        typer.Option(metavar="N|none", help="Prompt and completion tokens a minute, together."),
    ] = None,
    concurrent_requests: Annotated[
        str | None, typer.Option(metavar="N|none", help="Requests at once.")
    ] = None,
    usd_per_day: Annotated[
        str | None, typer.Option(metavar="USD|none", help="Dollars a UTC day, at the tariff.")
    ] = None,
    usd_per_month: Annotated[
        str | None, typer.Option(metavar="USD|none", help="Dollars a UTC month, at the tariff.")
    ] = None,
    store: StoreOption = None,
) -> None:
    """Create a tenant, or change what is given here; "none" clears a limit.

    Gateways follow within seconds.
    """
    limits: dict[str, Any] = {}
    for field, value in (
        ("requests_per_min", requests_per_min),
        ("tokens_per_min", tokens_per_min),
        ("concurrent_requests", concurrent_requests),
    ):
        if value is not None:
            limits[field] = _limit(field, value, _NUMBER, int, "a whole number")
    for field, value in (("usd_per_day", usd_per_day), ("usd_per_month", usd_per_month)):
        if value is not None:
            limits[field] = _limit(field, value, _AMOUNT, float, "dollars such as 12.50")

    def edit(tenant: Tenant) -> Tenant:
        return replace(
            tenant,
            priority=tenant.priority if priority is None else priority,
            weight=tenant.weight if weight is None else weight,
            limits=replace(tenant.limits, **limits),
        )

    async def set_(database: Database) -> TenantRecord:
        record, _ = await TenantBook(database).change_or_create(name, edit, time.time())
        return record

    tenant = with_store(store, True, set_).tenant
    typer.echo(
        f"{tenant.name}: {tenant.priority.value}, weight {tenant.weight:g}, "
        f"{shown_limits(tenant.limits)}"
    )


@tenants_app.command("list")
def list_tenants(
    as_json: Annotated[bool, typer.Option("--json", help="JSON, with all that is known.")] = False,
    store: StoreOption = None,
) -> None:
    """List all tenants with their limits."""

    async def list_all(database: Database) -> tuple[TenantRecord, ...]:
        return await TenantBook(database).list()

    tenants = with_store(store, False, list_all)
    if as_json:
        typer.echo(json.dumps([_tenant_as_json(record) for record in tenants], indent=2))
        return
    # A table in a pipe keeps its lines whole.
    Console(width=None if sys.stdout.isatty() else 160).print(render_tenants(tenants))


@tenants_app.command("disable")
def disable_tenant(name: NameArgument, store: StoreOption = None) -> None:
    """Let all keys of a tenant rest, without revoking them. Gateways follow within seconds."""

    async def disable(database: Database) -> TenantRecord | None:
        return await TenantBook(database).disable(name, time.time())

    _report(name, with_store(store, False, disable), "disabled")


@tenants_app.command("enable")
def enable_tenant(name: NameArgument, store: StoreOption = None) -> None:
    """Let the keys of a disabled tenant work again."""

    async def enable(database: Database) -> TenantRecord | None:
        return await TenantBook(database).enable(name)

    _report(name, with_store(store, False, enable), "enabled")


def render_tenants(tenants: tuple[TenantRecord, ...]) -> Table:
    table = Table("tenant", "priority", "weight", "limits", "created (UTC)", "state")
    for record in tenants:
        tenant = record.tenant
        table.add_row(
            tenant.name,
            tenant.priority.value,
            f"{tenant.weight:g}",
            shown_limits(tenant.limits),
            shown(record.created_at_s),
            "active" if record.disabled_at_s is None else "disabled",
        )
    return table


def shown_limits(limits: Limits) -> str:
    parts = []
    if limits.requests_per_min is not None:
        parts.append(f"{limits.requests_per_min:,} requests/min")
    if limits.tokens_per_min is not None:
        parts.append(f"{limits.tokens_per_min:,} tokens/min")
    if limits.concurrent_requests is not None:
        parts.append(f"{limits.concurrent_requests:,} at once")
    if limits.usd_per_day is not None:
        parts.append(f"${_usd(limits.usd_per_day)}/day")
    if limits.usd_per_month is not None:
        parts.append(f"${_usd(limits.usd_per_month)}/month")
    return ", ".join(parts) or "no limits"


def _usd(amount: float) -> str:
    """All its digits, at least two after the point."""
    rounded = f"{amount:,.2f}"
    return rounded if float(rounded.replace(",", "")) == amount else repr(amount)


def _limit(
    field: str,
    value: str,
    form: re.Pattern[str],
    convert: Callable[[str], int | float],
    wanted: str,
) -> int | float | None:
    if value == _NONE:
        return None
    if not form.fullmatch(value):
        raise typer.BadParameter(
            f"{value!r}: write {wanted}, or none", param_hint=f"--{field.replace('_', '-')}"
        )
    return convert(value)


def _tenant_as_json(record: TenantRecord) -> dict[str, Any]:
    return {
        **asdict(record.tenant),
        "created_at_s": record.created_at_s,
        "disabled_at_s": record.disabled_at_s,
    }


def _report(name: str, record: TenantRecord | None, state: str) -> None:
    if record is None:
        typer.echo(f"error: {name!r}: no such tenant; see `expertmesh tenants list`", err=True)
        raise typer.Exit(1)
    typer.echo(f"{name} {state}")
