"""A group over two hosts, and what happens to requests and groups when a host is cut off.

The tests build on one another: the second and third take away a host each.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import yaml
from tests.integration.engine_process import Step
from tests.integration.network_hosts import (
    HOST_INTERFACE,
    Host,
    host_namespaces,
    machine_interfaces,
    network_of_hosts,
)
from tests.integration.running_system import (
    MODEL,
    REPOSITORY,
    RunningSystem,
    free_ports,
    wait_until,
    wait_until_gone,
)
from tokenizers import Tokenizer

from expertmesh.launch.local import LocalSystem
from expertmesh.launch.our_processes import MARKER_VARIABLE, end_processes
from expertmesh.launch.state_dir import StateDir
from expertmesh.spec.load import load_system

pytestmark = [pytest.mark.integration, pytest.mark.slow]

MODEL_FOLDER = REPOSITORY / "models/tiny-qwen3-moe"
BEGINNINGS = (
    "Once upon a time there was a fox",
    "The sea is",
    "A happy dog ran to the river and",
    "One day Lily found a kite in",
    "Bees make",
    "Tom was sad because",
)
TOKENS = 16
LOGPROB_TOLERANCE = 1e-3

_MARKER = "emtest-hosts"
"""The same in every run, so that a run finds what a killed one has left. Short, because the paths
of Ray's sockets may have 107 bytes."""
_GCS_PORT = 6379
_DASHBOARD_PORT = 8265
_AGENT_PORTS = ("metrics-export", "dashboard-agent-grpc", "dashboard-agent-listen")
_OBJECT_STORE_BYTES = 80 * 2**20
_NODE_START_S = 180.0
_SERVICE_START_S = 90.0
_GROUPS_S = 600.0
"""Two groups start in a minute and a half on two idle cores."""
_LOST_S = 60.0
"""The controller needs about 12 s: three probes of 3 s. Ray needs up to 18 s, see below."""
_NODE_ENDS_S = 150.0
"""The time set below counts from when Ray notices that the head is silent, about a minute."""
_ANSWER_S = 90.0
_QUICK_RAY = {
    # The head gives up a node after three health checks.
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "5000",
    "RAY_health_check_failure_threshold": "3",
    # And a node ends itself when it has not reached the head for so long.
    "RAY_grpc_client_keepalive_timeout_ms": "10000",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "10",
}


@dataclass(frozen=True)
class SystemOnHosts(RunningSystem):
    """Its process is the controller; it and the gateway run beside the hosts."""

    hosts: tuple[Host, ...]

    def log(self, name: str) -> str:
        return super().log("controller" if name == "up" else name)

    def group_in(self, pool: str, state: str | None = None) -> dict[str, Any] | None:
        return next((group for group in self.groups(state) if group["pool"] == pool), None)

    def reasons(self) -> str:
        """Of the newest decisions."""
        answer = httpx.get(
            f"{self.controller_url}/v1/decisions?limit=100", headers=self.mesh_headers, timeout=10
        )
        return "\n".join(each["reason"] for each in answer.raise_for_status().json()["decisions"])

    def shown_status(self) -> str:
        shown = self.run(
            *("status", "--once", "--platform", "test", "--controller-url", self.controller_url)
        ).stdout
        return " ".join(shown.split())


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SystemOnHosts]:
    """Two groups: the one in pool cheap is on two hosts, as no host has room for both its ranks."""
    interfaces = machine_interfaces()
    with (
        network_of_hosts("a", "b", "c") as hosts,
        system_on(hosts, tmp_path_factory.mktemp("hosts")) as started,
    ):
        started.until_groups(2, _GROUPS_S)
        yield started
    assert host_namespaces() == []
    assert set(machine_interfaces()) <= set(interfaces)
    assert wait_until_gone(_MARKER, 0.0) == []


@pytest.fixture(scope="module")
def client(system: SystemOnHosts) -> openai.OpenAI:
    return openai.OpenAI(
        base_url=f"{system.gateway_url}/v1",
        api_key=system.new_key("hosts"),
        max_retries=0,
        timeout=_ANSWER_S,
    )


@dataclass(frozen=True, slots=True)
class Answer:
    tokens: list[int]
    logprobs: list[float]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> list[Answer]:
    """What transformers answers to the beginnings, in one process without expert parallelism."""
    folder = tmp_path_factory.mktemp("one-process")
    job, result = folder / "job.json", folder / "result.json"
    waves = [[(0, tokens) for tokens in prompts()]]
    step = Step("reference", "transformers", str(MODEL_FOLDER), waves, TOKENS)
    job.write_text(json.dumps([asdict(step)]))
    child = REPOSITORY / "tests/integration/engine_process.py"
    subprocess.run(
        [sys.executable, child, job, result],
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        check=True,
        timeout=300,
    )
    completions = json.loads(result.read_text())["reference"]["completions"]
    return [
        Answer(
            each["tokens"],
            [likely[str(t)] for t, likely in zip(each["tokens"], each["logprobs"], strict=True)],
        )
        for each in completions
    ]


def test_a_group_over_two_hosts_answers_as_one_process_does(
    system: SystemOnHosts, client: openai.OpenAI, one_process: list[Answer]
) -> None:
    group = system.group_in("cheap", "ready")
    assert group is not None
    urls = [rank["base_url"] for rank in group["ranks"]]
    assert len(set(map(ip_of, urls))) == 2, urls
    assert_same_answers(client, one_process)
    shares = [expert_tokens(system, url) for url in urls]
    assert [len(share) for share in shares] == [8, 8]
    assert len(shares[0].keys() | shares[1].keys()) == 16


def test_a_host_that_is_cut_off_costs_no_request_and_its_group_comes_back_on_the_others(
    system: SystemOnHosts, client: openai.OpenAI, one_process: list[Answer]
) -> None:
    """Found: no request fails. One that is in the lost group when the link goes is silent until the
    controller gives the group up after about 12 s, and is then answered by the other group; a new
    one fails to connect and moves on after 2 s. A stream that has begun ends with an error event.
    Serve restarts the gang by itself, under its old name, on the hosts that are left.
    """
    cut = host_of_cheap_group(system)
    with Traffic(client) as traffic, ThreadPoolExecutor(8) as pool:
        streams = [Stream(client) for _ in range(8)]
        ends = [pool.submit(stream.run) for stream in streams]
        for stream in streams:
            assert stream.began.wait(_ANSWER_S)
        cut_s = time.monotonic()
        cut.cut_link()
        until_lost(system)
        lost_s = time.monotonic()
        broken = ended_with_error(streams, ends)
        system.until_groups(2, _GROUPS_S)
        replaced_s = time.monotonic()
        answered = traffic.answered
        wait_until(lambda: traffic.answered > answered + 5, 60, "requests go on")
    print(
        f"\nlost after {lost_s - cut_s:.1f} s, replaced after {replaced_s - cut_s:.1f} s; "
        f"{traffic.answered} answers, the slowest after {traffic.slowest_s:.1f} s; "
        f"{len(broken)} of {len(streams)} streams broken"
    )
    assert traffic.failures == []
    assert traffic.slowest_s < _LOST_S
    assert 0 < len(broken) < len(streams), "streams of one group break, those of the other do not"
    for error, ended_s in broken:
        assert "broke off" in error and ended_s - cut_s < _LOST_S, (error, ended_s - cut_s)
    assert "is lost:" in system.reasons()

    group = system.group_in("cheap", "ready")
    assert group is not None
    ips = {ip_of(rank["base_url"]) for rank in group["ranks"]}
    assert len(ips) == 2 and cut.ip not in ips
    assert_same_answers(client, one_process)
    wait_until(
        lambda: not rank_processes(cut),
        _NODE_ENDS_S,
        "the host that was cut off has ended its rank",
        lambda: str(rank_processes(cut)),
    )


def test_a_pool_that_has_lost_its_room_is_named_and_the_other_group_goes_on(
    system: SystemOnHosts, client: openai.OpenAI
) -> None:
    """Found: Serve deletes the application of the lost group within seconds, though a replica of
    it cannot be reached, so nothing of it is left to hold up a group that there is room for."""
    cut = host_of_cheap_group(system)
    with Traffic(client) as traffic:
        wait_until(lambda: traffic.answered > 3, 60, "requests are answered")
        cut_s = time.monotonic()
        cut.cut_link()
        wait_until(
            lambda: "pending: no room in pool cheap" in system.shown_status(),
            _LOST_S,
            "status names what is missing",
            system.describe,
        )
        pending_s = time.monotonic()
        wait_until(
            lambda: [group["pool"] for group in system.groups()] == ["dear"],
            60,
            "the lost group is gone",
            system.describe,
        )
        gone_s = time.monotonic()
        answered = traffic.answered
        wait_until(lambda: traffic.answered > answered + 5, 60, "requests go on")
    print(
        f"\npending after {pending_s - cut_s:.1f} s, gone after {gone_s - cut_s:.1f} s; "
        f"{traffic.answered} answers, the slowest after {traffic.slowest_s:.1f} s"
    )
    assert traffic.failures == []
    assert "(1 of 2 workers free)" in system.shown_status()


# Requests


class Traffic:
    """A steady stream of short requests from two clients."""

    def __init__(self, client: openai.OpenAI) -> None:
        self._client = client
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(2)]
        self.answered = 0
        self.failures: list[str] = []
        self.slowest_s = 0.0

    def __enter__(self) -> "Traffic":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(2 * _ANSWER_S)

    def _run(self) -> None:
        while not self._stop.wait(0.2):
            sent_s = time.monotonic()
            try:
                self._client.completions.create(model=MODEL, prompt=BEGINNINGS[0], max_tokens=8)
                self.answered += 1
            except openai.OpenAIError as error:
                self.failures.append(f"after {time.monotonic() - sent_s:.1f} s: {error}")
            self.slowest_s = max(self.slowest_s, time.monotonic() - sent_s)


@dataclass(eq=False, slots=True)
class Stream:
    client: openai.OpenAI
    began: threading.Event = field(default_factory=threading.Event)

    def run(self) -> tuple[str, float]:
        """The error that ended it, or nothing, and when it ended."""
        try:
            for _ in self.client.completions.create(
                model=MODEL,
                prompt=BEGINNINGS[0],
                max_tokens=400,
                stream=True,
                extra_body={"ignore_eos": True},
            ):
                self.began.set()
        except openai.OpenAIError as error:
            return str(error), time.monotonic()
        return "", time.monotonic()


def ended_with_error(
    streams: list[Stream], ends: list[Future[tuple[str, float]]]
) -> list[tuple[str, float]]:
    results = [end.result(_ANSWER_S) for end in ends]
    assert len(results) == len(streams)
    return [(error, ended_s) for error, ended_s in results if error]


def prompts() -> list[list[int]]:
    tokenizer = Tokenizer.from_file(str(MODEL_FOLDER / "tokenizer.json"))
    return [tokenizer.encode(text, add_special_tokens=False).ids for text in BEGINNINGS]


def assert_same_answers(client: openai.OpenAI, expected: list[Answer]) -> None:
    for text, prompt, other in zip(BEGINNINGS, prompts(), expected, strict=True):
        answer = client.completions.create(
            model=MODEL,
            prompt=prompt,
            max_tokens=TOKENS,
            temperature=0,
            logprobs=1,
            extra_body={"ignore_eos": True, "return_tokens_as_token_ids": True},
        )
        logprobs = answer.choices[0].logprobs
        assert logprobs is not None and logprobs.tokens and logprobs.token_logprobs
        tokens = [int(token.removeprefix("token_id:")) for token in logprobs.tokens]
        assert tokens == other.tokens, text
        for found, known in zip(logprobs.token_logprobs, other.logprobs, strict=True):
            assert abs(found - known) < LOGPROB_TOLERANCE, text


# Hosts and groups


def ip_of(url: str) -> str:
    return url.removeprefix("http://").partition(":")[0]


def expert_tokens(system: SystemOnHosts, rank_url: str) -> dict[str, int]:
    """Of the rank's own experts, once some of them have got tokens; counted every few seconds."""

    def counts() -> dict[str, int]:
        tokens = dict(system.rank(rank_url, "/em/info")["expert_tokens"])
        return tokens if any(tokens.values()) else {}

    return wait_until(counts, 60, f"experts of {rank_url} have got tokens")


def host_of_cheap_group(system: SystemOnHosts) -> Host:
    """One that holds a rank of the group in pool cheap, and not Ray's head."""
    group = system.group_in("cheap", "ready")
    assert group is not None
    ips = {ip_of(rank["base_url"]) for rank in group["ranks"]}
    return next(host for host in system.hosts[1:] if host.ip in ips)


def rank_processes(host: Host) -> list[str]:
    """Without Ray's agents, which hold little and try for another minute to report the end."""
    names = []
    for process in host.processes():
        with contextlib.suppress(psutil.Error):
            names.append(process.name())
    return [name for name in names if name.startswith(("raylet", "ray::Serve", "VLLM"))]


def until_lost(system: SystemOnHosts) -> None:
    wait_until(
        lambda: system.group_in("cheap", "ready") is None,
        _LOST_S,
        "the group is seen to be lost",
        system.describe,
    )


# The system


@contextlib.contextmanager
def system_on(hosts: tuple[Host, ...], folder: Path) -> Iterator[SystemOnHosts]:
    """Ray's head, two slots of pool dear and one of pool cheap on the first host; one slot of pool
    cheap on each of the others."""
    ports = free_ports(2)
    files = write_manifests(folder, ports)
    state = StateDir(folder / ".expertmesh" / "test")
    state.create()
    first = hosts[0]
    with ray_folder() as ray_temp:
        environment = environment_of(files, state, ray_temp)
        services: list[subprocess.Popen[bytes]] = []
        try:
            start_node(first, "head", 0, environment, ray_temp)
            with ThreadPoolExecutor() as starters:
                nodes = [(first, "dear", 2), *((host, "cheap", 1) for host in hosts)]
                starts = [
                    starters.submit(start_node, *node, environment, ray_temp, head=first)
                    for node in nodes
                ]
            for start in starts:
                start.result()
            dashboard_url = f"http://{first.ip}:{_DASHBOARD_PORT}"
            controller_url, gateway_url = (f"http://127.0.0.1:{port}" for port in ports)
            manifests = [part for file in files for part in ("-f", str(file))]
            arguments = {
                "controller": [*manifests, "--dashboard-url", dashboard_url],
                "gateway": ["--controller-url", controller_url, "--port", str(ports[1])],
            }
            services = [
                start_service(name, arguments[name], state, environment) for name in arguments
            ]
            system = SystemOnHosts(
                process=services[0],
                folder=folder,
                platform_file=files[0],
                deployment_file=files[1],
                gateway_url=gateway_url,
                controller_url=controller_url,
                dashboard_url=dashboard_url,
                hosts=hosts,
            )
            wait_until(lambda: is_up(system), _SERVICE_START_S, "gateway and controller answer")
            yield system
        finally:
            for service in reversed(services):
                service.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    service.wait(20)
            end_processes(_MARKER, 1.0)


@contextlib.contextmanager
def ray_folder() -> Iterator[Path]:
    """Also ends what a killed run has left."""
    end_processes(_MARKER, 0.0)
    for left in Path(tempfile.gettempdir()).glob(f"{_MARKER}-*"):
        shutil.rmtree(left)
    folder = Path(tempfile.mkdtemp(prefix=f"{_MARKER}-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def environment_of(files: tuple[Path, Path], state: StateDir, ray_temp: Path) -> dict[str, str]:
    """That of a local system, but for what ties it to the loopback interface."""
    local = LocalSystem(load_system(list(files)), list(files), print)
    local.state = state
    return {
        **os.environ,
        **local._node_environment(),
        MARKER_VARIABLE: _MARKER,
        # A variable of Ray that may turn every address of a node into the loopback one.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1",
        "GLOO_SOCKET_IFNAME": HOST_INTERFACE,
        "VLLM_RPC_BASE_PATH": str(ray_temp),
        **_QUICK_RAY,
    }


def start_node(
    host: Host,
    pool: str,
    slots: int,
    environment: Mapping[str, str],
    ray_temp: Path,
    head: Host | None = None,
) -> None:
    if head is None:
        role = [
            *("--head", f"--port={_GCS_PORT}", "--no-monitor", "--include-dashboard=true"),
            *(f"--dashboard-host={host.ip}", f"--dashboard-port={_DASHBOARD_PORT}"),
        ]
    else:
        role = [f"--address={head.ip}:{_GCS_PORT}", f"--labels=expertmesh.io/pool={pool}"]
    # Nodes of one host differ in their ports. They are chosen here because a raylet waits only 15 s
    # for those that its agents choose, which a machine with two busy cores may exceed.
    first_port = {"head": 20000, "dear": 20010, "cheap": 20020}[pool]
    done = host.run(
        [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", *role),
            *(f"--node-ip-address={host.ip}", f"--num-cpus={slots}", "--num-gpus=0"),
            *(f"--{name}-port={first_port + n}" for n, name in enumerate(_AGENT_PORTS)),
            f"--runtime-env-agent-port={first_port + len(_AGENT_PORTS)}",
            *("--min-worker-port=0", "--max-worker-port=0"),
            # Nodes that share a folder race for the names of their sockets.
            f"--temp-dir={ray_temp / f'{host.name}-{pool}'}",
            *(f"--object-store-memory={_OBJECT_STORE_BYTES}", "--include-log-monitor=false"),
        ],
        {**environment, "VLLM_HOST_IP": host.ip},
        _NODE_START_S,
    )
    assert done.returncode == 0, f"ray start on host {host.name}:\n{done.stdout[-4000:]}"


def start_service(
    name: str, arguments: list[str], state: StateDir, environment: Mapping[str, str]
) -> "subprocess.Popen[bytes]":
    with (state.logs / f"{name}.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "expertmesh", name, *arguments],
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def is_up(system: SystemOnHosts) -> bool:
    assert system.process.poll() is None, system.log("controller")
    with contextlib.suppress(httpx.HTTPError):
        urls = (system.gateway_url, system.controller_url)
        return all(httpx.get(f"{url}/healthz").status_code == 200 for url in urls)
    return False


def write_manifests(folder: Path, ports: list[int]) -> tuple[Path, Path]:
    cheap = {"name": "cheap", "usd_per_node_hour": 0.30, "cpus_per_node": 1}
    dear = {"name": "dear", "usd_per_node_hour": 0.90, "cpus_per_node": 2}
    platform = {
        "kind": "Platform",
        "name": "test",
        "pools": [
            cheap | {"market": "local", "nodes": {"min": 3, "max": 3}},
            dear | {"market": "local", "nodes": {"min": 1, "max": 1}},
        ],
        "controller": {"port": ports[0]},
        "gateway": {"port": ports[1]},
        "ray_dashboard_port": _DASHBOARD_PORT,
    }
    deployment = yaml.safe_load((REPOSITORY / "deployments/tiny-moe.yaml").read_text())
    deployment["model"]["source"] = str(MODEL_FOLDER)
    deployment["pools"] = ["cheap", "dear"]
    deployment["scaling"] |= {"groups": {"min": 2, "max": 2}}
    # In float32 the answers of one process and of two hosts can be compared exactly.
    engine = {"dtype": "float32", "kv_cache_memory_bytes": 64 * 2**20}
    deployment["engine"] = deployment.get("engine", {}) | engine
    files = folder / "platform.yaml", folder / "tiny-moe.yaml"
    for file, manifest in zip(files, (platform, deployment), strict=True):
        file.write_text(yaml.safe_dump(manifest))
    return files
