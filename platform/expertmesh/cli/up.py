"""`expertmesh up`: a whole system on this machine, until Ctrl-C."""

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from expertmesh.cli.run import progress, run_command
from expertmesh.spec.load import load_system

ManifestFiles = Annotated[
    list[Path],
    typer.Option("-f", metavar="FILE", help="Manifests: one Platform, and the models."),
]


def up(files: ManifestFiles) -> None:
    """Start Ray nodes, controller and gateway on this machine; Ctrl-C ends all of it."""
    run_command(lambda: _up(files))


async def _up(files: list[Path]) -> None:
    # Imported here: gateway and controller start from an install without the parts of `up`.
    from expertmesh.launch.local import LocalSystem

    system = load_system(files)
    local = LocalSystem(system, files, progress())
    async with local:
        models = ", ".join(model.name for model in system.models)
        typer.echo(
            f"\ngateway     {local.gateway_url}/v1   (models: {models})\n"
            "a key       expertmesh keys create --tenant me\n"
            f"console     {local.console_link()}\n"
            "            (opens once, within ten minutes; a new one: expertmesh status --link)\n"
            "watch       expertmesh status\n"
            f"spot loss   write `<id of a Ray node>: <seconds>` into {local.state.spot_notices}\n"
            "stop        Ctrl-C\n"
        )
        while True:
            local.tend()
            await asyncio.sleep(1)
