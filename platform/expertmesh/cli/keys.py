"""`expertmesh keys`: create, list and revoke tenants' API keys."""

import sys
import time
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from expertmesh.cli.store import StoreOption, with_store
from expertmesh.cli.times import duration_s, shown
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
    store: StoreOption = None,
) -> None:
    """Create a key. Only the secret goes to standard output, and only this once."""
    lifetime_s = None if expires is None else duration_s(expires)
    now_s = time.time()
    expires_at_s = None if lifetime_s is None else now_s + lifetime_s

    async def create(database: Database) -> NewKey:
        return await KeyBook(database).create(tenant, name, now_s, expires_at_s)

    key = with_store(store, True, create)
    until = "until revoked" if expires_at_s is None else f"until {shown(expires_at_s)} UTC"
    typer.echo(
        f"{key.id} for tenant {key.tenant}, valid {until}. The secret cannot be shown again.",
        err=True,
    )
    typer.echo(key.secret)


@keys_app.command("list")
def list_keys(store: StoreOption = None) -> None:
    """List all keys, without their secrets."""

    async def list_all(database: Database) -> tuple[KeyRecord, ...]:
        return await KeyBook(database).list()

    keys = with_store(store, False, list_all)
    # A table in a pipe keeps its lines whole.
    Console(width=None if sys.stdout.isatty() else 160).print(render_keys(keys, time.time()))


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
    table = Table("id", "tenant", "name", "secret", "created (UTC)", "expires (UTC)", "state")
    for key in keys:
        table.add_row(
            key.id,
            key.tenant,
            key.name,
            f"{key.prefix}…",
            shown(key.created_at_s),
            "never" if key.expires_at_s is None else shown(key.expires_at_s),
            _state(key, now_s),
        )
    return table


def _state(key: KeyRecord, now_s: float) -> str:
    if key.is_active(now_s):
        return "active"
    return "expired" if key.revoked_at_s is None else "revoked"
