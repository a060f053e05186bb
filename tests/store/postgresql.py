"""A real PostgreSQL server on a free port, with a folder of its own, for as long as it is used."""

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

_SUPERUSER = "em"


@dataclass
class PostgresqlServer:
    folder: Path
    port: int
    _process: subprocess.Popen[bytes] | None = field(default=None)

    def url(self, database: str) -> str:
        return f"postgresql+asyncpg://{_SUPERUSER}@127.0.0.1:{self.port}/{database}"

    def start(self) -> None:
        with (self.folder / "log").open("ab") as log:
            # The kernel stops the server when the test run is killed.
            self._process = subprocess.Popen(
                _as_owner(
                    *("--pdeathsig", "QUIT"),
                    *(str(_programs() / "postgres"), "-D", str(self.folder / "data")),
                    *("-p", str(self.port), "-c", "listen_addresses=127.0.0.1"),
                    *("-c", "unix_socket_directories=", "-c", "fsync=off"),
                ),
                cwd=self.folder,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        deadline_s = time.monotonic() + 30
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline_s:
                raise RuntimeError(
                    f"PostgreSQL did not start:\n{(self.folder / 'log').read_text()}"
                )
            time.sleep(0.05)

    def stop(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGQUIT)
            self._process.wait(timeout=30)
            self._process = None

    def execute(self, sql: str, database: str = "postgres") -> str:
        server = ("-h", "127.0.0.1", "-p", str(self.port), "-U", _SUPERUSER, "-d", database)
        plain = ("-X", "-A", "-t", "-v", "ON_ERROR_STOP=1")
        command = (str(_programs() / "psql"), *server, *plain, "-c", sql)
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    def _answers(self) -> bool:
        command = (str(_programs() / "pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(self.port))
        return subprocess.run(command).returncode == 0


@contextmanager
def postgresql_server() -> Iterator[PostgresqlServer]:
    # Not below pytest's own folder, which only its user may enter: the server refuses to be root.
    folder = Path(tempfile.mkdtemp(prefix="em-postgresql-"))
    server = PostgresqlServer(folder, _free_port())
    try:
        if os.geteuid() == 0:
            shutil.chown(folder, _owner().pw_name)
        initdb = (str(_programs() / "initdb"), "-D", str(folder / "data"), "-U", _SUPERUSER)
        subprocess.run(
            _as_owner(*initdb, "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync"),
            cwd=folder,
            check=True,
            capture_output=True,
        )
        server.start()
        yield server
    finally:
        server.stop()
        shutil.rmtree(folder)


def _programs() -> Path:
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    on_path = shutil.which("postgres")
    if on_path:
        return Path(on_path).resolve().parent
    if not installed:
        raise RuntimeError("these tests need PostgreSQL: apt-get install postgresql")
    return installed[-1].parent


def _owner() -> pwd.struct_passwd:
    return pwd.getpwnam("postgres") if os.geteuid() == 0 else pwd.getpwuid(os.geteuid())


def _as_owner(*command: str) -> tuple[str, ...]:
    if os.geteuid() != 0:
        return ("setpriv", *command)
    owner = _owner()
    identity = (f"--reuid={owner.pw_uid}", f"--regid={owner.pw_gid}", "--clear-groups")
    return ("setpriv", *identity, *command)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
