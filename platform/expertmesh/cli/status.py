"""`expertmesh status`: fleet, queue and cost as a live table."""

import asyncio
import time
from pathlib import Path
from typing import Annotated

import aiohttp
import typer
from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table

from expertmesh.cli.controller import read_token
from expertmesh.cli.run import run_command
from expertmesh.errors import SetupError
from expertmesh.launch.controller_view import ControllerView, FleetView


def status(
    controller_url: Annotated[
        str, typer.Option(help="Where the controller listens.")
    ] = "http://127.0.0.1:8090",
    platform: Annotated[str, typer.Option(help="Name of the platform, for its token.")] = "local",
    once: Annotated[bool, typer.Option("--once", help="Print once and end.")] = False,
) -> None:
    """Show groups, queue and cost; refreshes each second until Ctrl-C."""
    run_command(lambda: _status(controller_url, platform, once))


async def _status(controller_url: str, platform: str, once: bool) -> None:
    token = read_token(
        "EXPERTMESH_MESH_TOKEN", Path.cwd() / ".expertmesh" / platform / "mesh_token"
    )
    if token is None:
        raise SetupError(
            "EXPERTMESH_MESH_TOKEN: not set, and this folder holds none; "
            "run the command where `expertmesh up` runs, or set it"
        )
    async with aiohttp.ClientSession() as http:
        view = ControllerView(http, controller_url, token)
        if once:
            Console().print(render(await view.fleet(), time.time()))
            return
        with Live(auto_refresh=False) as live:
            while True:
                live.update(render(await view.fleet(), time.time()), refresh=True)
                await asyncio.sleep(1)


def render(fleet: FleetView, now_s: float) -> Group:
    groups = Table(box=box.SIMPLE_HEAD, title=f"fleet, version {fleet.version}")
    for header in ("group", "pool", "state", "ranks", "$/h", "note"):
        groups.add_column(header, justify="right" if header == "$/h" else "left")
    for group in fleet.groups:
        note = group.message
        if not note and group.expected_ready_at_s is not None:
            note = f"ready in about {max(0.0, group.expected_ready_at_s - now_s):.0f} s"
        groups.add_row(
            group.name,
            group.pool,
            group.state.value,
            f"{len(group.ranks)}/{group.world_size}",
            f"{group.usd_per_hour:.2f}",
            note,
        )
    models = Table(box=box.SIMPLE_HEAD)
    for header in ("model", "queued", "running", "groups wanted", "$/h", "last decision"):
        models.add_column(header)
    for name, decision in fleet.decisions.items():
        spend = sum(group.usd_per_hour for group in fleet.groups if group.model == name)
        reason = decision.reason
        if decision.pending and decision.pending not in reason:
            reason = f"{reason} ({decision.pending})"
        models.add_row(
            name,
            str(decision.queued),
            str(decision.running),
            str(decision.wanted),
            f"{spend:.2f}",
            reason,
        )
    return Group(groups, models)
