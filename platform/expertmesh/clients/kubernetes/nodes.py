"""What a Kubernetes node says about itself: machine, place, market, and that it will be taken away.

Sources of the names:
* labels: kubernetes.io "Well-Known Labels"; eks.amazonaws.com/capacityType (EKS managed node
  groups); karpenter.sh/capacity-type; cloud.google.com/gke-spot, gke-preemptible, gke-provisioning
  (GKE "Spot VMs"); kubernetes.azure.com/scalesetpriority (AKS "spot node pool");
* aws-node-termination-handler: pkg/node/node.go (taints, label action-time);
* Karpenter: concepts/disruption (taint karpenter.sh/disrupted; before v1 karpenter.sh/disruption);
* GKE: "Manage GKE node disruption for GPUs and TPUs" (taint impending-node-termination, label
  active-node-maintenance); a Spot VM ends 30 s after its notice;
* AKS: "Node auto-drain" (taint remediator.kubernetes.azure.com/unschedulable) and the conditions of
  its node-problem-detector, whose message holds the time;
* cluster-autoscaler: utils/taints (ToBeDeletedByClusterAutoscaler, whose value is a Unix time).
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import Any

_SPOT_AWS_S = 120.0
_SPOT_OTHERS_S = 30.0
"""Google Cloud and Azure give half a minute."""
_REBALANCE_S = 900.0
"""A recommendation has no time; the node is only likelier to be lost."""
_AUTOSCALER_S = 600.0
"""Cluster-autoscaler waits this long for pods by default (--max-graceful-termination-sec)."""
_MAINTENANCE_S = 3600.0
"""Accelerator nodes of GKE get up to an hour for their pods."""

_TAINTS: Mapping[str, float] = {
    "aws-node-termination-handler/spot-itn": _SPOT_AWS_S,
    "aws-node-termination-handler/rebalance-recommendation": _REBALANCE_S,
    "aws-node-termination-handler/scheduled-maintenance": _SPOT_AWS_S,
    "aws-node-termination-handler/asg-lifecycle-termination": _SPOT_AWS_S,
    "karpenter.sh/disrupted": _SPOT_AWS_S,
    "karpenter.sh/disruption": _SPOT_AWS_S,
    "cloud.google.com/impending-node-termination": _SPOT_OTHERS_S,
    "remediator.kubernetes.azure.com/unschedulable": _SPOT_OTHERS_S,
    "remediator.aks.microsoft.com/unschedulable": _SPOT_OTHERS_S,
    "cloudprovider.azure.microsoft.com/draining": _SPOT_OTHERS_S,
    "ToBeDeletedByClusterAutoscaler": _AUTOSCALER_S,
    "node.kubernetes.io/out-of-service": 0.0,
    "node.cloudprovider.kubernetes.io/shutdown": 0.0,
}
"""How long a node with such a taint has from the taint on."""
_CONDITIONS = frozenset(
    {"PreemptScheduled", "PreemptionScheduled", "TerminateScheduled", "RedeployScheduled"}
)
_EVENT_CONDITION = "VMEventScheduled"
_ACTION_TIME = "aws-node-termination-handler/action-time"
_MAINTENANCE_LABEL = "cloud.google.com/active-node-maintenance"
_DATE = re.compile(r"[A-Z][a-z]{2}, \d{1,2} [A-Z][a-z]{2} \d{4} \d{2}:\d{2}:\d{2} GMT")

SPOT = "spot"
ON_DEMAND = "on-demand"


@dataclass(frozen=True, slots=True)
class LossNotice:
    source: str
    """The taint, label or condition that says so."""
    lead_s: float
    """From the notice to the loss."""
    given_at_s: float | None = None
    """Unix time of the notice; None when the node does not say."""
    lost_at_s: float | None = None
    """Unix time of the loss, where it is announced itself."""


@dataclass(frozen=True, slots=True)
class KubernetesNode:
    name: str
    addresses: tuple[str, ...]
    instance_type: str | None
    zone: str | None
    market: str | None
    """`spot`, `on-demand`, or None when no label tells."""
    ready: bool
    notices: tuple[LossNotice, ...] = ()


def node_of(body: Mapping[str, Any]) -> KubernetesNode:
    """Raises LookupError, TypeError or ValueError for what is no node."""
    metadata = body["metadata"]
    labels: Mapping[str, str] = metadata.get("labels") or {}
    status = body.get("status") or {}
    spec = body.get("spec") or {}
    conditions = status.get("conditions") or []
    return KubernetesNode(
        name=str(metadata["name"]),
        addresses=tuple(
            address["address"]
            for address in status.get("addresses") or []
            if address.get("type") in ("InternalIP", "ExternalIP")
        ),
        instance_type=_first(
            labels, "node.kubernetes.io/instance-type", "beta.kubernetes.io/instance-type"
        ),
        zone=_first(
            labels, "topology.kubernetes.io/zone", "failure-domain.beta.kubernetes.io/zone"
        ),
        market=market_of(labels),
        ready=any(
            condition.get("type") == "Ready" and condition.get("status") == "True"
            for condition in conditions
        ),
        notices=(
            *_of_taints(spec.get("taints") or [], labels),
            *_of_conditions(conditions),
            *_of_labels(labels),
            *_of_deletion(metadata),
        ),
    )


def market_of(labels: Mapping[str, str]) -> str | None:
    capacity = labels.get("karpenter.sh/capacity-type") or labels.get(
        "eks.amazonaws.com/capacityType"
    )
    if capacity is not None:
        return SPOT if capacity.lower() == SPOT else ON_DEMAND
    if (
        labels.get("cloud.google.com/gke-spot") == "true"
        or labels.get("cloud.google.com/gke-preemptible") == "true"
        or labels.get("cloud.google.com/gke-provisioning") in ("spot", "preemptible")
        or labels.get("kubernetes.azure.com/scalesetpriority") == SPOT
    ):
        return SPOT
    managed = ("cloud.google.com/gke-nodepool", "kubernetes.azure.com/agentpool")
    return ON_DEMAND if any(label in labels for label in managed) else None


def _first(labels: Mapping[str, str], *names: str) -> str | None:
    return next((labels[name] for name in names if name in labels), None)


def _of_taints(
    taints: Iterable[Mapping[str, Any]], labels: Mapping[str, str]
) -> Iterable[LossNotice]:
    for taint in taints:
        key = taint.get("key", "")
        if key not in _TAINTS:
            continue
        given_at_s = _time(taint.get("timeAdded"))
        if key == "ToBeDeletedByClusterAutoscaler":
            given_at_s = _number(taint.get("value")) or given_at_s
        elif key.startswith("aws-node-termination-handler/"):
            given_at_s = given_at_s or _number(labels.get(_ACTION_TIME))
        yield LossNotice(key, _TAINTS[key], given_at_s)


def _of_conditions(conditions: Iterable[Mapping[str, Any]]) -> Iterable[LossNotice]:
    for condition in conditions:
        kind, reason = condition.get("type", ""), condition.get("reason", "")
        announced = kind in _CONDITIONS or (kind == _EVENT_CONDITION and reason in _CONDITIONS)
        if announced and condition.get("status") == "True":
            yield LossNotice(
                kind,
                _SPOT_OTHERS_S,
                _time(condition.get("lastTransitionTime")),
                _date(condition.get("message")),
            )


def _of_labels(labels: Mapping[str, str]) -> Iterable[LossNotice]:
    if labels.get(_MAINTENANCE_LABEL) == "ONGOING":
        yield LossNotice(_MAINTENANCE_LABEL, _MAINTENANCE_S)


def _of_deletion(metadata: Mapping[str, Any]) -> Iterable[LossNotice]:
    """Karpenter deletes the Node first, and a finalizer keeps it until its pods are gone."""
    if metadata.get("deletionTimestamp"):
        yield LossNotice("deletionTimestamp", _SPOT_AWS_S, _time(metadata["deletionTimestamp"]))


def _time(text: Any) -> float | None:
    try:
        return datetime.fromisoformat(str(text)).timestamp() if text else None
    except ValueError:
        return None


def _number(text: Any) -> float | None:
    return float(text) if isinstance(text, str) and text.isascii() and text.isdigit() else None


def _date(message: Any) -> float | None:
    found = _DATE.search(str(message))
    try:
        return parsedate_to_datetime(found.group()).timestamp() if found else None
    except ValueError:
        return None
