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


class Pods(ChartModel):
    """What every kind of pod lets one set; the values are Kubernetes' own objects."""

    resources: Resources | None = None
    env: dict[EnvName, str] = {}
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}
    nodeSelector: dict[str, str] = {}
    tolerations: list[dict[str, Any]] = []
    affinity: dict[str, Any] = {}


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


class Gateway(Pods):
    replicas: Annotated[int, Field(ge=1)] = 1
    service: Service
    secretEnv: dict[EnvName, SecretKey] = {}
    """Variables from Secrets: the keys of external pools and the URL of Redis, which the platform
    manifest knows by the names of their variables."""
    journal: UsageJournal
    terminationGracePeriodSeconds: Seconds = 150
    """More than the 120 seconds for which a gateway that stops lets open streams go on."""


class Controller(Pods):
    terminationGracePeriodSeconds: Seconds = 30


class RayPods(Pods):
    sharedMemory: Quantity | None = None
    """Size of /dev/shm, where Ray's object store lives."""
    rayStartParams: dict[str, str] = {}
    securityContext: dict[str, Any] = {}
    volumes: list[dict[str, Any]] = []
    volumeMounts: list[dict[str, Any]] = []
    terminationGracePeriodSeconds: Seconds | None = None


class Workers(RayPods):
    idleTimeoutSeconds: Seconds | None = None
    """An idle node of the pool is given back after this long; ray.idleTimeoutSeconds when unset."""


class Autoscaler(ChartModel):
    resources: Resources


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
    autoscaler: Autoscaler
    head: RayPods
    workerDefaults: Workers
    workers: dict[str, Workers] = {}
    """By pool name; merged over workerDefaults."""


class ChartValues(ChartModel):
    nameOverride: Annotated[str, Field(pattern=r"^([a-z]([a-z0-9-]*[a-z0-9])?)?$")] = ""
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
    ray: Ray


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
