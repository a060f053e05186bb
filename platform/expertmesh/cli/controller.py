"""`expertmesh controller`: the control loop as a service."""

import asyncio
import logging
import os
import re
from pathlib import Path
from typing import Annotated

import typer

from expertmesh.cli.store import STORE_VARIABLE, sqlite_url
from expertmesh.cli.times import duration_s
from expertmesh.errors import ExpertMeshError, SetupError
from expertmesh.launch.controller import ControllerSettings, LeaseKind, serve_controller
from expertmesh.spec.load import System, load_system

MESH_TOKEN_VARIABLE = "EXPERTMESH_MESH_TOKEN"
RAY_TOKEN_VARIABLE = "RAY_AUTH_TOKEN"
_ORIGIN = re.compile(r"https?://[A-Za-z0-9.:\[\]-]+")


def controller(
    files: Annotated[
        list[Path],
        typer.Option("-f", metavar="FILE", help="Manifests: one Platform, and the models."),
    ],
    dashboard_url: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Ray's dashboard. Default: this machine, as in the file."),
    ] = None,
    store: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help=f"The store. Default: ${STORE_VARIABLE}, else the manifest's, else SQLite in "
            ".expertmesh/<platform>/ here.",
        ),
    ] = None,
    host: Annotated[str | None, typer.Option(help="Default: as in the Platform file.")] = None,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Default: as in the Platform file.")
    ] = None,
    serve_host: Annotated[
        str, typer.Option(help="Address that the ranks bind; 127.0.0.1 when all is on one machine.")
    ] = "0.0.0.0",
    lease: Annotated[
        LeaseKind,
        typer.Option(
            help="By what several controllers of one system agree on a leader; none: there is "
            "only this one."
        ),
    ] = LeaseKind.DATABASE,
    advertise: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Where the gateways reach this controller. Default: as it listens, at this "
            "host's address.",
        ),
    ] = None,
    gateway_url: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Where browsers reach the gateway, for the console's chat. The gateway must allow "
            "the console's origin. Default: no chat.",
        ),
    ] = None,
    spot_notices: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SOURCE",
            help="Where it is announced that nodes will be taken away: kubernetes, file:PATH or "
            "an HTTP URL; may be given several times.",
        ),
    ] = None,
    ray_cluster: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="RayCluster of this system: decisions become its events."
        ),
    ] = None,
    keep_decisions: Annotated[
        str, typer.Option(metavar="DURATION", help="How long decisions stay in the journal.")
    ] = "30d",
    kubeconfig: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Default: the service account of this pod.", dir_okay=False
        ),
    ] = None,
) -> None:
    """Start, drain and replace groups until stopped; the groups outlive it.

    Several may run on one store: one leads, the others take over within seconds when it ends.

    The mesh token comes from EXPERTMESH_MESH_TOKEN or the file EXPERTMESH_MESH_TOKEN_PATH, Ray's
    from RAY_AUTH_TOKEN or the file RAY_AUTH_TOKEN_PATH, and else both from the files that
    `expertmesh up` keeps in .expertmesh/<platform>/.
    """
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    try:
        system = load_system(files)
        platform = system.platform
        folder = Path.cwd() / ".expertmesh" / platform.name
        settings = ControllerSettings(
            host=host or platform.controller.host,
            port=port or platform.controller.port,
            dashboard_url=dashboard_url or f"http://127.0.0.1:{platform.ray_dashboard_port}",
            mesh_token=_mesh_token(folder),
            store_url=_store_url(store, system, folder),
            manifests=system,
            ray_token=read_token(RAY_TOKEN_VARIABLE, folder / "ray_token"),
            serve_listen_host=serve_host,
            lease=lease,
            advertise_url=_http_url("--advertise", advertise),
            gateway_url=_origin(gateway_url),
            spot_notices=tuple(spot_notices or ()),
            kubeconfig=kubeconfig,
            ray_cluster=ray_cluster,
            keep_decisions_s=duration_s(keep_decisions),
        )
        asyncio.run(serve_controller(settings))
    except ExpertMeshError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None


def read_token(variable: str, kept: Path) -> str | None:
    """From the variable, else from the file that `<variable>_PATH` names, else from `kept`."""
    value = os.environ.get(variable, "").strip()
    if value:
        return value
    named = os.environ.get(f"{variable}_PATH", "").strip()
    path = Path(named) if named else kept
    if not named and not path.is_file():
        return None
    try:
        value = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise SetupError(f"{variable}_PATH: {path}: cannot be read: {error}") from None
    if not value:
        raise SetupError(f"{variable}: {path}: is empty; write the token into it")
    return value


def _http_url(option: str, url: str | None) -> str | None:
    if url is not None and not url.startswith(("http://", "https://")):
        raise SetupError(f"{option}: {url!r}: write it as http://host:port")
    return url


def _origin(url: str | None) -> str | None:
    if url is None:
        return None
    chosen = url.rstrip("/")
    if not _ORIGIN.fullmatch(chosen):
        raise SetupError(f"--gateway-url: {url!r}: write scheme and host, as http://host:port")
    return chosen


def _mesh_token(folder: Path) -> str:
    token = read_token(MESH_TOKEN_VARIABLE, folder / "mesh_token")
    if token is None or not token.strip(" ,"):
        raise SetupError(
            f"{MESH_TOKEN_VARIABLE}: not set; give controller, gateways and ranks the same secret, "
            "for example from `openssl rand -hex 32`"
        )
    return token


def _store_url(option: str | None, system: System, folder: Path) -> str:
    chosen = option or os.environ.get(STORE_VARIABLE) or system.platform.store_url
    if chosen:
        return chosen
    folder.mkdir(parents=True, exist_ok=True)
    return sqlite_url(folder / "store.db")
