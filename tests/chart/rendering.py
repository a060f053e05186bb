"""Render the chart with the real helm, and read what came out."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).parents[2]
CHART = REPOSITORY / "helm" / "expertmesh"
PROFILES = tuple(sorted((CHART / "profiles").glob("*.yaml")))
EVERYTHING: dict[str, Any] = {
    "store.existingSecret": "expertmesh-store",
    "secrets.huggingFace.existingSecret": "huggingface",
    "imagePullSecrets": [{"name": "registry"}],
    "gateway.replicas": 3,
    "gateway.autoscaling": {"enabled": True, "openRequests": 400, "cpuPercent": 70},
    "gateway.journal.persistent": True,
    "gateway.priorityClassName": "services",
    "gateway.serviceAccount.annotations": {"eks.amazonaws.com/role-arn": "arn:aws:iam::1:role/em"},
    "controller.priorityClassName": "services",
    "controller.volumes": [{"name": "ca", "configMap": {"name": "own-ca"}}],
    "controller.volumeMounts": [{"name": "ca", "mountPath": "/etc/ssl/own", "readOnly": True}],
    "gateway.ingress": {
        "enabled": True,
        "className": "nginx",
        "annotations": {"nginx.ingress.kubernetes.io/proxy-buffering": "off"},
        "hosts": [{"host": "llm.example.com"}],
        "tls": [{"secretName": "llm-tls", "hosts": ["llm.example.com"]}],
    },
    "gateway.httpRoute": {
        "enabled": True,
        "parentRefs": [{"name": "public", "namespace": "gateways"}],
        "hostnames": ["llm.example.com"],
        "timeouts": {"request": "0s"},
    },
    "modelCache": {"type": "persistentVolumeClaim"},
    "ray.redis": {"address": "redis:6379", "existingSecret": "redis", "key": "password"},
    "ray.head.podDisruptionBudget.enabled": True,
    "ray.workerDefaults.podDisruptionBudget.enabled": True,
    "ray.workerDefaults.podSpec": {
        "priorityClassName": "high",
        "hostNetwork": False,
        "serviceAccountName": "reads-models",
    },
    "networkPolicy.gatewayFrom": [{"ipBlock": {"cidr": "10.0.0.0/8"}}],
    "networkPolicy.egress.enabled": True,
    "networkPolicy.dashboardFrom": [{"namespaceSelector": {"matchLabels": {"a": "b"}}}],
    "monitoring.serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
    "monitoring.podMonitor": {"enabled": True},
    "monitoring.prometheusRule": {"enabled": True},
    "monitoring.dashboards": {"enabled": True, "annotations": {"grafana_folder": "ExpertMesh"}},
    "monitoring.traces.endpoint": "http://collector:4318",
    "tests.chat": {"existingSecret": "chat-key"},
    "extraObjects": [
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "{{ .Release.Name }}-own"}}
    ],
}
"""Every part that is off by default, as paths of --set-json."""


@dataclass(frozen=True, slots=True)
class Rendered:
    objects: tuple[dict[str, Any], ...]

    def all(self, kind: str) -> tuple[dict[str, Any], ...]:
        return tuple(each for each in self.objects if each["kind"] == kind)

    def one(self, kind: str, suffix: str = "") -> dict[str, Any]:
        (found,) = (each for each in self.all(kind) if each["metadata"]["name"].endswith(suffix))
        return found

    def pod_templates(self) -> dict[str, dict[str, Any]]:
        """Every pod's metadata and spec, by a name for messages."""
        templates = {
            f"{kind} {each['metadata']['name']}": each["spec"]["template"]
            for kind in ("Deployment", "StatefulSet", "Job")
            for each in self.all(kind)
        }
        templates |= {f"Pod {each['metadata']['name']}": each for each in self.all("Pod")}
        spec = self.one("RayCluster")["spec"]
        templates["Ray head"] = spec["headGroupSpec"]["template"]
        templates |= {
            f"Ray workers {group['groupName']}": group["template"]
            for group in spec["workerGroupSpecs"]
        }
        return templates

    def manifests(self) -> dict[str, str]:
        """File name to text, as the controller finds them in its folder."""
        data: dict[str, str] = self.one("ConfigMap", "-manifests")["data"]
        return data


def helm(*arguments: str) -> subprocess.CompletedProcess[str]:
    beside = Path(sys.executable).with_name("helm")
    program = str(beside) if beside.exists() else shutil.which("helm")
    assert program, "helm is missing: run scripts/install-tools.sh"
    # Nobody's own repositories or plugins take part.
    env = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "HELM_PLUGINS": "/nonexistent"}
    return subprocess.run(
        [program, *arguments], capture_output=True, text=True, timeout=300, check=False, env=env
    )


def helm_template(
    *,
    profile: Path | None = None,
    values: dict[str, Any] | None = None,
    release: str = "em",
    chart: Path = CHART,
) -> subprocess.CompletedProcess[str]:
    """`values` are set key by key, as paths of --set-json."""
    arguments = ["template", release, str(chart), "--namespace", "models"]
    if profile is not None:
        arguments += ["--values", str(profile)]
    for path, value in (values or {}).items():
        arguments += ["--set-json", f"{path}={json.dumps(value)}"]
    return _of_the_chart(*arguments) if chart == CHART else helm(*arguments)


@cache
def _of_the_chart(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The repository's own does not change while tests run, and half of them render the same."""
    return helm(*arguments)


def render(
    *,
    profile: Path | None = None,
    values: dict[str, Any] | None = None,
    release: str = "em",
    chart: Path = CHART,
) -> Rendered:
    done = helm_template(profile=profile, values=values, release=release, chart=chart)
    assert done.returncode == 0, done.stderr
    documents = yaml.load_all(done.stdout, yaml.CSafeLoader)
    return Rendered(tuple(each for each in documents if each))


def effective_values(profile: Path | None = None) -> dict[str, Any]:
    """values.yaml with the profile over it, merged as Helm does."""
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    over = yaml.safe_load(profile.read_text()) if profile else {}
    merged = _merge(values, over)
    assert isinstance(merged, dict)
    return merged


def _merge(base: Any, over: Any) -> Any:
    if isinstance(base, dict) and isinstance(over, dict):
        return base | {key: _merge(base.get(key), value) for key, value in over.items()}
    return over
