"""The Kubernetes client against a mock of the API server (kubernetes_server.py), over HTTP."""

import asyncio
import ssl
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from kubernetes_asyncio.config import incluster_config
from tests.clients.kubernetes_server import (
    EVENTS,
    LEASES,
    NAMESPACE,
    NODES,
    PODS,
    RAY_CLUSTERS,
    TOKEN,
    KubernetesServer,
    kubernetes_server,
)

from expertmesh.clients.kubernetes import api as api_module
from expertmesh.clients.kubernetes import watch as watch_module
from expertmesh.clients.kubernetes.api import KubernetesApi, open_kubernetes
from expertmesh.clients.kubernetes.events import About, EventRecorder, Saying
from expertmesh.clients.kubernetes.lease import URL_ANNOTATION, KubernetesLease
from expertmesh.clients.kubernetes.nodes import node_of
from expertmesh.clients.kubernetes.pods import placed_pod
from expertmesh.clients.kubernetes.ray_cluster import read_ray_cluster
from expertmesh.clients.kubernetes.watch import Watched
from expertmesh.core.domain.lease import LeaseRecord
from expertmesh.errors import SetupError, UpstreamUnavailable

CLAIM = LeaseRecord("one_1", "http://one:8090", 10.0, 1)
NOW_S = 1_780_000_000.5


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[KubernetesServer]:
    async with kubernetes_server(tmp_path) as server:
        yield server


@pytest.fixture
async def api(server: KubernetesServer) -> AsyncIterator[KubernetesApi]:
    opened = await open_kubernetes(server.kubeconfig)
    assert opened is not None
    yield opened
    await opened.close()


# Opening


async def test_a_kubeconfig_gives_server_token_and_namespace(
    server: KubernetesServer, api: KubernetesApi
) -> None:
    server.put(NODES, "n1")
    answer = await api.call("GET", f"{NODES}/n1")
    assert (answer.status, answer.body["metadata"]["name"]) == (200, "n1")
    assert api.namespace == NAMESPACE


async def test_outside_of_a_cluster_there_is_no_client() -> None:
    assert await open_kubernetes() is None


async def test_a_kubeconfig_that_is_no_yaml_is_named(tmp_path: Path) -> None:
    path = tmp_path / "kubeconfig"
    path.write_text("{ never closed")
    with pytest.raises(SetupError, match=str(path)):
        await open_kubernetes(path)
    with pytest.raises(SetupError, match="nowhere"):
        await open_kubernetes(tmp_path / "nowhere")


async def test_a_pod_whose_service_account_is_incomplete_is_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "token").write_text("a token")
    monkeypatch.setattr(api_module, "_TOKEN_FILE", str(tmp_path / "token"))
    monkeypatch.setattr(api_module, "_CERTIFICATE_FILE", str(tmp_path / "ca.crt"))
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "443")
    with pytest.raises(SetupError, match="automountServiceAccountToken"):
        await open_kubernetes()


@pytest.fixture
async def pod(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[KubernetesServer]:
    """This process as in a pod: a server with TLS, and the files of the service account."""
    certificate, key = self_signed("127.0.0.1")
    (tmp_path / "ca.crt").write_bytes(certificate)
    (tmp_path / "key.pem").write_bytes(key)
    (tmp_path / "token").write_text(TOKEN)
    (tmp_path / "namespace").write_text(f"{NAMESPACE}\n")
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(tmp_path / "ca.crt", tmp_path / "key.pem")
    server = KubernetesServer(tmp_path)
    await server.start(tls=tls)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(server.port))
    monkeypatch.setattr(api_module, "_TOKEN_FILE", str(tmp_path / "token"))
    monkeypatch.setattr(api_module, "_CERTIFICATE_FILE", str(tmp_path / "ca.crt"))
    monkeypatch.setattr(api_module, "_NAMESPACE_FILE", tmp_path / "namespace")
    yield server
    await server.stop()


def self_signed(address: str) -> tuple[bytes, bytes]:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "kubernetes")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ip_address(address))]), critical=False
        )
        .sign(key, hashes.SHA256())
    )
    return (
        certificate.public_bytes(serialization.Encoding.PEM),
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        ),
    )


async def test_in_a_pod_its_service_account_is_used(pod: KubernetesServer) -> None:
    pod.put(NODES, "n1")
    api = await open_kubernetes()
    assert api is not None
    assert api.namespace == NAMESPACE
    assert (await api.call("GET", f"{NODES}/n1")).status == 200
    assert await KubernetesLease(api, api.namespace, "em").write(CLAIM) is not None
    await api.close()


async def test_a_token_that_is_rotated_is_read_again(
    pod: KubernetesServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(incluster_config, "TOKEN_REFRESH_PERIOD", timedelta(seconds=0))
    api = await open_kubernetes()
    assert api is not None
    assert (await api.call("GET", NODES)).status == 200
    pod.token = "the next token"
    (tmp_path / "token").write_text(pod.token)
    assert (await api.call("GET", NODES)).status == 200
    await api.close()


async def test_a_server_with_another_certificate_is_not_trusted(
    pod: KubernetesServer, tmp_path: Path
) -> None:
    certificate, _ = self_signed("127.0.0.1")
    (tmp_path / "ca.crt").write_bytes(certificate)
    api = await open_kubernetes()
    assert api is not None
    with pytest.raises(UpstreamUnavailable, match=r"no answer: .*CERTIFICATE_VERIFY_FAILED"):
        await api.call("GET", NODES)
    await api.close()


# Answers


@pytest.mark.parametrize("status", [429, 500, 503])
async def test_a_server_that_cannot_is_out_of_reach(
    server: KubernetesServer, api: KubernetesApi, status: int
) -> None:
    server.failures = [status]
    with pytest.raises(UpstreamUnavailable, match=f"GET {NODES}: {status}: on demand"):
        await api.call("GET", NODES)
    assert (await api.call("GET", NODES)).status == 200


async def test_a_missing_right_names_the_verb(server: KubernetesServer, api: KubernetesApi) -> None:
    server.forbidden.add(("GET", NODES))
    with pytest.raises(UpstreamUnavailable, match=r"GET /api/v1/nodes: 403: .* role with this"):
        await api.call("GET", NODES)


async def test_a_token_that_is_refused_is_named(server: KubernetesServer, tmp_path: Path) -> None:
    path = server.kubeconfig
    path.write_text(path.read_text().replace("a service account's token", "another"))
    api = await open_kubernetes(path)
    assert api is not None
    with pytest.raises(UpstreamUnavailable, match=r"401: .* token valid"):
        await api.call("GET", NODES)
    await api.close()


async def test_a_slow_answer_is_given_up(server: KubernetesServer, api: KubernetesApi) -> None:
    server.delay_s = 5.0
    with pytest.raises(UpstreamUnavailable, match="no answer: TimeoutError"):
        await api.call("GET", NODES, timeout_s=0.1)


async def test_no_server_at_all(server: KubernetesServer, api: KubernetesApi) -> None:
    await server.stop()
    with pytest.raises(UpstreamUnavailable, match="no answer"):
        await api.call("GET", NODES)
    with pytest.raises(UpstreamUnavailable, match="no answer"):
        async for _ in api.lines(NODES, {"watch": "1"}, 1.0):
            pass


# Lease


@pytest.fixture
def lease(api: KubernetesApi) -> KubernetesLease:
    return KubernetesLease(api, NAMESPACE, "em-controller", lambda: NOW_S)


async def test_a_lease_is_created_read_renewed_and_given_back(
    server: KubernetesServer, lease: KubernetesLease
) -> None:
    assert await lease.read() == LeaseRecord(None)
    first = await lease.write(CLAIM)
    assert first is not None
    assert first == replace(CLAIM, version=first.version)
    assert await lease.read() == first
    stored = server.objects[LEASES, "em-controller"]
    assert stored["spec"] == {
        "holderIdentity": "one_1",
        "leaseDurationSeconds": 10,
        "leaseTransitions": 1,
        "renewTime": "2026-05-28T20:26:40.500000Z",
        "acquireTime": "2026-05-28T20:26:40.500000Z",
    }
    second = await lease.write(first)
    assert second is not None
    assert second.version != first.version
    assert await lease.write(replace(second, holder=None, url="", duration_s=0.0)) is not None
    assert (await lease.read()).holder is None
    assert server.objects[LEASES, "em-controller"]["spec"]["leaseDurationSeconds"] == 1


async def test_what_others_wrote_into_the_lease_stays(
    server: KubernetesServer, lease: KubernetesLease
) -> None:
    await lease.write(CLAIM)
    stored = server.objects[LEASES, "em-controller"]
    server.put(
        LEASES,
        "em-controller",
        spec={**stored["spec"], "strategy": "OldestEmulationVersion"},
        metadata={"labels": {"app": "em"}, "annotations": {"a": "b", URL_ANNOTATION: "x"}},
    )
    assert await lease.write(await lease.read()) is not None
    stored = server.objects[LEASES, "em-controller"]
    assert stored["metadata"]["labels"] == {"app": "em"}
    assert stored["metadata"]["annotations"] == {"a": "b", URL_ANNOTATION: "x"}
    assert stored["spec"]["strategy"] == "OldestEmulationVersion"


async def test_of_two_that_write_against_one_version_one_wins(
    server: KubernetesServer, api: KubernetesApi, lease: KubernetesLease
) -> None:
    other = KubernetesLease(api, NAMESPACE, "em-controller")
    answers = await asyncio.gather(
        lease.write(CLAIM), other.write(replace(CLAIM, holder="two_2")), return_exceptions=True
    )
    assert sum(answer is None for answer in answers) == 1
    known = await lease.read()
    assert await other.read() == known
    assert await other.write(replace(known, holder="two_2")) is not None
    assert await lease.write(replace(known, holder="one_1")) is None


async def test_a_lease_that_was_deleted_is_made_anew(
    server: KubernetesServer, lease: KubernetesLease
) -> None:
    first = await lease.write(CLAIM)
    assert first is not None
    server.delete(LEASES, "em-controller")
    assert await lease.write(first) is None
    assert await lease.read() == LeaseRecord(None)
    assert await lease.write(CLAIM) is not None


async def test_a_lease_whose_outcome_is_not_known_says_so(
    server: KubernetesServer, lease: KubernetesLease
) -> None:
    server.failures = [500]
    with pytest.raises(UpstreamUnavailable):
        await lease.write(CLAIM)
    server.forbidden.add(("POST", LEASES))
    with pytest.raises(UpstreamUnavailable, match="403"):
        await lease.write(CLAIM)
    server.put(LEASES, "em-controller", spec={"leaseTransitions": "many"})
    with pytest.raises(UpstreamUnavailable, match="cannot be read"):
        await lease.read()


# Watch


@asynccontextmanager
async def watching(
    api: KubernetesApi, path: str = NODES, selector: str = ""
) -> AsyncIterator[Watched[str]]:
    watched = Watched(api, path, lambda item: str(item.get("data")), selector)
    task = asyncio.create_task(watched.run())
    try:
        yield watched
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def until(what: Callable[[], Any], limit_s: float = 5.0) -> None:
    deadline_s = time.monotonic() + limit_s
    while not what():
        assert time.monotonic() < deadline_s
        await asyncio.sleep(0.01)


async def test_a_watch_begins_with_all_and_follows_every_change(
    server: KubernetesServer, api: KubernetesApi
) -> None:
    server.put(NODES, "n1", data="a")
    async with watching(api) as watched:
        assert not watched.is_known
        await until(lambda: watched.objects == {"n1": "a"} and server.watches)
        server.put(NODES, "n2", data="b")
        server.put(NODES, "n1", data="c")
        await until(lambda: watched.objects == {"n1": "c", "n2": "b"})
        server.delete(NODES, "n2")
        await until(lambda: watched.objects == {"n1": "c"})
        assert (watched.lists, watched.problem) == (1, None)


async def test_a_connection_that_breaks_is_made_anew_without_reading_all(
    server: KubernetesServer, api: KubernetesApi
) -> None:
    async with watching(api) as watched:
        await until(lambda: server.watches)
        server.cut_watches()
        server.put(NODES, "n1", data="meanwhile")
        await until(lambda: watched.objects == {"n1": "meanwhile"})
        assert watched.lists == 1
        await until(lambda: watched.problem is None)


async def test_a_server_that_is_away_for_a_while(
    server: KubernetesServer, api: KubernetesApi
) -> None:
    server.put(NODES, "n1", data="a")
    async with watching(api) as watched:
        await until(lambda: server.watches)
        port = server.port
        await server.stop()
        await until(lambda: watched.problem is not None)
        assert watched.objects == {"n1": "a"}
        server.put(NODES, "n1", data="b")
        await server.start(port)
        await until(lambda: watched.objects == {"n1": "b"}, 15)
        assert watched.problem is None


@pytest.mark.parametrize("as_status", [False, True])
async def test_a_version_that_is_gone_means_reading_all_again(
    server: KubernetesServer, api: KubernetesApi, as_status: bool
) -> None:
    server.gone_as_status = as_status
    server.put(NODES, "n1", data="a")
    server.put(NODES, "n2", data="b")
    async with watching(api) as watched:
        await until(lambda: server.watches)
        server.cut_watches()
        server.delete(NODES, "n2")
        server.put(NODES, "n1", data="c")
        server.compact()
        await until(lambda: watched.objects == {"n1": "c"})
        assert watched.lists == 2


async def test_a_bookmark_saves_reading_all(server: KubernetesServer, api: KubernetesApi) -> None:
    server.put(NODES, "n1", data="a")
    async with watching(api) as watched:
        await until(lambda: server.watches)
        for _ in range(3):
            server.put(PODS, "busy")
        server.bookmark(NODES)
        await until(lambda: watched._version == str(server._version))
        server._oldest = server._version
        server.cut_watches()
        server.put(NODES, "n1", data="b")
        await until(lambda: watched.objects == {"n1": "b"})
        assert watched.lists == 1


async def test_a_watch_ends_in_time_and_goes_on(
    server: KubernetesServer, api: KubernetesApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch_module, "_WATCH_S", 1)
    async with watching(api) as watched:
        await until(lambda: server.requests["WATCH", NODES] >= 2)
        assert watched.problem is None
        assert watched.lists == 1


async def test_a_watch_that_always_ends_at_once_is_not_asked_in_a_hurry(
    server: KubernetesServer, api: KubernetesApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch_module, "_WATCH_S", 0)
    async with watching(api):
        await asyncio.sleep(1.2)
    assert server.requests["WATCH", NODES] <= 3


async def test_long_lists_come_in_pages(server: KubernetesServer, api: KubernetesApi) -> None:
    server.page = 3
    for number in range(8):
        server.put(NODES, f"n{number}", data=str(number))
    async with watching(api) as watched:
        await until(lambda: watched.is_known)
        assert len(watched.objects) == 8
    assert server.requests["GET", NODES] == 3


async def test_only_what_is_selected_is_watched(
    server: KubernetesServer, api: KubernetesApi
) -> None:
    server.put(PODS, "p1", data="a", metadata={"labels": {"ray.io/cluster": "em"}})
    server.put(PODS, "p2", data="b")
    async with watching(api, PODS, "ray.io/cluster=em") as watched:
        await until(lambda: server.watches)
        server.put(PODS, "p3", data="c")
        server.put(PODS, "p4", data="d", metadata={"labels": {"ray.io/cluster": "em"}})
        await until(lambda: watched.objects == {"p1": "a", "p4": "d"})


async def test_a_selector_may_ask_for_a_label_alone(
    server: KubernetesServer, api: KubernetesApi
) -> None:
    server.put(PODS, "p1", data="a", metadata={"labels": {"ray.io/cluster": "em"}})
    server.put(PODS, "p2", data="b")
    async with watching(api, PODS, "ray.io/cluster") as watched:
        await until(lambda: watched.objects == {"p1": "a"})


async def test_a_missing_right_is_a_problem_and_not_an_end(
    server: KubernetesServer, api: KubernetesApi
) -> None:
    server.forbidden.add(("GET", NODES))
    async with watching(api) as watched:
        await until(lambda: watched.problem is not None)
        assert not watched.is_known
        assert "role with this verb" in str(watched.problem)
        server.forbidden.clear()
        await until(lambda: watched.is_known)
        assert watched.problem is None


async def test_nonsense_in_a_list_is_a_problem(
    server: KubernetesServer, api: KubernetesApi
) -> None:
    def keep(item: dict[str, Any]) -> str:
        return str(item["spec"]["providerID"])

    server.put(NODES, "n1")
    watched = Watched(api, NODES, keep)
    task = asyncio.create_task(watched.run())
    await until(lambda: watched.problem is not None)
    assert "cannot be read" in str(watched.problem)
    server.put(NODES, "n1", spec={"providerID": "aws"})
    await until(lambda: watched.objects == {"n1": "aws"})
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


# Pods and the RayCluster


def test_where_a_pod_runs() -> None:
    pod = placed_pod(
        {
            "metadata": {"name": "em-worker-1"},
            "spec": {"nodeName": "n1"},
            "status": {"podIP": "10.1.0.5", "podIPs": [{"ip": "10.1.0.5"}, {"ip": "fd00::5"}]},
        }
    )
    assert (pod.name, pod.node, pod.addresses) == ("em-worker-1", "n1", ("10.1.0.5", "fd00::5"))
    pending = placed_pod({"metadata": {"name": "p"}, "spec": {}, "status": {}})
    assert (pending.node, pending.addresses) == ("", ())


async def test_the_ray_cluster_is_read(server: KubernetesServer, api: KubernetesApi) -> None:
    assert await read_ray_cluster(api, NAMESPACE, "em") is None
    server.put(
        RAY_CLUSTERS,
        "em",
        spec={
            "workerGroupSpecs": [
                {
                    "groupName": "h100-spot",
                    "replicas": 3,
                    "minReplicas": 0,
                    "maxReplicas": 8,
                    "labels": {"expertmesh.io/pool": "h100-spot"},
                }
            ]
        },
        status={
            "desiredWorkerReplicas": 3,
            "readyWorkerReplicas": 2,
            "availableWorkerReplicas": 3,
            "conditions": [
                {"type": "HeadPodReady", "status": "True", "reason": "HeadPodRunningAndReady"},
                {"type": "ReplicaFailure", "status": "True", "message": "quota exceeded"},
            ],
        },
    )
    cluster = await read_ray_cluster(api, NAMESPACE, "em")
    assert cluster is not None
    assert (cluster.wanted_workers, cluster.ready_workers) == (3, 2)
    assert cluster.problems == ("ReplicaFailure: quota exceeded",)
    (group,) = cluster.groups
    assert (group.pool, group.wanted, group.least, group.most) == ("h100-spot", 3, 0, 8)
    server.put(RAY_CLUSTERS, "em", status={})
    with pytest.raises(UpstreamUnavailable, match="cannot be read"):
        await read_ray_cluster(api, NAMESPACE, "em")


# Events


class Clock:
    def __init__(self) -> None:
        self.now_s = NOW_S

    def __call__(self) -> float:
        return self.now_s


def events(server: KubernetesServer) -> list[dict[str, Any]]:
    return [item for (where, _), item in server.objects.items() if where == EVENTS]


async def about() -> About:
    return ABOUT


ABOUT = About("ray.io/v1", "RayCluster", NAMESPACE, "em", "uid-em")
START = Saying("StartGroup", "em-tiny-h100-1: 40 requests wait for more than 30 s")


async def test_an_event_is_about_the_object_and_repeats_are_counted(
    server: KubernetesServer, api: KubernetesApi
) -> None:
    clock = Clock()
    recorder = EventRecorder(api, about, "controller-0", clock)
    await recorder.write(START)
    clock.now_s += 60
    await recorder.write(START)
    (event,) = events(server)
    assert event["involvedObject"]["uid"] == "uid-em"
    assert (event["reason"], event["type"], event["count"]) == ("StartGroup", "Normal", 2)
    assert event["firstTimestamp"] < event["lastTimestamp"]
    await recorder.write(Saying("DrainGroup", "quiet for 5 min", is_warning=True))
    assert sorted(event["type"] for event in events(server)) == ["Normal", "Warning"]


async def test_an_event_that_the_server_has_forgotten_is_written_anew(
    server: KubernetesServer, api: KubernetesApi
) -> None:
    recorder = EventRecorder(api, about, "controller-0", Clock())
    await recorder.write(START)
    server.objects.clear()
    await recorder.write(START)
    (event,) = events(server)
    assert event["count"] == 1


async def test_a_busy_controller_does_not_fill_the_cluster(
    server: KubernetesServer, api: KubernetesApi
) -> None:
    clock = Clock()
    recorder = EventRecorder(api, about, "controller-0", clock)
    for number in range(40):
        await recorder.write(Saying("StartGroup", f"group {number}"))
    assert (len(events(server)), recorder.dropped) == (25, 15)
    clock.now_s += 600
    for number in range(40, 50):
        await recorder.write(Saying("StartGroup", f"group {number}"))
    assert len(events(server)) == 27


async def test_events_that_cannot_be_written_are_in_nobodys_way(
    server: KubernetesServer, api: KubernetesApi, caplog: pytest.LogCaptureFixture
) -> None:
    server.forbidden.add(("POST", EVENTS))
    recorder = EventRecorder(api, about, "controller-0", Clock())
    for _ in range(5):
        await recorder.write(START)
    assert recorder.dropped == 5
    assert sum("events:" in record.getMessage() for record in caplog.records) == 1
    for number in range(200):
        recorder.say(Saying("StartGroup", str(number)))
    assert recorder.dropped == 105


async def test_what_the_events_are_about_may_come_later(
    server: KubernetesServer, api: KubernetesApi
) -> None:
    found: list[About] = []

    async def find() -> About | None:
        return found[0] if found else None

    recorder = EventRecorder(api, find, "controller-0", Clock())
    await recorder.write(START)
    assert (events(server), recorder.dropped) == ([], 1)
    found.append(ABOUT)
    await recorder.write(START)
    assert len(events(server)) == 1


async def test_what_is_said_is_written_in_the_background(
    server: KubernetesServer, api: KubernetesApi
) -> None:
    recorder = EventRecorder(api, about, "controller-0", Clock())
    task = asyncio.create_task(recorder.run())
    recorder.say(replace(START, message="x" * 5000))
    await until(lambda: events(server))
    assert len(events(server)[0]["message"]) == 1024
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


# Nodes are tested in test_kubernetes_nodes.py; here only that a watch keeps them


async def test_nodes_are_kept_as_values(server: KubernetesServer, api: KubernetesApi) -> None:
    server.put(NODES, "n1", metadata={"labels": {"karpenter.sh/capacity-type": "spot"}})
    watched = Watched(api, NODES, node_of)
    task = asyncio.create_task(watched.run())
    await until(lambda: watched.is_known)
    assert watched.objects["n1"].market == "spot"
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
