"""`python -m expertmesh`."""

from expertmesh.cli.main import app

app()
