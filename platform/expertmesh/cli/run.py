"""How the commands that run for a while begin, report progress and end."""

import asyncio
import signal
import time
from collections.abc import Awaitable, Callable

import typer

from expertmesh.errors import ExpertMeshError


def run_command(work: Callable[[], Awaitable[None]]) -> None:
    """Errors meant for a person go to stderr with exit code 2; Ctrl-C is an orderly end."""

    async def main() -> None:
        task = asyncio.current_task()
        assert task is not None
        # One way out for Ctrl-C, `kill` and a closed terminal, also for a job in the background,
        # which inherits an ignored SIGINT.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)
        await work()

    try:
        asyncio.run(main())
    except ExpertMeshError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    except (KeyboardInterrupt, asyncio.CancelledError):
        typer.echo("stopped", err=True)
        raise typer.Exit(130) from None


def progress() -> Callable[[str], None]:
    """Lines with the seconds since the first one."""
    started_s = time.monotonic()

    def report(text: str) -> None:
        typer.echo(f"[{time.monotonic() - started_s:5.0f} s] {text}")

    return report
