"""Write the chart's values.schema.json from the manifest models and from the chart's own keys.

Run `python -m helm.generate_schema` in the repository root after a change of either.
"""

# ruff: noqa: RUF012  (pydantic copies a field's default for each object)

import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from expertmesh.spec.deployment import DeploymentManifest
from expertmesh.spec.manifest import ManifestModel
from expertmesh.spec.platform import PlatformManifest

SCHEMA_FILE = Path(__file__).parent / "expertmesh" / "values.schema.json"

SecretName = Annotated[str, Field(pattern=r"^([a-z0-9]([a-z0-9.-]*[a-z0-9])?)?$", max_length=253)]
Quantity = Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$")]
EnvName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
Port = Annotated[int, Field(ge=1, le=65535)]
Seconds = Annotated[int, Field(ge=0)]


class ChartModel(ManifestModel):
    model_config = ConfigDict(use_attribute_docstrings=True)


class Image(ChartModel):
    repository: Annotated[str, Field(min_length=1)]
    tag: str = ""
    """The chart's appVersion when empty."""
    digest: Annotated[str, Field(pattern=r"^(sha256:[0-9a-f]{64})?$")] = ""
    """Wins over the tag."""
    pullPolicy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"


class Images(ChartModel):
    gateway: Image
    """Gateway and controller, from deployments/docker/Dockerfile.gateway."""
    ray: Image
    """Ray's head and workers, from deployments/docker/Dockerfile.ray."""


class PullSecret(ChartModel):
    name: SecretName


class MeshSecret(ChartModel):
    """The secret that gateway, controller and ranks share."""

    existingSecret: SecretName = ""
    key: str = "mesh_token"
    value: str = ""
    """Makes the chart create the Secret; for trials, as the value then stands in the release."""


class RaySecret(ChartModel):
    """Ray's own token; KubeRay wants the data key auth_token."""

    existingSecret: SecretName = ""
    value: str = ""
    """Makes the chart create the Secret; for trials, as the value then stands in the release."""


class HuggingFaceSecret(ChartModel):
    existingSecret: SecretName = ""
    """Empty for models that need no token."""
    key: str = "HF_TOKEN"


class Secrets(ChartModel):
    mesh: MeshSecret
    ray: RaySecret
    huggingFace: HuggingFaceSecret


class Sqlite(ChartModel):
    size: Quantity = "1Gi"
    storageClassName: str = ""
    """The cluster's default class when empty."""


class Store(ChartModel):
    """Keys, ledger and journal."""

    existingSecret: SecretName = ""
    """A Secret with an SQLAlchemy URL (postgresql+asyncpg://…); SQLite on a volume when empty."""
    key: str = "url"
    sqlite: Sqlite


class Resources(ChartModel):
    requests: dict[str, Quantity | int | float] = {}
    limits: dict[str, Quantity | int | float] = {}
    claims: list[dict[str, Any]] = []
    """Of devices (DRA), by the names in podSpec.resourceClaims."""


class Pods(ChartModel):
    """What every kind of pod lets one set; the values are Kubernetes' own objects."""

    resources: Resources | None = None
    env: dict[EnvName, str] = {}
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}
    nodeSelector: dict[str, str] = {}
    tolerations: list[dict[str, Any]] = []
    affinity: dict[str, Any] = {}


class Account(ChartModel):
    annotations: dict[str, str] = {}
    """By which clouds give it rights of theirs."""


class ServicePods(Pods):
    priorityClassName: str = ""
    serviceAccount: Account
    volumes: list[dict[str, Any]] = []
    """Beside the chart's own."""
    volumeMounts: list[dict[str, Any]] = []


class Service(ChartModel):
    type: Literal["ClusterIP", "LoadBalancer", "NodePort"] = "ClusterIP"
    port: Port = 80
    annotations: dict[str, str] = {}


class SecretKey(ChartModel):
    """A key of a Secret that exists."""

    name: Annotated[SecretName, Field(min_length=1)]
    key: Annotated[str, Field(min_length=1)]


class UsageJournal(ChartModel):
    """The folder where usage stands between an answer and the ledger, one for each gateway."""

    persistent: bool = False
    """A volume claim for each gateway, which a StatefulSet makes; else an emptyDir, which outlives
    a crash of the gateway but not its pod."""
    size: Quantity = "1Gi"
    storageClassName: str = ""
    """The cluster's default class when empty."""


class Autoscaling(ChartModel):
    """A HorizontalPodAutoscaler; `replicas` is then its own and not rendered."""

    enabled: bool = False
    minReplicas: Annotated[int, Field(ge=1)] = 2
    maxReplicas: Annotated[int, Field(ge=1)] = 10
    queuedRequests: Annotated[int, Field(ge=0)] = 20
    """em_gateway_queued_requests, a pod's average; 0 leaves it out."""
    openRequests: Annotated[int, Field(ge=0)] = 0
    """em_gateway_open_requests, a pod's average; 0 leaves it out."""
    cpuPercent: Annotated[int, Field(ge=0, le=100)] = 0
    """Of the requested CPU; 0 leaves it out."""
    scaleDownStabilizationSeconds: Annotated[int, Field(ge=0, le=3600)] = 600


class DisruptionBudget(ChartModel):
    enabled: bool = True
    maxUnavailable: Annotated[int, Field(ge=1)] = 1
    """At least one, so that it never blocks a drain."""


class IngressHost(ChartModel):
    host: Annotated[str, Field(min_length=1)]
    path: Annotated[str, Field(pattern="^/")] = "/"


class IngressTls(ChartModel):
    secretName: Annotated[SecretName, Field(min_length=1)]
    hosts: Annotated[list[str], Field(min_length=1)]


class Ingress(ChartModel):
    enabled: bool = False
    className: str = ""
    """The cluster's default class when empty."""
    annotations: dict[str, str] = {}
    hosts: list[IngressHost] = []
    tls: list[IngressTls] = []


class ParentRef(ChartModel):
    """A Gateway, or one listener of it."""

    name: Annotated[str, Field(min_length=1)]
    namespace: str | None = None
    sectionName: str | None = None
    port: Port | None = None


class RouteTimeouts(ChartModel):
    request: str | None = None
    backendRequest: str | None = None


class HttpRoute(ChartModel):
    """A route of the Gateway API."""

    enabled: bool = False
    annotations: dict[str, str] = {}
    parentRefs: list[ParentRef] = []
    hostnames: list[str] = []
    timeouts: RouteTimeouts


class Drain(ChartModel):
    """How a gateway ends."""

    delaySeconds: Seconds = 5
    """It goes on as before, until load balancers have noticed."""
    timeoutSeconds: Annotated[int, Field(ge=1)] = 120
    """Then open requests, streams too, may run for so long."""


class Gateway(ServicePods):
    replicas: Annotated[int, Field(ge=1)] = 1
    """Without autoscaling."""
    autoscaling: Autoscaling
    podDisruptionBudget: DisruptionBudget
    ingress: Ingress
    httpRoute: HttpRoute
    service: Service
    secretEnv: dict[EnvName, SecretKey] = {}
    """Variables from Secrets: the keys of external pools and the URL of Redis, which the platform
    manifest knows by the names of their variables."""
    journal: UsageJournal
    drain: Drain
    terminationGracePeriodSeconds: Seconds | None = None
    """As long as the drain and 15 seconds for the ledger need, unless given."""


class Rbac(ChartModel):
    create: bool = True
    """Role and RoleBinding of the controller."""
    clusterRole: bool = True
    """Lets it read nodes, where spotNotices name kubernetes."""


class Controller(ServicePods):
    replicas: Annotated[int, Field(ge=1)] = 2
    """One leads."""
    lease: Literal["kubernetes", "database"] = "kubernetes"
    """By what they agree on a leader."""
    keepDecisions: Annotated[str, Field(pattern=r"^[1-9][0-9]{0,5}[smhdw]$")] = "30d"
    """How long decisions stay in the journal."""
    gatewayUrl: Annotated[str, Field(pattern=r"^(https?://[A-Za-z0-9.:\[\]-]+/?)?$")] = ""
    """Where browsers reach the gateway, for the console's chat; no chat when empty. The gateway
    must allow the console's origin (platform.gateway.cors_origins)."""
    spotNotices: list[Annotated[str, Field(pattern="^(kubernetes$|https?://)")]] = ["kubernetes"]
    """Sources of the news that a node will be taken away."""
    rbac: Rbac
    podDisruptionBudget: DisruptionBudget
    terminationGracePeriodSeconds: Seconds = 30


class PodSpec(ChartModel):
    """Fields of Kubernetes' PodSpec that the chart itself does not set."""

    dnsConfig: dict[str, Any] | None = None
    dnsPolicy: Literal["ClusterFirst", "ClusterFirstWithHostNet", "Default", "None"] | None = None
    hostAliases: list[dict[str, Any]] | None = None
    hostIPC: bool | None = None
    hostNetwork: bool | None = None
    hostPID: bool | None = None
    initContainers: list[dict[str, Any]] | None = None
    priorityClassName: str | None = None
    resourceClaims: list[dict[str, Any]] | None = None
    runtimeClassName: str | None = None
    schedulerName: str | None = None
    schedulingGates: list[dict[str, Any]] | None = None
    serviceAccountName: str | None = None
    shareProcessNamespace: bool | None = None
    topologySpreadConstraints: list[dict[str, Any]] | None = None


class HeadBudget(ChartModel):
    enabled: bool = False
    """Nobody evicts the head: a drain of its node waits until somebody deletes the pod."""


class WorkersBudget(ChartModel):
    """Of one pool. With it a drain of a node waits until the group on it has gone."""

    enabled: bool | None = None
    minAvailable: Annotated[int, Field(ge=1)] | None = None
    """Workers that stay; all that the pool may have unless given."""


class RayPods(Pods):
    image: Image | None = None
    """In place of images.ray."""
    podSecurityContext: dict[str, Any] = {}
    podSpec: PodSpec | None = None
    """Further fields of the pods."""
    sharedMemory: Quantity | None = None
    """Size of /dev/shm, where Ray's object store lives."""
    rayStartParams: dict[str, str] = {}
    securityContext: dict[str, Any] = {}
    volumes: list[dict[str, Any]] = []
    volumeMounts: list[dict[str, Any]] = []
    terminationGracePeriodSeconds: Seconds | None = None


class Head(RayPods):
    podDisruptionBudget: HeadBudget


class Workers(RayPods):
    podDisruptionBudget: WorkersBudget | None = None
    """Of the pool's workers; spot pools have none."""
    idleTimeoutSeconds: Seconds | None = None
    """An idle node of the pool is given back after this long; ray.idleTimeoutSeconds when unset."""
    spotTerminationGracePeriodSeconds: Seconds | None = None
    """Of pools with market: spot, whose nodes are gone soon after the notice."""


class Autoscaler(ChartModel):
    resources: Resources


class Migrations(ChartModel):
    """A Job before each install and upgrade, with store.existingSecret."""

    enabled: bool = True
    activeDeadlineSeconds: Annotated[int, Field(ge=1)] = 600
    resources: Resources


class CacheClaim(ChartModel):
    existingClaim: SecretName = ""
    """The chart makes a claim when empty, which `helm uninstall` leaves."""
    size: Quantity = "1Ti"
    storageClassName: str = ""
    """The cluster's default class when empty."""
    accessModes: Annotated[
        list[Literal["ReadWriteMany", "ReadWriteOnce", "ReadOnlyMany"]], Field(min_length=1)
    ] = ["ReadWriteMany"]


class ModelCache(ChartModel):
    """Where workers keep downloaded models."""

    type: Literal["emptyDir", "hostPath", "persistentVolumeClaim"] = "emptyDir"
    mountPath: Annotated[str, Field(pattern="^/.+")] = "/models"
    sizeLimit: Quantity | Literal[""] = ""
    """Of the emptyDir."""
    hostPath: Annotated[str, Field(pattern="^/.+")] = "/var/lib/expertmesh/models"
    claim: CacheClaim


class RayRedis(ChartModel):
    address: str = ""
    """host:port; empty: Ray's head keeps its state in memory."""
    existingSecret: SecretName = ""
    """With the password; empty: Redis asks for none."""
    key: str = "password"


class Ray(ChartModel):
    version: Annotated[str, Field(pattern=r"^\d+\.\d+\.\d+$")]
    """The version in the Ray image; KubeRay's token authentication asks for it."""
    upgradeStrategy: Literal["None", "Recreate"] = "None"
    """None: running pods keep their old spec. Recreate: a change deletes all Ray pods at once."""
    idleTimeoutSeconds: Seconds = 600
    acceleratorResource: str = "nvidia.com/gpu"
    """Kubernetes' name of the accelerators that pools count."""
    env: dict[EnvName, str] = {}
    """For head and workers."""
    redis: RayRedis
    autoscaler: Autoscaler
    head: Head
    workerDefaults: Workers
    workers: dict[str, Workers] = {}
    """By pool name; merged over workerDefaults."""


class EgressPart(ChartModel):
    to: list[dict[str, Any]] = []
    """NetworkPolicy peers; everywhere when empty."""
    ports: Annotated[list[Port], Field(min_length=1)]


class MoreEgress(ChartModel):
    """NetworkPolicy egress rules of your own, e.g. to an object storage inside the network."""

    gateway: list[dict[str, Any]] = []
    controller: list[dict[str, Any]] = []
    ray: list[dict[str, Any]] = []
    """Head and workers."""


class Egress(ChartModel):
    """To whom our pods may open connections, beside each other; each part only for those pods that
    need it with these values."""

    enabled: bool = False
    dns: EgressPart
    kubernetesApi: EgressPart
    """Controllers, and the autoscaler in Ray's head."""
    store: EgressPart
    """PostgreSQL: gateways, controllers, migrations."""
    redis: EgressPart
    """Gateways with limits.store: redis; Ray's head with ray.redis."""
    internet: EgressPart
    """External pools (gateways), models by name (controllers, Ray), spot notices by URL."""
    traces: EgressPart
    """The collector of monitoring.traces."""
    more: MoreEgress


class NetworkPolicy(ChartModel):
    """Who may open connections to our pods; the lists are NetworkPolicy peers."""

    enabled: bool = True
    gatewayFrom: list[dict[str, Any]] = []
    """Everybody when empty."""
    controllerFrom: list[dict[str, Any]] = []
    """Beside the gateways."""
    dashboardFrom: list[dict[str, Any]] = []
    """Of Ray, beside the controller."""
    metricsFrom: list[dict[str, Any]] = []
    """Prometheus."""
    egress: Egress


class Monitor(ChartModel):
    enabled: bool = False
    interval: Annotated[str, Field(pattern=r"^[0-9]+(ms|s|m)$")] = "15s"
    labels: dict[str, str] = {}
    """Those that your Prometheus operator selects by."""


class RuleMonitor(ChartModel):
    """The alerts of files/alerts.yaml."""

    enabled: bool = False
    labels: dict[str, str] = {}
    """Those that your Prometheus operator selects by."""
    runbooks: str = "docs/operations.md"
    """Where alerts link to, with the section behind a `#`: a page that your people can open."""


class Dashboards(ChartModel):
    """A ConfigMap for each dashboard."""

    enabled: bool = False
    labels: dict[str, str] = {"grafana_dashboard": "1"}
    """Those that Grafana's sidecar selects by."""
    annotations: dict[str, str] = {}


class Traces(ChartModel):
    """Spans of requests and of decisions."""

    endpoint: Annotated[str, Field(pattern=r"^(https?://\S+)?$")] = ""
    """Base URL of an OTLP/HTTP collector; no traces when empty."""
    ratio: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Share of requests traced, where the client has not decided."""


class Monitoring(ChartModel):
    serviceMonitor: Monitor
    """Gateway and controller."""
    podMonitor: Monitor
    """Ray's head and workers, and in their metrics the engines'."""
    prometheusRule: RuleMonitor
    dashboards: Dashboards
    traces: Traces


class ChatTest(ChartModel):
    existingSecret: SecretName = ""
    """With a key of the gateway; the test is left out when empty."""
    key: str = "key"
    model: str = ""
    """The first model when empty."""


class Tests(ChartModel):
    """Of `helm test`."""

    chat: ChatTest


class ChartValues(ChartModel):
    nameOverride: Annotated[
        str, Field(pattern=r"^([a-z]([a-z0-9-]*[a-z0-9])?)?$", max_length=40)
    ] = ""
    """Replaces <release>-expertmesh as the first part of all names."""
    images: Images
    imagePullSecrets: list[PullSecret] = []
    platform: PlatformManifest
    """The Platform manifest, as in deployments/."""
    models: Annotated[list[DeploymentManifest], Field(min_length=1)]
    """ModelDeployment manifests, as in deployments/."""
    secrets: Secrets
    store: Store
    gateway: Gateway
    controller: Controller
    migrations: Migrations
    modelCache: ModelCache
    ray: Ray
    networkPolicy: NetworkPolicy
    monitoring: Monitoring
    tests: Tests
    extraObjects: list[dict[str, Any] | str] = []
    """Rendered with this chart's own; strings, and values within maps, may be templates."""


def build_schema() -> dict[str, Any]:
    schema = ChartValues.model_json_schema()
    definitions = schema["$defs"]
    # Both addresses are the containers' too, so the values must spell them out.
    definitions["PlatformManifest"]["required"] += ["gateway", "controller"]
    for listener in ("Listener", "GatewayManifest"):
        definitions[listener]["required"].append("host")
    _tidy(schema)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _tidy(node: Any) -> None:
    """Drop titles, which repeat keys, and defaults, which values.yaml holds; close key patterns."""
    if isinstance(node, dict):
        if isinstance(node.get("title"), str):
            del node["title"]
        if "patternProperties" in node:
            node["additionalProperties"] = False
        node.pop("default", None)
        for value in node.values():
            _tidy(value)
    elif isinstance(node, list):
        for value in node:
            _tidy(value)


def render_schema() -> str:
    return json.dumps(build_schema(), indent=2) + "\n"


if __name__ == "__main__":
    SCHEMA_FILE.write_text(render_schema())
    sys.stdout.write(f"wrote {SCHEMA_FILE.relative_to(Path.cwd())}\n")
