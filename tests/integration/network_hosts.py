"""Several hosts on one machine: network namespaces, each with one link to a switch of their own.

The hosts share the machine's files and process table, and nothing else of its network: every host
has its own address and ports, and a link that can be taken down. The switch is a namespace too, so
that no rule or sysctl of the machine's firewall concerns its bridge; the machine itself is plugged
into it with one interface.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

PREFIX = "emtest"
"""Of the names of all namespaces and of the machine's interface; nothing else may use it."""
NETWORK = "10.77.0"
MACHINE_IP = f"{NETWORK}.1"
HOST_INTERFACE = "eth0"
_SWITCH = f"{PREFIX}-switch"
_MACHINE_INTERFACE = f"{PREFIX}-link"
_REMEDY = (
    "these tests build hosts from network namespaces: run them on Linux as root (in a container: "
    "with --privileged), with iproute2 installed (apt-get install iproute2)"
)
_IP_TIMEOUT_S = 30.0
_INTERFACE_GONE_S = 15.0
"""The kernel removes the interfaces of a deleted namespace in the background."""


@dataclass(frozen=True, slots=True)
class Host:
    name: str
    ip: str

    @property
    def namespace(self) -> str:
        return f"{PREFIX}-{self.name}"

    def run(
        self, command: Sequence[str], environment: Mapping[str, str], timeout_s: float
    ) -> subprocess.CompletedProcess[str]:
        """Returns when the command itself has ended; what it left running stays on the host."""
        # A file and no pipe: what stays would hold a pipe open.
        with tempfile.TemporaryFile("w+") as output:
            done = subprocess.run(
                ["ip", "netns", "exec", self.namespace, *command],
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=timeout_s,
                check=False,
                # Ctrl-C is for the tests, which then end what runs here in order.
                start_new_session=True,
            )
            output.seek(0)
            return subprocess.CompletedProcess(command, done.returncode, output.read())

    def cut_link(self) -> None:
        """As a pulled cable: packets vanish both ways, and no connection is told."""
        _ip("-n", _SWITCH, "link", "set", "dev", self.name, "down")

    def processes(self) -> list[psutil.Process]:
        return _processes_in(self.namespace)


@contextlib.contextmanager
def network_of_hosts(*names: str) -> Iterator[tuple[Host, ...]]:
    """Removes what an earlier run has left, and at the end all that this one has made."""
    _check_machine()
    with _only_one():
        remove_hosts()
        try:
            yield _build(names)
        finally:
            remove_hosts()


def remove_hosts() -> None:
    """All hosts with all that runs on them."""
    names = host_namespaces()
    processes = [process for name in names for process in _processes_in(name)]
    while processes:
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(processes, timeout=5)
        processes = [process for name in names for process in _processes_in(name)]
    for name in names:
        _ip("netns", "del", name)
    deadline_s = time.monotonic() + _INTERFACE_GONE_S
    while _MACHINE_INTERFACE in machine_interfaces():
        assert time.monotonic() < deadline_s, f"the interface {_MACHINE_INTERFACE} stays"
        time.sleep(0.1)


def host_namespaces() -> list[str]:
    """Names of the namespaces that hosts and switch are, of this run or another."""
    names = [line.split()[0] for line in _ip("netns", "list").splitlines() if line.strip()]
    return [name for name in names if name.startswith(f"{PREFIX}-")]


def machine_interfaces() -> list[str]:
    return sorted(path.name for path in Path("/sys/class/net").iterdir())


def _build(names: Sequence[str]) -> tuple[Host, ...]:
    hosts = tuple(Host(name, f"{NETWORK}.{10 + number}") for number, name in enumerate(names, 1))
    _ip("netns", "add", _SWITCH)
    _ip("-n", _SWITCH, "link", "add", "bridge", "type", "bridge")
    _ip("-n", _SWITCH, "link", "set", "dev", "bridge", "up")
    _ip("link", "add", _MACHINE_INTERFACE, "type", "veth", *_peer("machine"))
    _plug_in("machine")
    _ip("addr", "add", f"{MACHINE_IP}/24", "dev", _MACHINE_INTERFACE)
    _ip("link", "set", "dev", _MACHINE_INTERFACE, "up")
    for host in hosts:
        inside = ("-n", host.namespace)
        _ip("netns", "add", host.namespace)
        _ip(*inside, "link", "add", HOST_INTERFACE, "type", "veth", *_peer(host.name))
        _plug_in(host.name)
        _ip(*inside, "addr", "add", f"{host.ip}/24", "dev", HOST_INTERFACE)
        _ip(*inside, "link", "set", "dev", HOST_INTERFACE, "up")
        _ip(*inside, "link", "set", "dev", "lo", "up")
    return hosts


def _peer(port: str) -> tuple[str, ...]:
    return ("peer", "name", port, "netns", _SWITCH)


def _plug_in(port: str) -> None:
    _ip("-n", _SWITCH, "link", "set", "dev", port, "master", "bridge", "up")


def _processes_in(namespace: str) -> list[psutil.Process]:
    found = []
    for pid in _ip("netns", "pids", namespace).split():
        with contextlib.suppress(psutil.NoSuchProcess):
            found.append(psutil.Process(int(pid)))
    return found


def _check_machine() -> None:
    if os.geteuid() != 0:
        raise AssertionError(f"not root: {_REMEDY}")
    if shutil.which("ip") is None:
        raise AssertionError(f"the program ip is missing: {_REMEDY}")


@contextlib.contextmanager
def _only_one() -> Iterator[None]:
    """The names and addresses are the same for every run on this machine."""
    with socket.socket(socket.AF_UNIX) as lock:
        try:
            # A name without a file: the kernel frees it with the process.
            lock.bind(f"\0{PREFIX}-hosts")
        except OSError:
            raise AssertionError(
                "another run of these tests has hosts on this machine; wait for its end"
            ) from None
        yield


def _ip(*arguments: str) -> str:
    done = subprocess.run(
        ["ip", *arguments], capture_output=True, text=True, timeout=_IP_TIMEOUT_S, check=False
    )
    if done.returncode:
        raise AssertionError(f"ip {' '.join(arguments)}: {done.stderr.strip()}; {_REMEDY}")
    return done.stdout
