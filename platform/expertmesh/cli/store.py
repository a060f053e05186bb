"""What the commands that read or write the store have in common: which one, and how errors look."""

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from sqlalchemy import URL

from expertmesh.errors import ExpertMeshError, SetupError
from expertmesh.store.database import Database, open_database

STORE_VARIABLE = "EXPERTMESH_STORE_URL"

StoreOption = Annotated[
    str | None,
    typer.Option(
        "--store",
        metavar="URL",
        help=f"The store. Default: ${STORE_VARIABLE}, else the one .expertmesh/*/store.db here.",
    ),
]

Result = TypeVar("Result")


def store_url(option: str | None, folder: Path) -> str:
    """`--store`, else the environment, else the only local system below `folder`."""
    chosen = option or os.environ.get(STORE_VARIABLE)
    if chosen:
        return chosen
    found = sorted((folder / ".expertmesh").glob("*/store.db"))
    if len(found) == 1:
        return sqlite_url(found[0])
    remedy = f"name one with --store URL or {STORE_VARIABLE}"
    if not found:
        raise SetupError(
            "store: no .expertmesh/*/store.db in this folder; start the system here with "
            f"`expertmesh up`, or {remedy}"
        )
    names = ", ".join(str(path.relative_to(folder)) for path in found)
    raise SetupError(f"store: several systems in this folder ({names}); {remedy}")


def sqlite_url(path: Path) -> str:
    return URL.create("sqlite+aiosqlite", database=str(path.absolute())).render_as_string()


def with_store(
    option: str | None, create: bool, use: Callable[[Database], Awaitable[Result]]
) -> Result:
    """Open the store, use it, close it; an error meant for a person ends the command with 1."""

    async def opened() -> Result:
        database = await open_database(store_url(option, Path.cwd()), create=create)
        try:
            return await use(database)
        finally:
            await database.close()

    try:
        return asyncio.run(opened())
    except ExpertMeshError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
