"""`expertmesh`: one command per file, put together here."""

import typer

from expertmesh.cli.controller import controller
from expertmesh.cli.dashboards import dashboards_app
from expertmesh.cli.demo import demo
from expertmesh.cli.explain import explain
from expertmesh.cli.gateway import gateway
from expertmesh.cli.keys import keys_app
from expertmesh.cli.plan import plan
from expertmesh.cli.replay import replay
from expertmesh.cli.simulate import simulate
from expertmesh.cli.status import status
from expertmesh.cli.tenants import tenants_app
from expertmesh.cli.up import up
from expertmesh.cli.usage import usage
from expertmesh.serving.fate_sharing import die_with_owner

app = typer.Typer(
    name="expertmesh",
    help="Serve mixture-of-experts models as expert-parallel groups on Ray and vLLM.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(up)
app.command()(demo)
app.command()(status)
app.command()(plan)
app.command()(simulate)
app.command()(explain)
app.command()(replay)
app.command()(usage)
app.add_typer(tenants_app, name="tenants")
app.add_typer(keys_app, name="keys")
app.add_typer(dashboards_app, name="dashboards")
app.command()(gateway)
app.command()(controller)


def main() -> None:
    """The program. Services that `up` started end with it, even when it is killed."""
    die_with_owner()
    app()
