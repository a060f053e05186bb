"""`python -m expertmesh`."""

from expertmesh.cli.main import main

main()
