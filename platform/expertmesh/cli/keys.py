"""`expertmesh keys`: create, list and revoke tenants' API keys."""

import json
import sys
import time
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from expertmesh.cli.store import StoreOption, with_store
from expertmesh.cli.tenants import shown_limits
from expertmesh.cli.times import duration_s, shown
from expertmesh.core.domain.tenant import Limits
from expertmesh.store.database import Database
from expertmesh.store.keys import KeyBook, KeyRecord, NewKey

keys_app = typer.Typer(help="API keys of the tenants.", no_args_is_help=True)


@keys_app.command("create")
def create_key(
    tenant: Annotated[str, typer.Option(help="Who sends traffic with this key and pays for it.")],
    name: Annotated[str, typer.Option(help="What the key is for, to tell keys apart.")] = "",
    expires: Annotated[
        str | None, typer.Option(metavar="DURATION", help="Valid for this long, e.g. 30d or 12h.")
    ] = None,
    models: Annotated[
        str | None,
        typer.Option(metavar="A,B", help="Models that the key may use. Default: all."),
    ] = None,
    admin: Annotated[
        bool,
        typer.Option(
            "--admin",
            help="The key opens the admin API and nothing else. When the last such key is gone, "
            "this command makes the next one.",
        ),
    ] = False,
    requests_per_min: Annotated[
        int | None, typer.Option(metavar="N", help="Requests a minute with this key.")
    ] = None,
    tokens_per_min: Annotated[
        int | None,
        typer.Option(metavar="N", help="Prompt and completion tokens a minute, together."),
    ] = None,
    concurrent_requests: Annotated[
        int | None, typer.Option(metavar="N", help="Requests at once.")
    ] = None,
    usd_per_day: Annotated[
        float | None, typer.Option(metavar="USD", help="Dollars a UTC day, at the tariff.")
    ] = None,
    usd_per_month: Annotated[
        float | None, typer.Option(metavar="USD", help="Dollars a UTC month, at the tariff.")
    ] = None,
    store: StoreOption = None,
) -> None:
    """Create a key. Only the secret goes to standard output, and only this once.

    Limits of the key hold beside those of its tenant. A tenant that does not exist is created.
    """
    lifetime_s = None if expires is None else duration_s(expires)
    now_s = time.time()
    expires_at_s = None if lifetime_s is None else now_s + lifetime_s
    names = None if models is None else [model.strip() for model in models.split(",")]
    limits = Limits(
        requests_per_min, tokens_per_min, concurrent_requests, usd_per_day, usd_per_month
    )

    async def create(database: Database) -> NewKey:
        return await KeyBook(database).create(
            tenant, name, now_s, expires_at_s, models=names, admin=admin, limits=limits
        )

    key = with_store(store, True, create)
    until = "until revoked" if expires_at_s is None else f"until {shown(expires_at_s)} UTC"
    typer.echo(
        f"{key.id} for tenant {key.tenant}, valid {until}. The secret cannot be shown again.",
        err=True,
    )
    typer.echo(key.secret)


@keys_app.command("list")
def list_keys(
    as_json: Annotated[bool, typer.Option("--json", help="JSON, with all that is known.")] = False,
    store: StoreOption = None,
) -> None:
    """List all keys, without their secrets."""

    async def list_all(database: Database) -> tuple[KeyRecord, ...]:
        return await KeyBook(database).list()

    keys = with_store(store, False, list_all)
    now_s = time.time()
    if as_json:
        typer.echo(json.dumps([_key_as_json(key, now_s) for key in keys], indent=2))
        return
    # A table in a pipe keeps its lines whole.
    Console(width=None if sys.stdout.isatty() else 160).print(render_keys(keys, now_s))


@keys_app.command("revoke")
def revoke_key(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="As `keys list` shows it.")],
    store: StoreOption = None,
) -> None:
    """Revoke a key for good. Gateways refuse it within seconds."""

    async def revoke(database: Database) -> bool:
        return await KeyBook(database).revoke(key_id, time.time())

    if not with_store(store, False, revoke):
        typer.echo(
            f"error: {key_id!r}: no such key, or revoked already; see `expertmesh keys list`",
            err=True,
        )
        raise typer.Exit(1)
    typer.echo(f"{key_id} revoked")


def render_keys(keys: tuple[KeyRecord, ...], now_s: float) -> Table:
    table = Table(
        "id", "tenant", "name", "secret", "created (UTC)", "expires (UTC)", "state", "scope, limits"
    )
    for key in keys:
        table.add_row(
            key.id,
            key.tenant,
            key.name,
            f"{key.prefix}…",
            shown(key.created_at_s),
            "never" if key.expires_at_s is None else shown(key.expires_at_s),
            _state(key, now_s),
            f"{_scope(key)}, {shown_limits(key.limits)}",
        )
    return table


def _state(key: KeyRecord, now_s: float) -> str:
    if key.revoked_at_s is not None:
        return "revoked"
    if key.expires_at_s is not None and key.expires_at_s <= now_s:
        return "expired"
    return "tenant disabled" if key.tenant_disabled else "active"


def _scope(key: KeyRecord) -> str:
    if key.admin:
        return "admin API"
    if key.models is None:
        return "all models"
    return key.models[0] if len(key.models) == 1 else f"{len(key.models)} models"


def _key_as_json(key: KeyRecord, now_s: float) -> dict[str, Any]:
    return {**asdict(key), "state": _state(key, now_s)}
