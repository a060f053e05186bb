"""Nodes as the clouds write them: which machine, which market, whether it will be taken away."""

from datetime import UTC, datetime
from typing import Any

import pytest

from expertmesh.clients.kubernetes.nodes import KubernetesNode, LossNotice, market_of, node_of

AT_S = datetime(2026, 8, 1, 5, 40, tzinfo=UTC).timestamp()
AT = "2026-08-01T05:40:00Z"


def node(
    taints: list[dict[str, Any]] | None = None,
    conditions: list[dict[str, Any]] | None = None,
    **metadata: Any,
) -> KubernetesNode:
    return node_of(
        {
            "metadata": {"name": "n1", **metadata},
            "spec": {"taints": taints} if taints is not None else {},
            "status": {"conditions": conditions or []},
        }
    )


def test_a_node_of_eks() -> None:
    assert node_of(
        {
            "metadata": {
                "name": "ip-10-0-1-7.eu-west-1.compute.internal",
                "labels": {
                    "node.kubernetes.io/instance-type": "p5.48xlarge",
                    "topology.kubernetes.io/zone": "eu-west-1b",
                    "eks.amazonaws.com/capacityType": "SPOT",
                },
            },
            "spec": {"taints": [{"key": "nvidia.com/gpu", "effect": "NoSchedule"}]},
            "status": {
                "addresses": [
                    {"type": "InternalIP", "address": "10.0.1.7"},
                    {"type": "Hostname", "address": "ip-10-0-1-7"},
                ],
                "conditions": [
                    {"type": "MemoryPressure", "status": "False"},
                    {"type": "Ready", "status": "True"},
                ],
            },
        }
    ) == KubernetesNode(
        name="ip-10-0-1-7.eu-west-1.compute.internal",
        addresses=("10.0.1.7",),
        instance_type="p5.48xlarge",
        zone="eu-west-1b",
        market="spot",
        ready=True,
    )


@pytest.mark.parametrize(
    ("labels", "market"),
    [
        ({"eks.amazonaws.com/capacityType": "SPOT"}, "spot"),
        ({"eks.amazonaws.com/capacityType": "ON_DEMAND"}, "on-demand"),
        ({"eks.amazonaws.com/capacityType": "CAPACITY_BLOCK"}, "on-demand"),
        ({"karpenter.sh/capacity-type": "spot"}, "spot"),
        ({"karpenter.sh/capacity-type": "reserved"}, "on-demand"),
        ({"cloud.google.com/gke-spot": "true", "cloud.google.com/gke-nodepool": "p"}, "spot"),
        ({"cloud.google.com/gke-preemptible": "true"}, "spot"),
        ({"cloud.google.com/gke-provisioning": "spot"}, "spot"),
        ({"cloud.google.com/gke-nodepool": "p"}, "on-demand"),
        ({"kubernetes.azure.com/scalesetpriority": "spot"}, "spot"),
        ({"kubernetes.azure.com/agentpool": "p"}, "on-demand"),
        ({"kubernetes.io/os": "linux"}, None),
    ],
)
def test_markets(labels: dict[str, str], market: str | None) -> None:
    assert market_of(labels) == market


@pytest.mark.parametrize(
    ("taint", "lead_s"),
    [
        ("aws-node-termination-handler/spot-itn", 120.0),
        ("aws-node-termination-handler/rebalance-recommendation", 900.0),
        ("karpenter.sh/disrupted", 120.0),
        ("cloud.google.com/impending-node-termination", 30.0),
        ("remediator.kubernetes.azure.com/unschedulable", 30.0),
        ("node.kubernetes.io/out-of-service", 0.0),
    ],
)
def test_taints_that_announce_a_loss(taint: str, lead_s: float) -> None:
    (notice,) = node([{"key": taint, "effect": "NoSchedule"}]).notices
    assert notice == LossNotice(taint, lead_s)
    (notice,) = node([{"key": taint, "effect": "NoExecute", "timeAdded": AT}]).notices
    assert notice.given_at_s == AT_S


@pytest.mark.parametrize(
    "taint",
    [
        "nvidia.com/gpu",
        "node.kubernetes.io/not-ready",
        "node.kubernetes.io/unschedulable",
        "kubernetes.azure.com/scalesetpriority",
        "karpenter.sh/unregistered",
    ],
)
def test_taints_that_announce_none(taint: str) -> None:
    assert node([{"key": taint, "effect": "NoSchedule"}]).notices == ()


def test_times_that_a_taint_or_its_handler_carries() -> None:
    by_value = {"key": "ToBeDeletedByClusterAutoscaler", "value": str(int(AT_S))}
    assert node([by_value]).notices == (LossNotice(by_value["key"], 600.0, AT_S),)
    labels = {"aws-node-termination-handler/action-time": str(int(AT_S))}
    taint = {"key": "aws-node-termination-handler/spot-itn", "value": "spot-itn-3f"}
    assert node([taint], labels=labels).notices == (LossNotice(taint["key"], 120.0, AT_S),)
    assert node([{**by_value, "value": "soon"}]).notices[0].given_at_s is None


def test_the_time_in_a_condition_of_aks() -> None:
    condition = {
        "type": "PreemptScheduled",
        "status": "True",
        "reason": "SpotEvictionIncoming",
        "lastTransitionTime": AT,
        "message": "Preempt Scheduled: Sat, 01 Aug 2026 05:41:02 GMT. For more information, see …",
    }
    (notice,) = node(conditions=[condition]).notices
    assert notice == LossNotice("PreemptScheduled", 30.0, AT_S, AT_S + 62)
    assert node(conditions=[{**condition, "status": "False"}]).notices == ()
    (notice,) = node(conditions=[{**condition, "message": "soon"}]).notices
    assert (notice.given_at_s, notice.lost_at_s) == (AT_S, None)


def test_a_scheduled_event_counts_only_when_the_node_is_lost() -> None:
    event = {"type": "VMEventScheduled", "status": "True", "lastTransitionTime": AT}
    assert len(node(conditions=[{**event, "reason": "PreemptScheduled"}]).notices) == 1
    assert node(conditions=[{**event, "reason": "FreezeScheduled"}]).notices == ()
    assert node(conditions=[{**event, "reason": "NoVMEventScheduled"}]).notices == ()


def test_maintenance_of_gke_and_a_node_that_is_being_deleted() -> None:
    label = "cloud.google.com/active-node-maintenance"
    assert node(labels={label: "ONGOING"}).notices == (LossNotice(label, 3600.0),)
    assert node(labels={label: "DONE"}).notices == ()
    assert node(deletionTimestamp=AT).notices == (LossNotice("deletionTimestamp", 120.0, AT_S),)


def test_what_is_no_node_is_refused() -> None:
    with pytest.raises((LookupError, TypeError)):
        node_of({"metadata": {}})
