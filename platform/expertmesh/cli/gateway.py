"""`expertmesh gateway`: the gateway with its workers, as the chart starts it."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from expertmesh.cli.store import StoreOption, store_url
from expertmesh.errors import ExpertMeshError, SetupError

MESH_TOKEN_VARIABLE = "EXPERTMESH_MESH_TOKEN"


def gateway(
    controller_url: Annotated[
        list[str],
        typer.Option(
            metavar="URL[,URL…]",
            help="Where the controller listens, e.g. http://127.0.0.1:8700. Of several "
            "controllers name all, or an address that leads to any of them.",
        ),
    ],
    config: Annotated[
        Path | None,
        typer.Option(
            help="Platform file, whose part `gateway` counts; read again at SIGHUP.", dir_okay=False
        ),
    ] = None,
    host: Annotated[
        str | None, typer.Option(help="Address to listen on, instead of the one in the file.")
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(help="Port to listen on, instead of the one in the file.", min=0, max=65535),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(help="Processes that share the port, instead of those in the file.", min=1),
    ] = None,
    store: StoreOption = None,
    mesh_token_file: Annotated[
        Path | None,
        typer.Option(help=f"File with the mesh token, instead of {MESH_TOKEN_VARIABLE}."),
    ] = None,
    state_dir: Annotated[
        Path,
        typer.Option(
            help="Folder for usage that is not in the ledger yet; keep it over restarts.",
            file_okay=False,
        ),
    ] = Path(".expertmesh/gateway"),
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ORIGIN",
            help="A page that may call the gateway, beside those in the file: scheme and host.",
        ),
    ] = None,
    drain_delay_s: Annotated[
        float,
        typer.Option(help="Seconds from turning unready to refusing connections.", min=0),
    ] = 0.0,
    drain_timeout_s: Annotated[
        float, typer.Option(help="Seconds that open requests may take at shutdown.", min=0)
    ] = 120.0,
) -> None:
    """Serve the OpenAI and Anthropic APIs in front of the groups of the fleet."""
    # Here, so that the other commands need neither aiohttp nor uvloop.
    from expertmesh.core.domain.gateway import GatewayConfig
    from expertmesh.gateway.limits import GatewayLimits
    from expertmesh.launch.gateway import GatewaySettings
    from expertmesh.launch.gateway_workers import run_gateway
    from expertmesh.spec.load import load_platform

    def read() -> GatewayConfig:
        if config is None:
            chosen = GatewayConfig(host="127.0.0.1", port=8800)
        else:
            chosen = load_platform(config).gateway.to_core()
        return replace(
            chosen,
            host=chosen.host if host is None else host,
            port=chosen.port if port is None else port,
            workers=chosen.workers if workers is None else workers,
            cors_origins=(*chosen.cors_origins, *(allow_origin or ())),
        )

    try:
        run_gateway(
            GatewaySettings(
                config=read(),
                controller_url=_http_urls(controller_url),
                state_dir=state_dir.absolute(),
                store_url=store_url(store, Path.cwd()),
                mesh_token=_mesh_token(mesh_token_file),
                limits=GatewayLimits(drain_delay_s=drain_delay_s, drain_timeout_s=drain_timeout_s),
                reload=read,
            )
        )
    except ExpertMeshError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None


def _http_urls(given: list[str]) -> str:
    urls = [url.strip() for part in given for url in part.split(",")]
    for url in urls:
        if not url.startswith(("http://", "https://")):
            raise SetupError(f"--controller-url: {url!r}: write it as http://host:port")
    return ",".join(urls)


def _mesh_token(file: Path | None) -> str:
    if file is None:
        token = os.environ.get(MESH_TOKEN_VARIABLE, "").strip()
        if not token.strip(" ,"):
            raise SetupError(
                f"{MESH_TOKEN_VARIABLE}: is not set; set it to the mesh token of the controller "
                "and the ranks, or name its file with --mesh-token-file"
            )
        return token
    try:
        token = file.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise SetupError(f"--mesh-token-file: {file}: cannot be read: {error}") from None
    if not token.strip(" ,"):
        raise SetupError(f"--mesh-token-file: {file}: is empty; write the mesh token into it")
    return token
