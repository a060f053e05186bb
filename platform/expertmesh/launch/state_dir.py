"""What a local system keeps on disk below the working folder: secrets, store, logs."""

import fcntl
import hashlib
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from expertmesh.errors import SetupError


@dataclass(frozen=True, slots=True)
class StateDir:
    path: Path
    store_name: str = "store.db"

    @classmethod
    def of(cls, platform_name: str) -> "StateDir":
        return cls(Path.cwd() / ".expertmesh" / platform_name)

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def gateway(self) -> Path:
        """The gateway's own folder."""
        return self.path / "gateway"

    @property
    def store_url(self) -> str:
        return f"sqlite+aiosqlite:///{self.path / self.store_name}"

    @property
    def spot_notices(self) -> Path:
        """`<Ray's id of a node>: <seconds from now>` lines: nodes that will be taken away."""
        return self.path / "spot_notices.yaml"

    @property
    def mesh_token_file(self) -> Path:
        return self.path / "mesh_token"

    @property
    def ray_token_file(self) -> Path:
        return self.path / "ray_token"

    @property
    def marker(self) -> str:
        """Stands in the environment of every process that belongs to this folder's system."""
        return hashlib.sha256(str(self.path).encode()).hexdigest()[:16]

    def create(self) -> None:
        try:
            for folder in (self.logs, self.gateway):
                folder.mkdir(parents=True, exist_ok=True)
            for file in (self.mesh_token_file, self.ray_token_file):
                if not file.exists():
                    file.touch(mode=0o600)
                    file.write_text(secrets.token_hex(32))
        except OSError as error:
            raise SetupError(
                f"{self.path}: cannot be written ({error.strerror}); "
                "run the command in a folder that you own"
            ) from None

    def mesh_token(self) -> str:
        return self._read(self.mesh_token_file)

    def ray_token(self) -> str:
        return self._read(self.ray_token_file)

    def lock(self) -> IO[str]:
        """Held while a system runs; the kernel lets go of it when the process ends."""
        handle = (self.path / "lock").open("w")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.close()
            raise SetupError(
                f"{self.path}: a system runs in this folder already; stop it (Ctrl-C where "
                "`expertmesh up` runs) or work in another folder"
            ) from None
        return handle

    def _read(self, file: Path) -> str:
        try:
            return file.read_text().strip()
        except FileNotFoundError:
            raise SetupError(
                f"{file}: missing; start the system with `expertmesh up` first"
            ) from None
