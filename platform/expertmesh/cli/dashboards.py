"""`expertmesh dashboards`: write them anew, or bring a Grafana to them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from expertmesh.errors import ExpertMeshError, SetupError

if TYPE_CHECKING:
    from expertmesh.clients.grafana import Contact, DataSource, Wanted

TOKEN_VARIABLE: Final = "GRAFANA_TOKEN"
URL_VARIABLE: Final = "GRAFANA_URL"
_GENERATED: Final = Path("dashboards/generated")
_LONGEST_DIFF: Final = 40

dashboards_app = typer.Typer(
    help="Grafana's dashboards: write their JSON, or push them.", no_args_is_help=True
)


@dashboards_app.command()
def build(
    runbooks: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Of docs/operations.md as your people read it: alerts lead to its sections.",
        ),
    ] = None,
) -> None:
    """Write the JSON and the rules anew, in a copy of the repository."""
    if not Path("dashboards/build.py").is_file():
        _fail("dashboards/build.py is not here; run this in the root of the repository")
    # Its modules are found from where it runs; this program's own path does not hold them.
    command = [sys.executable, "-m", "dashboards.build"]
    command += [] if runbooks is None else ["--runbooks", runbooks]
    code = subprocess.run(command, check=False).returncode
    if code:
        raise typer.Exit(code)


@dashboards_app.command()
def push(
    url: Annotated[
        str | None, typer.Option(metavar="URL", help=f"Of Grafana. Default: ${URL_VARIABLE}.")
    ] = None,
    folder: Annotated[str, typer.Option(help="Title of the folder in Grafana.")] = "ExpertMesh",
    source: Annotated[
        Path, typer.Option("--from", metavar="DIR", help="Where the JSON lies.")
    ] = _GENERATED,
    prometheus_url: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Also set up this Prometheus as a data source, by its URL for Grafana's server.",
        ),
    ] = None,
    contact_email: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Also set up whom alerts are sent to.")
    ] = None,
    contact_webhook: Annotated[
        str | None, typer.Option(metavar="URL", help="The same by a webhook.")
    ] = None,
    dry_run: Annotated[bool, typer.Option(help="Only show what would change.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    full: Annotated[bool, typer.Option(help="Show differences to their last line.")] = False,
) -> None:
    """Bring folder, data source, dashboards and alert contact of a Grafana to what is wanted.

    Shows the differences first. The token of a service account comes from $GRAFANA_TOKEN.
    """
    try:
        _push(
            _given(url, URL_VARIABLE, "--url"),
            _given(None, TOKEN_VARIABLE, None),
            _wanted(
                folder,
                source,
                _data_source(prometheus_url),
                _contact(contact_email, contact_webhook),
            ),
            dry_run,
            yes,
            full,
        )
    except ExpertMeshError as error:
        _fail(str(error))


def _push(url: str, token: str, wanted: "Wanted", dry_run: bool, yes: bool, full: bool) -> None:
    from expertmesh.clients.grafana import Grafana

    grafana = Grafana(url, token)
    changes = grafana.changes(wanted)
    if not changes:
        typer.echo(f"{url}: all is as it should be")
        return
    for change in changes:
        typer.echo(f"{'new' if change.is_new else 'changed'}: {change.what}")
        # All of what is new is a difference.
        lines = () if change.is_new and not full else change.diff
        for line in lines if full else lines[:_LONGEST_DIFF]:
            typer.echo(f"  {line}")
        if not full and len(lines) > _LONGEST_DIFF:
            typer.echo(f"  … {len(lines) - _LONGEST_DIFF} more lines; --full shows them")
    if dry_run:
        typer.echo(f"{len(changes)} changes; nothing was written")
        return
    if not yes and not typer.confirm(f"Write {len(changes)} changes to {url}?"):
        raise typer.Exit(1)
    for change in changes:
        grafana.apply(change)
        typer.echo(f"wrote {change.what}")


def _wanted(
    folder: str, source: Path, data_source: "DataSource | None", contact: "Contact | None"
) -> "Wanted":
    from expertmesh.clients.grafana import Folder, Wanted

    found: list[dict[str, Any]] = []
    for path in sorted(source.glob("*.json")):
        try:
            content = json.loads(path.read_text())
            found.append({**content, "uid": str(content["uid"])})
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise SetupError(f"{path}: is no dashboard with a uid: {error}") from None
    if not found:
        raise SetupError(f"{source}: holds no dashboards (*.json); name their folder with --from")
    return Wanted(Folder("expertmesh", folder), tuple(found), data_source, contact)


def _data_source(url: str | None) -> "DataSource | None":
    from expertmesh.clients.grafana import DataSource

    return None if url is None else DataSource("expertmesh-prometheus", "ExpertMesh", url)


def _contact(email: str | None, webhook: str | None) -> "Contact | None":
    from expertmesh.clients.grafana import Contact

    if email is not None and webhook is not None:
        raise SetupError("--contact-email and --contact-webhook: choose one of them")
    if email is not None:
        return Contact("ExpertMesh", "email", {"addresses": email})
    return None if webhook is None else Contact("ExpertMesh", "webhook", {"url": webhook})


def _given(option: str | None, variable: str, name: str | None) -> str:
    value = option or os.environ.get(variable, "")
    if not value:
        ways = f"give {name} or set {variable}" if name else f"set {variable}"
        raise SetupError(f"{variable}: missing; {ways}")
    return value


def _fail(message: str) -> None:
    typer.echo(message, err=True)
    raise typer.Exit(2)
