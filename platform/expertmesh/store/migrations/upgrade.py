"""Bring a database to the schema of this code, inside the caller's transaction and lock."""

from functools import cache
from pathlib import Path

from alembic.config import Config
from alembic.runtime.environment import EnvironmentContext
from alembic.runtime.migration import MigrationContext, RevisionStep
from alembic.script import ScriptDirectory
from sqlalchemy import Connection

from expertmesh.errors import SetupError


def is_current(connection: Connection) -> bool:
    """Raises SetupError when the schema comes from a newer version of this code."""
    scripts = _scripts()
    heads = MigrationContext.configure(connection).get_current_heads()
    known = {script.revision for script in scripts.walk_revisions()}
    unknown = sorted(set(heads) - known)
    if unknown:
        raise SetupError(
            f"its schema is at revision {', '.join(unknown)}, newer than this version of "
            f"expertmesh knows ({scripts.get_current_head()}); update expertmesh, or use another "
            "database"
        )
    return set(heads) == set(scripts.get_heads())


def upgrade_to_head(connection: Connection) -> None:
    scripts = _scripts()

    def steps(revision: object, context: MigrationContext) -> list[RevisionStep]:
        return scripts._upgrade_revs("head", revision)  # type: ignore[arg-type]

    with EnvironmentContext(Config(), scripts, fn=steps) as environment:
        environment.configure(connection=connection)
        environment.run_migrations()


@cache
def _scripts() -> ScriptDirectory:
    return ScriptDirectory(str(Path(__file__).parent))
