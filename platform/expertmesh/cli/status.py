"""`expertmesh status`: fleet, queue, cost and the last decisions as a live view."""

import asyncio
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import aiohttp
import msgspec
import typer
from rich.console import Console
from rich.live import Live

from expertmesh.cli.controller import read_token
from expertmesh.cli.run import run_command
from expertmesh.cli.status_view import render_status
from expertmesh.controller.console_access import console_link
from expertmesh.controller.overview import Overview
from expertmesh.errors import SetupError, UpstreamUnavailable
from expertmesh.launch.controller_view import ControllerView

_EVERY_S = 1.0
_PIPE_WIDTH = 200
"""A table in a pipe keeps its lines whole."""


def status(
    controller_url: Annotated[
        str, typer.Option(help="Where the controller listens.")
    ] = "http://127.0.0.1:8090",
    platform: Annotated[str, typer.Option(help="Name of the platform, for its token.")] = "local",
    once: Annotated[
        bool, typer.Option("--once", help="Print once and end; always so in a pipe.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="All of it once, as JSON.")] = False,
    link: Annotated[
        bool,
        typer.Option("--link", help="Print a link that opens the web console once, and end."),
    ] = False,
) -> None:
    """Show groups, queue, cost and decisions; refreshes each second until Ctrl-C."""
    if sum((once, as_json, link)) > 1:
        raise typer.BadParameter("--once, --json and --link: choose one of them")
    url = controller_url.rstrip("/")
    run_command(lambda: _link(url, platform) if link else _status(url, platform, once, as_json))


async def _link(controller_url: str, platform: str) -> None:
    typer.echo(console_link(controller_url, _token(platform), time.time()))


async def _status(controller_url: str, platform: str, once: bool, as_json: bool) -> None:
    async with aiohttp.ClientSession() as http:
        source = _Source(http, controller_url, _token(platform))
        answer = await source.read()
        if as_json:
            typer.echo(json.dumps(msgspec.to_builtins(answer), indent=2))
            return
        terminal = sys.stdout.isatty()
        if once or not terminal:
            Console(width=None if terminal else _PIPE_WIDTH).print(
                render_status(answer.overview, answer.note)
            )
            return
        await _watch(source, answer)


async def _watch(source: "_Source", answer: "Answer") -> None:
    heard_at_s = time.monotonic()
    note, silent_s = answer.note, None
    with Live(auto_refresh=False, screen=False) as live:
        while True:
            live.update(render_status(answer.overview, note, silent_s), refresh=True)
            await asyncio.sleep(_EVERY_S)
            try:
                answer = await source.read()
            except UpstreamUnavailable as error:
                note, silent_s = str(error), time.monotonic() - heard_at_s
            else:
                heard_at_s = time.monotonic()
                note, silent_s = answer.note, None


@dataclass(frozen=True, slots=True)
class Answer:
    controller: str
    """URL of the one that answered."""
    note: str
    """When that is another one than was asked; else empty."""
    overview: Overview


class _Source:
    def __init__(self, http: aiohttp.ClientSession, url: str, token: str) -> None:
        self._http = http
        self._url = url
        self._token = token

    async def read(self) -> Answer:
        """Of the leader, where the asked controller follows and its leader answers.

        Raises UpstreamUnavailable.
        """
        asked = await self._ask(self._url)
        leader = asked.state.leader_url
        if asked.state.leads or leader is None:
            return Answer(self._url, "", asked)
        told = f"{self._url} follows {leader}"
        try:
            answered = await self._ask(leader)
        except UpstreamUnavailable as error:
            return Answer(self._url, f"{told}, which cannot be asked: {error}", asked)
        return Answer(leader, f"{told}; this is what the leader says", answered)

    async def _ask(self, url: str) -> Overview:
        return await ControllerView(self._http, url, self._token).overview()


def _token(platform: str) -> str:
    token = read_token(
        "EXPERTMESH_MESH_TOKEN", Path.cwd() / ".expertmesh" / platform / "mesh_token"
    )
    if token is None:
        raise SetupError(
            "EXPERTMESH_MESH_TOKEN: not set, and this folder holds none; "
            "run the command where `expertmesh up` runs, or set it"
        )
    return token
