"""Run what a rendered pod would run, as processes of this machine.

A pod's volumes become folders below a root of its own, and paths, host names and the pod's address
are replaced where the pod names them. Everything else is as rendered.
"""

import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.chart.rendering import REPOSITORY, Rendered

POD_IP = "127.0.0.1"


@dataclass
class Cluster:
    """What pods find around them."""

    rendered: Rendered
    folder: Path
    secrets: Mapping[str, Mapping[str, str]]
    hosts: Mapping[str, str]
    """Host and port, by those that pods ask for."""
    environment: Mapping[str, str]
    """Of the machine, as an image would set it."""


@dataclass
class LocalPod:
    cluster: Cluster
    name: str
    spec: dict[str, Any]
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.root = self.cluster.folder / "pods" / self.name
        volumes = {volume["name"]: volume for volume in self.spec.get("volumes", [])}
        self.paths = [mount["mountPath"] for mount in self.container.get("volumeMounts", [])]
        # The images hold the tiny model here.
        models = self.root / "opt/expertmesh/models"
        models.parent.mkdir(parents=True)
        models.symlink_to(REPOSITORY / "models")
        for mount in self.container.get("volumeMounts", []):
            place = self.root / mount["mountPath"].lstrip("/")
            place.parent.mkdir(parents=True, exist_ok=True)
            self._mount(volumes[mount["name"]], place)

    @property
    def container(self) -> dict[str, Any]:
        (only,) = self.spec["containers"]
        found: dict[str, Any] = only
        return found

    def _mount(self, volume: dict[str, Any], place: Path) -> None:
        if "persistentVolumeClaim" in volume:
            shared = self.cluster.folder / "claims" / volume["persistentVolumeClaim"]["claimName"]
            shared.mkdir(parents=True, exist_ok=True)
            place.symlink_to(shared, target_is_directory=True)
            return
        assert "configMap" in volume or "emptyDir" in volume, volume
        place.mkdir()
        if "configMap" in volume:
            for key, text in self._config_map(volume["configMap"]["name"]).items():
                items = volume["configMap"].get("items", [{"key": key, "path": key}])
                for item in items:
                    if item["key"] == key:
                        (place / item["path"]).write_text(text)

    def _config_map(self, name: str) -> dict[str, str]:
        (found,) = (
            each
            for each in self.cluster.rendered.all("ConfigMap")
            if each["metadata"]["name"] == name
        )
        data: dict[str, str] = found["data"]
        return data

    def here(self, text: str) -> str:
        """A value of the pod with paths and addresses of this machine."""
        for host, local in self.cluster.hosts.items():
            text = text.replace(f"//{host}", f"//{local}")
        # In one pass, as the root may begin like one of the paths; each only as a whole.
        paths = "|".join(re.escape(path) for path in sorted(self.paths, key=len, reverse=True))
        return re.sub(rf"(?<![\w.-])({paths})(?=/|$)", rf"{self.root}\1", text) if paths else text

    @property
    def environment(self) -> dict[str, str]:
        values: dict[str, str] = {}
        for variable in self.container.get("env", []):
            source = variable.get("valueFrom", {})
            if "secretKeyRef" in source:
                reference = source["secretKeyRef"]
                value = self.cluster.secrets[reference["name"]][reference["key"]]
            elif "fieldRef" in source:
                assert source["fieldRef"] == {"fieldPath": "status.podIP"}
                value = POD_IP
            else:
                value = self.here(variable["value"])
            values[variable["name"]] = value
        return {**self.cluster.environment, **values}

    @property
    def command(self) -> list[str]:
        environment = self.environment
        words = [
            re.sub(r"\$\((\w+)\)", lambda found: environment[found[1]], self.here(word))
            for word in (*self.container["command"], *self.container.get("args", []))
        ]
        program = {
            "python": sys.executable,
            "expertmesh": f"{Path(sys.executable).parent}/expertmesh",
        }
        return [program[words[0]], *words[1:]]

    @property
    def folder(self) -> Path:
        return Path(self.here(self.container.get("workingDir", str(self.root))))

    @property
    def log(self) -> Path:
        return self.cluster.folder / f"{self.name}.log"

    def start(self, *more: str) -> subprocess.Popen[bytes]:
        """`more`: arguments that only this machine needs."""
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                [*self.command, *more],
                cwd=self.folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self.processes.append(process)
        return process

    def run(self, *command: str, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
        """As `kubectl exec` would; without a command, the pod's own to its end."""
        words = [f"{Path(sys.executable).parent}/{command[0]}", *command[1:]] if command else None
        return subprocess.run(
            words or self.command,
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def text(self) -> str:
        return self.log.read_text()[-4000:] if self.log.exists() else ""
