"""`expertmesh demo`: the main job end to end on this machine, then everything is gone again."""

from pathlib import Path

import typer
from rich.console import Console

from expertmesh.cli.run import progress, run_command
from expertmesh.cli.up import ManifestFiles
from expertmesh.cli.usage_view import render_usage
from expertmesh.spec.load import load_system


def demo(files: ManifestFiles) -> None:
    """Serve a model, stream an answer, scale up under a burst and down again, show the cost."""
    run_command(lambda: _demo(files))


async def _demo(files: list[Path]) -> None:
    # Imported here: gateway and controller start from an install without the parts of the demo.
    from expertmesh.launch.demo import Demo
    from expertmesh.launch.local import LocalSystem

    report = progress()
    system = load_system(files)
    async with LocalSystem(system, files, report, is_demo=True) as local:
        usage = await Demo(local, report, _write).run()
        Console(width=140).print(render_usage(usage))
    report("done")


def _write(piece: str) -> None:
    typer.echo(piece, nl=False)
