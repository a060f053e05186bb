"""Ray's own autoscaler reads the RayCluster and answers a waiting group with nodes of its pool.

The scheduler is the one that runs in Ray's head pod; only the Kubernetes API around it is missing.
"""

from typing import Any

import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import (
    _derive_autoscaling_config_from_ray_cr,
)
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.autoscaler_pb2 import BundleSelector, GangResourceRequest
from ray.core.generated.common_pb2 import LabelSelectorOperator
from tests.chart.rendering import PROFILES, Rendered, render

pytestmark = pytest.mark.integration


def autoscaling_config(rendered: Rendered) -> AutoscalingConfig:
    cluster = rendered.one("RayCluster")
    cluster["metadata"]["namespace"] = "models"
    return AutoscalingConfig(_derive_autoscaling_config_from_ray_cr(cluster))


def nodes_launched_for(
    config: AutoscalingConfig, *, pool: str, workers: int, bundle: dict[str, float]
) -> tuple[dict[str, int], bool]:
    """Nodes by pool that a gang of `workers` makes Ray ask for, and whether it can ever fit."""
    selector = [("expertmesh.io/pool", LabelSelectorOperator.LABEL_OPERATOR_IN, [pool])]
    request = ResourceRequestUtil.make(bundle, label_selectors=[selector])
    gang = GangResourceRequest(
        bundle_selectors=[BundleSelector(resource_requests=[request] * workers)]
    )
    reply = ResourceDemandScheduler(None).schedule(
        SchedulingRequest(
            disable_launch_config_check=True,
            node_type_configs=config.get_node_type_configs(),
            max_num_nodes=config.get_max_num_nodes(),
            gang_resource_requests=[gang],
        )
    )
    launched = {launch.instance_type: launch.count for launch in reply.to_launch}
    return launched, not reply.infeasible_gang_resource_requests


def test_ray_reads_pools_as_node_types() -> None:
    rendered = render()
    types = autoscaling_config(rendered).get_node_type_configs()
    pools: list[dict[str, Any]] = yaml.safe_load(rendered.manifests()["platform.yaml"])["pools"]
    assert set(types) == {"headgroup", *(pool["name"] for pool in pools)}
    assert types["headgroup"].resources["CPU"] == 0
    for pool in pools:
        read = types[pool["name"]]
        assert read.labels["expertmesh.io/pool"] == pool["name"]
        assert read.resources["CPU"] == pool["cpus_per_node"]
        assert (read.min_worker_nodes, read.max_worker_nodes) == (
            pool["nodes"]["min"],
            pool["nodes"]["max"],
        )


@pytest.mark.parametrize(
    ("pool", "expected"),
    [
        ("cpu-small", {"cpu-small": 2}),
        ("cpu-large", {"cpu-small": 2, "cpu-large": 2}),  # cpu-small's two are its minimum
    ],
    ids=["a pool whose nodes are its minimum", "a pool that has no nodes yet"],
)
def test_a_waiting_group_brings_up_nodes_of_its_pool(pool: str, expected: dict[str, int]) -> None:
    launched, fits = nodes_launched_for(
        autoscaling_config(render()), pool=pool, workers=2, bundle={"CPU": 1}
    )
    assert (launched, fits) == (expected, True)


@pytest.mark.parametrize("pool", ["h200-od", "h200-spot"])
def test_a_group_of_sixteen_accelerators_brings_up_two_nodes_of_eight(pool: str) -> None:
    (profile,) = (each for each in PROFILES if each.stem == "h200-gke")
    launched, fits = nodes_launched_for(
        autoscaling_config(render(profile=profile)),
        pool=pool,
        workers=16,
        bundle={"CPU": 1, "GPU": 1, "accelerator_type:H200": 0.001},
    )
    assert (launched, fits) == ({pool: 2}, True)


def test_a_group_beyond_its_pool_s_bounds_never_fits() -> None:
    launched, fits = nodes_launched_for(
        autoscaling_config(render()), pool="cpu-large", workers=3, bundle={"CPU": 1}
    )
    assert (launched, fits) == ({"cpu-small": 2}, False)
