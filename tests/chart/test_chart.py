"""The chart through the real helm: it renders, it refuses, and what it renders holds together."""

import json
import shutil
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import typer
import yaml
from tests.chart.rendering import (
    CHART,
    PROFILES,
    Rendered,
    effective_values,
    helm,
    helm_template,
    render,
)

from expertmesh.cli.controller import controller as controller_command
from expertmesh.cli.gateway import gateway as gateway_command
from expertmesh.cli.times import duration_s
from expertmesh.spec.load import load_platform, load_system

pytestmark = pytest.mark.integration

CASES = (None, *PROFILES)
REPOSITORY = Path(__file__).parents[2]
RAY_CLUSTER_SCHEMA = json.loads(Path(__file__).with_name("raycluster.schema.json").read_text())

# Objects that an administrator makes before the release, as values.yaml and the profile say.
EXTERNAL_SECRETS = {"expertmesh-tokens", "expertmesh-store", "huggingface", "redis", "chat-key"}
EXTERNAL_CLAIMS = {"models"}
API_POOL = {
    "name": "api",
    "market": "external",
    "base_url": "https://api.example.com",
    "key_variable": "EXAMPLE_API_KEY",
}
TARIFF = {"usd_per_mtok_in": 0.5, "usd_per_mtok_cached": 0.1, "usd_per_mtok_out": 2.0}
PROVIDER_SECRETS = {"gateway.secretEnv": {"EXAMPLE_API_KEY": {"name": "providers", "key": "api"}}}


POOL = {"name": "cpu-small", "market": "local", "usd_per_node_hour": 1}
GPU_POOL = {
    "name": "gpus",
    "market": "on-demand",
    "usd_per_node_hour": 20,
    "accelerator": "H200",
    "accelerators_per_node": 8,
    "nodes": {"min": 0, "max": 2},
}


def gpu_model(**parallelism: int) -> dict[str, Any]:
    return model_with(pools=["gpus"], parallelism=parallelism)


def on_gpus(market: str = "on-demand") -> dict[str, Any]:
    return {"platform.pools": [{**GPU_POOL, "market": market}], **gpu_model(expert=16)}


def pools_with(**changes: Any) -> dict[str, Any]:
    """The default pools and an external one; `None` leaves a key out."""
    external = {k: v for k, v in {**API_POOL, **changes}.items() if v is not None}
    return {"platform.pools": [*effective_values()["platform"]["pools"], external]}


def model_with(**changes: Any) -> dict[str, Any]:
    return {"models": [{**effective_values()["models"][0], **changes}]}


def case_id(profile: Path | None) -> str:
    return profile.stem if profile else "defaults"


@pytest.fixture(scope="module", params=CASES, ids=case_id)
def profile(request: pytest.FixtureRequest) -> Path | None:
    chosen: Path | None = request.param
    return chosen


@pytest.fixture(scope="module")
def rendered(profile: Path | None) -> Rendered:
    return render(profile=profile)


def test_helm_lint_is_content_when_strict(profile: Path | None) -> None:
    values = ["--values", str(profile)] if profile else []
    done = helm("lint", "--strict", str(CHART), *values)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 chart(s) failed" in done.stdout


TYPOS: tuple[tuple[str, Path | None, dict[str, Any], tuple[str, ...]], ...] = (
    ("a key of the chart", None, {"gateway.replica": 2}, ("'/gateway'", "'replica'")),
    ("a section of the chart", None, {"gatway": {}}, ("at ''", "'gatway'")),
    (
        "a key of the platform manifest",
        None,
        {"platform.gateway.prot": 1},
        ("'/platform/gateway'", "'prot'"),
    ),
    (
        "a key of a model manifest",
        PROFILES[0],
        {"models[0].scaling": {"grops": {"min": 1}}},
        ("'/models/0/scaling'", "'grops'"),
    ),
    (
        "a key of a pool's workers",
        None,
        {"ray.workers": {"cpu-small": {"tolerationz": []}}},
        ("'/ray/workers/cpu-small'", "'tolerationz'"),
    ),
    (
        "a wrong type",
        None,
        {"gateway.replicas": "two"},
        ("'/gateway/replicas'", "got string, want integer"),
    ),
    (
        "a value out of the list",
        None,
        {"ray.upgradeStrategy": "NewCluster"},
        ("'/ray/upgradeStrategy'", "'None', 'Recreate'"),
    ),
    (
        "a pool that a model names and the platform lacks",
        None,
        {"platform.pools": [{"name": "cpu-small", "market": "local", "usd_per_node_hour": 1}]},
        ("models.0.pools.1: cpu-large: no such pool", "cpu-small"),
    ),
    (
        "workers of a pool that does not exist",
        None,
        {"ray.workers": {"cpu-big": {}}},
        ("ray.workers.cpu-big: no such pool", "cpu-large, cpu-small"),
    ),
    (
        "no mesh token",
        None,
        {"secrets.mesh.existingSecret": ""},
        ("secrets.mesh: neither existingSecret nor value",),
    ),
    (
        "a store URL that would land in a ConfigMap",
        None,
        {"platform.store_url": "postgresql+asyncpg://em:pw@db/em"},
        ("platform.store_url", "store.existingSecret"),
    ),
    (
        "a variable that the chart sets itself",
        None,
        {"ray.env": {"EXPERTMESH_MESH_TOKEN": "x"}},
        ("ray.env.EXPERTMESH_MESH_TOKEN", "remove it"),
    ),
    (
        "an external pool without a URL",
        None,
        {**PROVIDER_SECRETS, **pools_with(base_url=None)},
        ("platform.pools.2.base_url: missing in an external pool",),
    ),
    (
        "an external pool with nodes",
        None,
        {**PROVIDER_SECRETS, **pools_with(nodes={"min": 0, "max": 1})},
        ("platform.pools.2.nodes: an external pool has no nodes",),
    ),
    (
        "an external pool with a price an hour",
        None,
        {**PROVIDER_SECRETS, **pools_with(usd_per_node_hour=0)},
        ("platform.pools.2.usd_per_node_hour: an external pool has no nodes",),
    ),
    (
        "an external pool whose key no Secret gives",
        None,
        pools_with(),
        ("platform.pools.2.key_variable: EXAMPLE_API_KEY: no Secret", "gateway.secretEnv"),
    ),
    (
        "an external key as a plain value",
        None,
        {**PROVIDER_SECRETS, **pools_with(), "gateway.env": {"EXAMPLE_API_KEY": "sk-1"}},
        ("gateway.env.EXAMPLE_API_KEY: is in gateway.secretEnv too",),
    ),
    (
        "a pool with nodes and a provider's URL",
        None,
        {"platform.pools": [{**API_POOL, "market": "local", "usd_per_node_hour": 1}]},
        ("platform.pools.0.base_url: is for pools with market: external",),
    ),
    (
        "a pool with nodes and no price",
        None,
        {"platform.pools": [{"name": "cpu-small", "market": "local"}]},
        ("platform.pools.0.usd_per_node_hour: missing",),
    ),
    (
        "a model in an external pool",
        None,
        {**PROVIDER_SECRETS, **pools_with(), **model_with(pools=["cpu-small", "api"])},
        ("models.0.pools.1: api: is an external pool", "put it under external"),
    ),
    (
        "a pool with nodes as a provider",
        None,
        model_with(external=[{"pool": "cpu-small", "model": "m", "tariff": TARIFF}]),
        ("models.0.external.0.pool: cpu-small: is no external pool",),
    ),
    (
        "a provider that does not exist",
        None,
        model_with(external=[{"pool": "api", "model": "m", "tariff": TARIFF}]),
        ("models.0.external.0.pool: api: no such pool",),
    ),
    (
        "an alias that is a model's name",
        None,
        model_with(aliases=["small", "tiny-moe"]),
        ("models.0.aliases.1: tiny-moe: another model has this name",),
    ),
    (
        "limits in Redis without its URL",
        None,
        {"platform.gateway.limits": {"store": "redis"}},
        ("platform.gateway.limits.redis_url_variable: missing with store: redis",),
    ),
    (
        "limits in Redis whose URL no Secret gives",
        None,
        {"platform.gateway.limits": {"store": "redis", "redis_url_variable": "REDIS_URL"}},
        ("platform.gateway.limits.redis_url_variable: REDIS_URL: no Secret",),
    ),
    (
        "a secret variable that the chart sets itself",
        None,
        {"gateway.secretEnv": {"EXPERTMESH_MESH_TOKEN": {"name": "a", "key": "b"}}},
        ("gateway.secretEnv.EXPERTMESH_MESH_TOKEN", "remove it"),
    ),
    (
        "more groups at least than at most",
        None,
        model_with(scaling={"groups": {"min": 3, "max": 2}}),
        ("models.0.scaling.groups: min 3 is above max 2",),
    ),
    (
        "a pool's least nodes above its most",
        None,
        {"platform.pools": [{**POOL, "nodes": {"min": 3, "max": 2}}]},
        ("platform.pools.0.nodes: min 3 is above max 2; lower min or raise max",),
    ),
    (
        "experts over no whole number of ranks",
        None,
        model_with(parallelism={"expert": 6, "tensor": 4}),
        ("models.0.parallelism.expert: 6 is no multiple of tensor 4",),
    ),
    (
        "ranks that are not experts over tensor",
        None,
        model_with(parallelism=[{"expert": 2}, {"expert": 4, "tensor": 2, "data": 4}]),
        ("models.0.parallelism.1.data: 4 is not expert 4 / tensor 2; leave data out",),
    ),
    (
        "copies of experts without expert parallelism",
        None,
        model_with(parallelism={"expert": 1, "redundant_experts": 2}),
        ("models.0.parallelism.redundant_experts: 2 needs expert above 1",),
    ),
    (
        "experts and copies that do not divide",
        None,
        model_with(
            model={"source": "../models/tiny", "max_model_len": 64, "shape": {"num_experts": 10}},
            parallelism={"expert": 4, "redundant_experts": 1},
        ),
        ("10 experts and 1 copies cannot be shared evenly by expert 4", "redundant_experts: 2"),
    ),
    (
        "a rank larger than a node",
        None,
        {"platform.pools": [GPU_POOL], **gpu_model(expert=16, tensor=16)},
        ("models.0.parallelism.tensor: 16 does not divide the 8 accelerators", "pool gpus"),
    ),
    (
        "a group that leaves accelerators idle",
        None,
        {"platform.pools": [GPU_POOL], **gpu_model(expert=12)},
        ("models.0.parallelism: a group of 12 workers", "write a multiple of 8"),
    ),
    (
        "a group larger than its pool",
        None,
        {"platform.pools": [GPU_POOL], **gpu_model(expert=32)},
        ("a group of 32 workers never fits pool gpus, which has at most 2 nodes of 8", "nodes.max"),
    ),
    (
        "a group with more workers than its pool has CPUs",
        None,
        model_with(parallelism={"expert": 4}),
        ("never fits pool cpu-small, which has at most 2 nodes of 1 CPUs",),
    ),
    (
        "spot nodes in a pool that is on demand",
        None,
        {
            **on_gpus(),
            "ray.workers": {"gpus": {"nodeSelector": {"karpenter.sh/capacity-type": "spot"}}},
        },
        ("ray.workers.gpus.nodeSelector: selects spot nodes", "make a pool for each market"),
    ),
    (
        "on-demand nodes in a spot pool",
        None,
        {
            **on_gpus(market="spot"),
            "ray.workers": {"gpus": {"nodeSelector": {"cloud.google.com/gke-spot": "false"}}},
        },
        ("ray.workers.gpus.nodeSelector: selects on-demand nodes", "market: spot"),
    ),
    (
        "a spot node that would be gone before its grace period",
        None,
        {
            **on_gpus(market="spot"),
            "ray.workers": {"gpus": {"terminationGracePeriodSeconds": 300}},
        },
        ("a grace period of 300 s outlasts a spot node", "terminationGracePeriodSeconds: 25"),
    ),
    (
        "a budget for a spot pool",
        None,
        {
            **on_gpus(market="spot"),
            "ray.workers": {"gpus": {"podDisruptionBudget": {"enabled": True}}},
        },
        ("ray.workers.gpus.podDisruptionBudget: a spot node is taken", "remove it"),
    ),
    (
        "a grace period that would cut streams",
        None,
        {
            "gateway.drain": {"delaySeconds": 10, "timeoutSeconds": 600},
            "gateway.terminationGracePeriodSeconds": 150,
        },
        (
            "gateway.terminationGracePeriodSeconds: 150 s would cut streams",
            "takes 10 s and 600 s",
            "leave it out, or write at least 625",
        ),
    ),
    (
        "a share of traces beside the chart's",
        None,
        {"gateway.env": {"OTEL_TRACES_SAMPLER_ARG": "1"}},
        ("gateway.env.OTEL_TRACES_SAMPLER_ARG", "write monitoring.traces.ratio"),
    ),
    (
        "a share of traces above one",
        None,
        {"monitoring.traces.ratio": 5},
        ("'/monitoring/traces/ratio'", "got 5, want 1"),
    ),
    (
        "resources of a node beside those of its pool",
        None,
        {"ray.workers": {"cpu-large": {"rayStartParams": {"num-gpus": "8"}}}},
        ("ray.workers.cpu-large.rayStartParams.num-gpus: KubeRay refuses it", "platform.pools"),
    ),
    (
        "node labels as Ray's parameter",
        None,
        {"ray.head.rayStartParams": {"labels": "a=b"}},
        ("ray.head.rayStartParams.labels: KubeRay refuses it",),
    ),
    (
        "Ray's Redis in the environment",
        None,
        {"ray.env": {"RAY_REDIS_ADDRESS": "redis:6379"}},
        ("ray.env.RAY_REDIS_ADDRESS: KubeRay refuses it; remove it and write ray.redis",),
    ),
    (
        "the autoscaler's version in the environment",
        None,
        {"ray.head.env": {"RAY_enable_autoscaler_v2": "1"}},
        ("ray.head.env.RAY_enable_autoscaler_v2", "remove it"),
    ),
    (
        "egress to no port",
        None,
        {"networkPolicy.egress.store": {"to": [], "ports": []}},
        ("'/networkPolicy/egress/store/ports'",),
    ),
    (
        "fewer gateways at most than at least",
        None,
        {"gateway.autoscaling": {"enabled": True, "minReplicas": 4, "maxReplicas": 2}},
        ("gateway.autoscaling: minReplicas 4 is above maxReplicas 2",),
    ),
    (
        "gateways scaled by nothing",
        None,
        {"gateway.autoscaling": {"enabled": True, "queuedRequests": 0}},
        ("gateway.autoscaling: nothing to scale by",),
    ),
    (
        "gateways scaled by a share of nothing",
        None,
        {
            "gateway.autoscaling": {"enabled": True, "cpuPercent": 70},
            "gateway.resources": {"requests": {"cpu": None}},
        },
        ("gateway.autoscaling.cpuPercent: is a share of gateway.resources.requests.cpu",),
    ),
    (
        "an Ingress without hosts",
        None,
        {"gateway.ingress.enabled": True},
        ("gateway.ingress.hosts: missing",),
    ),
    (
        "a route without a Gateway",
        None,
        {"gateway.httpRoute.enabled": True},
        ("gateway.httpRoute.parentRefs: missing",),
    ),
    (
        "two services on one port",
        None,
        {"platform.controller.port": 8080},
        ("platform.controller.port: 8080: is that of the gateway; choose another one",),
    ),
    (
        "a name that is too long",
        None,
        {"nameOverride": "n" * 41},
        ("'/nameOverride'", "maxLength: got 41, want 40"),
    ),
    (
        "a volume that the chart has",
        None,
        {"ray.workerDefaults.volumes": [{"name": "dshm", "emptyDir": {}}]},
        ("volumes: dshm: the chart has a volume of this name",),
    ),
    (
        "a volume of the controller that the chart has",
        None,
        {"controller.volumes": [{"name": "state", "emptyDir": {}}]},
        ("controller.volumes: state: the chart has a volume of this name",),
    ),
    (
        "a password of no Redis",
        None,
        {"ray.redis.existingSecret": "redis"},
        ("ray.redis.address: missing beside ray.redis.existingSecret",),
    ),
    (
        "a test of a model that is not served",
        None,
        {"tests.chat": {"existingSecret": "key", "model": "gpt"}},
        ("tests.chat.model: gpt: no such model; models has tiny-moe",),
    ),
    (
        "no Ray token",
        None,
        {"secrets.ray.existingSecret": ""},
        ("secrets.ray: neither existingSecret nor value",),
    ),
    (
        "a field that no pod has",
        None,
        {"ray.workerDefaults.podSpec": {"priorityClasName": "high"}},
        ("'/ray/workerDefaults/podSpec'", "priorityClasName"),
    ),
    (
        "a digest that is none",
        None,
        {"images.ray.digest": "sha256:abc"},
        ("'/images/ray/digest'", "does not match pattern"),
    ),
    (
        "a budget that would block a drain",
        None,
        {"gateway.podDisruptionBudget.maxUnavailable": 0},
        ("'/gateway/podDisruptionBudget/maxUnavailable'", "got 0, want 1"),
    ),
    (
        "too many workers",
        None,
        {"platform.gateway.workers": 65},
        ("'/platform/gateway/workers'", "64"),
    ),
    (
        "another dashboard port",
        None,
        {"platform.ray_dashboard_port": 8266},
        ("platform.ray_dashboard_port: 8266",),
    ),
)


@pytest.mark.parametrize(
    ("base", "values", "named"), [case[1:] for case in TYPOS], ids=[case[0] for case in TYPOS]
)
def test_wrong_values_are_refused_and_named(
    base: Path | None, values: dict[str, Any], named: tuple[str, ...]
) -> None:
    done = helm_template(profile=base, values=values)
    assert done.returncode != 0
    assert all(text in done.stderr for text in named), done.stderr
    assert "apiVersion" not in done.stdout


def test_the_controller_s_files_load_as_the_values_say(
    rendered: Rendered, profile: Path | None, tmp_path: Path
) -> None:
    values = effective_values(profile)
    folder = tmp_path / "deployments"
    folder.mkdir()
    for name, text in rendered.manifests().items():
        (folder / name).write_text(text)
    # The image holds models/ beside deployments/; weights themselves are not looked into here.
    tiny = tmp_path / "models" / "tiny-qwen3-moe"
    tiny.mkdir(parents=True)
    shutil.copy(REPOSITORY / "models/tiny-qwen3-moe/config.json", tiny)
    (tiny / "model.safetensors").touch()

    documents = {name: yaml.safe_load(text) for name, text in rendered.manifests().items()}
    assert documents == {"platform.yaml": values["platform"]} | {
        f"model-{model['name']}.yaml": model for model in values["models"]
    }
    system = load_system(sorted(folder.iterdir()))
    assert [model.name for model in system.models] == [m["name"] for m in values["models"]]
    assert [pool.name for pool in system.pools] == [p["name"] for p in values["platform"]["pools"]]


def test_large_integers_reach_the_engine_as_integers() -> None:
    rendered = render(
        profile=PROFILES[0], values={"models[0].engine": {"max_num_batched_tokens": 2097152}}
    )
    (model,) = (text for name, text in rendered.manifests().items() if name != "platform.yaml")
    value = yaml.safe_load(model)["engine"]["max_num_batched_tokens"]
    assert (type(value), value) == (int, 2097152)


def test_the_controller_is_given_every_file_of_its_config_map(rendered: Rendered) -> None:
    container = rendered.one("Deployment", "-controller")["spec"]["template"]["spec"]["containers"][
        0
    ]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    arguments = container["args"]
    given = [arguments[i + 1] for i, each in enumerate(arguments) if each == "-f"]
    assert given[0].endswith("/platform.yaml")
    assert sorted(given) == sorted(f"{mounts['manifests']}/{name}" for name in rendered.manifests())


def test_the_commands_are_the_command_line_s_own(rendered: Rendered) -> None:
    def flags(suffix: str) -> tuple[list[str], dict[str, str]]:
        template = rendered.one("Deployment", suffix)["spec"]["template"]
        container = template["spec"]["containers"][0]
        arguments = container["args"]
        pairs = zip(arguments[1::2], arguments[2::2], strict=True)
        return [*container["command"], arguments[0]], dict(pairs)

    command, gateway = flags("-gateway")
    assert command == ["expertmesh", "gateway"]
    assert gateway == {
        "--controller-url": "http://em-expertmesh-controller:8090",
        "--store": "$(EXPERTMESH_STORE_URL)",
        "--host": "0.0.0.0",
        "--port": "8080",
        "--config": "/etc/expertmesh/platform.yaml",
        "--state-dir": "/var/lib/expertmesh-gateway",
        "--workers": "1",
        "--drain-timeout-s": "120",
    }
    command, controller = flags("-controller")
    assert command == ["expertmesh", "controller"]
    assert controller.keys() == {
        "-f", "--dashboard-url", "--store", "--host", "--port",
        "--lease", "--ray-cluster", "--spot-notices", "--advertise", "--keep-decisions",
    }  # fmt: skip
    assert duration_s(controller["--keep-decisions"]) == 30 * 86400
    assert controller["--lease"] == "kubernetes"
    assert controller["--ray-cluster"] == rendered.one("RayCluster")["metadata"]["name"]
    assert controller["--advertise"] == "http://$(POD_IP):8090"
    assert controller["--dashboard-url"] == "http://em-expertmesh-ray-head-svc:8265"
    assert controller["--port"] == "8090"
    for function, given in ((gateway_command, gateway), (controller_command, controller)):
        app = typer.Typer()
        app.command()(function)
        known = {option for each in typer.main.get_command(app).params for option in each.opts}
        assert given.keys() <= known


def test_services_reach_the_pods_they_are_for(rendered: Rendered) -> None:
    templates = {
        each["metadata"]["name"]: each["spec"]["template"] for each in rendered.all("Deployment")
    }
    everybody = rendered.pod_templates().values()
    assert len(rendered.all("Service")) == 2
    for service in rendered.all("Service"):
        selector = service["spec"]["selector"].items()
        own = templates[service["metadata"]["name"]]
        assert selector <= own["metadata"]["labels"].items()
        others = [each for each in everybody if selector <= each["metadata"]["labels"].items()]
        assert others == [own]
        names = {port["name"] for port in own["spec"]["containers"][0]["ports"]}
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= names


def test_deployments_select_their_own_pods_and_no_others(rendered: Rendered) -> None:
    everybody = rendered.pod_templates()
    for deployment in rendered.all("Deployment"):
        selector = deployment["spec"]["selector"]["matchLabels"].items()
        selected = [
            name
            for name, each in everybody.items()
            if selector <= each["metadata"]["labels"].items()
        ]
        assert selected == [f"Deployment {deployment['metadata']['name']}"]


def test_volumes_resolve_and_variables_are_unique(rendered: Rendered) -> None:
    config_maps = {each["metadata"]["name"] for each in rendered.all("ConfigMap")}
    claims = {each["metadata"]["name"] for each in rendered.all("PersistentVolumeClaim")}
    secrets = {each["metadata"]["name"] for each in rendered.all("Secret")}
    accounts = {each["metadata"]["name"] for each in rendered.all("ServiceAccount")}
    for where, template in rendered.pod_templates().items():
        spec = template["spec"]
        volumes = spec.get("volumes", [])
        names = [volume["name"] for volume in volumes]
        assert len(set(names)) == len(names), where
        for volume in volumes:
            if "configMap" in volume:
                assert volume["configMap"]["name"] in config_maps, where
            if "persistentVolumeClaim" in volume:
                claim = volume["persistentVolumeClaim"]["claimName"]
                assert claim in claims | EXTERNAL_CLAIMS, where
        if "serviceAccountName" in spec:
            assert spec["serviceAccountName"] in accounts, where
        for container in spec["containers"]:
            mounts = container.get("volumeMounts", [])
            assert {mount["name"] for mount in mounts} <= set(names), where
            paths = [mount["mountPath"] for mount in mounts]
            assert len(set(paths)) == len(paths), where
            variables = [variable["name"] for variable in container.get("env", [])]
            assert len(set(variables)) == len(variables), where
            for variable in container.get("env", []):
                if "secretKeyRef" in variable.get("valueFrom", {}):
                    name = variable["valueFrom"]["secretKeyRef"]["name"]
                    assert name in secrets | EXTERNAL_SECRETS, where


def test_every_pod_runs_without_more_rights_than_it_needs(rendered: Rendered) -> None:
    for where, template in rendered.pod_templates().items():
        spec = template["spec"]
        for container in spec["containers"]:
            security = container["securityContext"]
            assert security["allowPrivilegeEscalation"] is False, where
            assert security["capabilities"]["drop"] == ["ALL"], where
            assert "limits" in container["resources"], where
            assert spec["securityContext"]["runAsNonRoot"] is True, where
            if not where.startswith("Ray"):
                assert security["readOnlyRootFilesystem"] is True, where
                assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        # Controllers speak to Kubernetes, and the head's autoscaler with KubeRay's own account.
        if where.endswith("-controller"):
            assert spec["automountServiceAccountToken"] is True, where
        elif where != "Ray head":
            assert spec["automountServiceAccountToken"] is False, where


def test_the_ray_cluster_is_one_that_kuberay_takes(rendered: Rendered) -> None:
    cluster = rendered.one("RayCluster")
    jsonschema.Draft202012Validator(RAY_CLUSTER_SCHEMA).validate(cluster)
    assert not rendered.all("RayService")
    assert all("replicas" not in group for group in cluster["spec"]["workerGroupSpecs"])


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "serveConfigV2"), "applications: []"),
        (("spec", "autoscalerOptions", "version"), "v3"),
        (("spec", "workerGroupSpecs", 0, "replicas"), 1),
        (("spec", "workerGroupSpecs", 0, "minReplicas"), "1"),
        (("spec", "workerGroupSpecs", 0, "rayStartParams", "num-cpus"), "1"),
        (("spec", "headGroupSpec", "rayStartParams", "num-cpus"), 0),
        (("metadata", "name"), "x" * 51),
    ],
    ids=lambda each: ".".join(map(str, each)) if isinstance(each, tuple) else "",
)
def test_the_ray_cluster_s_schema_refuses(path: tuple[Any, ...], value: Any) -> None:
    cluster = render().one("RayCluster")
    node: Any = cluster
    for part in path[:-1]:
        node = node[part]
    node[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(RAY_CLUSTER_SCHEMA).validate(cluster)


def test_worker_groups_are_the_pools_of_the_config_map(rendered: Rendered) -> None:
    pools = yaml.safe_load(rendered.manifests()["platform.yaml"])["pools"]
    groups = rendered.one("RayCluster")["spec"]["workerGroupSpecs"]
    assert [group["groupName"] for group in groups] == [pool["name"] for pool in pools]
    for group, pool in zip(groups, pools, strict=True):
        assert group["labels"]["expertmesh.io/pool"] == pool["name"]
        assert (group["minReplicas"], group["maxReplicas"]) == (
            pool["nodes"]["min"],
            pool["nodes"]["max"],
        )
        container = group["template"]["spec"]["containers"][0]
        accelerators = container["resources"]["limits"].get("nvidia.com/gpu", "0")
        assert int(accelerators) == pool.get("accelerators_per_node", 0)


def test_an_external_pool_has_no_nodes_of_ours() -> None:
    pools = effective_values()["platform"]["pools"]
    rendered = render(values={**pools_with(), **PROVIDER_SECRETS})
    groups = rendered.one("RayCluster")["spec"]["workerGroupSpecs"]
    assert [group["groupName"] for group in groups] == [pool["name"] for pool in pools]


def test_a_pool_s_workers_override_the_defaults() -> None:
    rendered = render(
        values={
            "ray.workers": {
                "cpu-large": {
                    "nodeSelector": {"size": "large"},
                    "resources": {"limits": {"memory": "12Gi"}},
                    "env": {"VLLM_ENGINE_READY_TIMEOUT_S": "60"},
                }
            }
        }
    )
    small, large = (
        group["template"]["spec"]
        for group in rendered.one("RayCluster")["spec"]["workerGroupSpecs"]
    )
    assert "nodeSelector" not in small
    assert large["nodeSelector"] == {"size": "large"}
    assert large["containers"][0]["resources"]["limits"] == {"memory": "12Gi"}
    assert (
        large["containers"][0]["resources"]["requests"]
        == small["containers"][0]["resources"]["requests"]
    )
    assert {"name": "VLLM_ENGINE_READY_TIMEOUT_S", "value": "60"} in large["containers"][0]["env"]


def test_ray_nodes_have_the_token_and_their_own_ports(rendered: Rendered) -> None:
    for where, template in rendered.pod_templates().items():
        if where.startswith("Ray"):
            env = {each["name"]: each for each in template["spec"]["containers"][0]["env"]}
            assert env["RAY_SERVE_ENABLE_DIRECT_INGRESS"]["value"] == "1", where
            assert "valueFrom" in env["EXPERTMESH_MESH_TOKEN"], where


@pytest.mark.parametrize(
    "release", ["em", "expertmesh", "a-release-name-that-is-rather-long-already-ok"]
)
def test_names_fit_and_leave_kuberay_s_own_free(release: str) -> None:
    tokens = {"existingSecret": "", "value": "for-a-trial"}
    rendered = render(
        release=release,
        values={"secrets.mesh": {**tokens, "key": "mesh_token"}, "secrets.ray": tokens},
    )
    cluster = rendered.one("RayCluster")["metadata"]["name"]
    assert len(cluster) <= 50
    # KubeRay makes a ServiceAccount, a Role, a RoleBinding and a Secret named like the cluster.
    taken = {
        each["metadata"]["name"]
        for kind in ("ServiceAccount", "Role", "RoleBinding", "Secret")
        for each in rendered.all(kind)
    }
    assert len(rendered.all("Secret")) == 2
    assert cluster not in taken
    wide = ("ClusterRole", "ClusterRoleBinding")  # may have 253
    assert all(
        len(each["metadata"]["name"]) <= 63 for each in rendered.objects if each["kind"] not in wide
    )
    dashboard = f"http://{cluster}-head-svc:8265"
    controller = rendered.one("Deployment", "-controller")["spec"]["template"]["spec"]
    assert dashboard in controller["containers"][0]["args"]


def test_tokens_never_stand_outside_of_secrets() -> None:
    rendered = render(
        values={
            "secrets.mesh": {"existingSecret": "", "key": "mesh_token", "value": "mesh-7f3a"},
            "secrets.ray": {"existingSecret": "", "value": "ray-91cc"},
        }
    )
    for each in rendered.objects:
        if each["kind"] != "Secret":
            assert "mesh-7f3a" not in json.dumps(each)
            assert "ray-91cc" not in json.dumps(each)
    secrets = {
        name: text for each in rendered.all("Secret") for name, text in each["stringData"].items()
    }
    assert secrets == {"mesh_token": "mesh-7f3a", "auth_token": "ray-91cc"}


def test_sqlite_keeps_gateway_and_controller_on_one_node() -> None:
    rendered = render()
    claim = rendered.one("PersistentVolumeClaim")["metadata"]["name"]
    controller = rendered.one("Deployment", "-controller")["spec"]
    gateway = rendered.one("Deployment", "-gateway")["spec"]["template"]["spec"]
    for spec in (controller["template"]["spec"], gateway):
        assert {"name": "state", "persistentVolumeClaim": {"claimName": claim}} in spec["volumes"]
    (near,) = gateway["affinity"]["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert near["labelSelector"] == controller["selector"]
    assert near["topologyKey"] == "kubernetes.io/hostname"


def test_a_store_secret_replaces_the_volume() -> None:
    rendered = render(values={"store.existingSecret": "expertmesh-store"})
    assert not rendered.all("PersistentVolumeClaim")
    for suffix in ("-gateway", "-controller"):
        spec = rendered.one("Deployment", suffix)["spec"]["template"]["spec"]
        assert "affinity" not in spec
        (zone, host) = spec["topologySpreadConstraints"]
        assert (zone["whenUnsatisfiable"], host["whenUnsatisfiable"]) == ("ScheduleAnyway",) * 2
        env = {each["name"]: each for each in spec["containers"][0]["env"]}
        assert env["EXPERTMESH_STORE_URL"]["valueFrom"] == {
            "secretKeyRef": {"name": "expertmesh-store", "key": "url"}
        }


def test_a_changed_manifest_restarts_the_controller_and_not_the_gateway() -> None:
    def annotations(rendered: Rendered, suffix: str) -> Any:
        template = rendered.one("Deployment", suffix)["spec"]["template"]
        return template["metadata"].get("annotations")

    before, after = render(), render(values={"platform.name": "renamed"})
    assert annotations(before, "-controller") != annotations(after, "-controller")
    assert annotations(before, "-gateway") == annotations(after, "-gateway")
    more_workers = render(values={"platform.gateway.workers": 2})
    assert annotations(before, "-gateway") != annotations(more_workers, "-gateway")


def gateway_pod(rendered: Rendered) -> tuple[dict[str, Any], dict[str, Any]]:
    """Its spec and its container."""
    spec = rendered.one("Deployment", "-gateway")["spec"]["template"]["spec"]
    return spec, spec["containers"][0]


def test_the_gateway_reads_the_platform_manifest_and_nothing_else(rendered: Rendered) -> None:
    spec, container = gateway_pod(rendered)
    mounts = {mount["name"]: mount for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    config = container["args"][container["args"].index("--config") + 1]
    (item,) = volumes["manifest"]["configMap"]["items"]
    assert item["key"] in rendered.manifests()
    assert f"{mounts['manifest']['mountPath']}/{item['path']}" == config
    assert mounts["manifest"]["readOnly"] is True


def test_the_gateway_s_settings_reach_it_as_they_are_written(tmp_path: Path) -> None:
    rendered = render(
        values={
            "platform.gateway": {
                "host": "0.0.0.0",
                "port": 9090,
                "workers": 3,
                "limits": {
                    "store": "redis",
                    "redis_url_variable": "REDIS_URL",
                    "on_unavailable": "open",
                },
                "cors_origins": ["https://chat.example.com"],
            },
            "gateway.secretEnv": {"REDIS_URL": {"name": "redis", "key": "url"}},
        }
    )
    file = tmp_path / "platform.yaml"
    file.write_text(rendered.manifests()["platform.yaml"])
    config = load_platform(file).gateway.to_core()
    assert (config.workers, config.port) == (3, 9090)
    assert config.limits.redis_url_variable == "REDIS_URL"
    assert config.cors_origins == ("https://chat.example.com",)
    _, container = gateway_pod(rendered)
    arguments = container["args"]
    assert arguments[arguments.index("--workers") + 1] == "3"
    assert arguments[arguments.index("--port") + 1] == "9090"
    assert container["ports"] == [{"name": "http", "containerPort": 9090}]


@pytest.mark.parametrize("service", ["gateway", "controller"])
def test_services_take_priority_volumes_and_a_cloud_s_identity(service: str) -> None:
    volume = {"name": "ca", "configMap": {"name": "own-ca"}}
    mount = {"name": "ca", "mountPath": "/etc/ssl/own", "readOnly": True}
    role = {"iam.gke.io/gcp-service-account": "em@project.iam.gserviceaccount.com"}
    rendered = render(
        values={
            f"{service}.priorityClassName": "services",
            f"{service}.volumes": [volume],
            f"{service}.volumeMounts": [mount],
            f"{service}.serviceAccount.annotations": role,
        }
    )
    spec = rendered.one("Deployment", f"-{service}")["spec"]["template"]["spec"]
    assert spec["priorityClassName"] == "services"
    assert volume in spec["volumes"]
    assert mount in spec["containers"][0]["volumeMounts"]
    account = rendered.one("ServiceAccount", f"-{service}")
    assert account["metadata"]["annotations"] == role
    assert account["automountServiceAccountToken"] is False


def test_workers_may_have_an_account_that_reads_models() -> None:
    rendered = render(values={"ray.workerDefaults.podSpec": {"serviceAccountName": "reads-models"}})
    templates = rendered.pod_templates()
    workers = [each for where, each in templates.items() if where.startswith("Ray workers")]
    assert {each["spec"]["serviceAccountName"] for each in workers} == {"reads-models"}
    # The head's is KubeRay's own: its autoscaler patches the cluster with it.
    assert "serviceAccountName" not in templates["Ray head"]["spec"]


def test_keys_of_providers_come_from_secrets() -> None:
    rendered = render(
        values={
            **PROVIDER_SECRETS,
            **pools_with(),
            **model_with(
                external=[{"pool": "api", "model": "m", "tariff": TARIFF}], aliases=["gpt-4o"]
            ),
        }
    )
    _, container = gateway_pod(rendered)
    env = {each["name"]: each for each in container["env"]}
    assert env["EXAMPLE_API_KEY"] == {
        "name": "EXAMPLE_API_KEY",
        "valueFrom": {"secretKeyRef": {"name": "providers", "key": "api"}},
    }
    # Nobody else gets them.
    for where, template in rendered.pod_templates().items():
        if not where.endswith("-gateway"):
            assert "EXAMPLE_API_KEY" not in json.dumps(template), where


def journal_mount(container: dict[str, Any]) -> dict[str, Any]:
    folder = container["args"][container["args"].index("--state-dir") + 1]
    (mount,) = (each for each in container["volumeMounts"] if each["mountPath"] == folder)
    return mount


def test_the_usage_journal_outlives_a_crash_of_the_gateway() -> None:
    spec, container = gateway_pod(render(values={"gateway.journal.size": "2Gi"}))
    assert journal_mount(container)["name"] == "journal"
    assert {"name": "journal", "emptyDir": {"sizeLimit": "2Gi"}} in spec["volumes"]


def test_a_persistent_journal_belongs_to_one_gateway_for_good() -> None:
    rendered = render(
        values={
            "gateway.replicas": 2,
            "gateway.journal": {"persistent": True, "size": "2Gi", "storageClassName": "fast"},
        }
    )
    workload = rendered.one("StatefulSet", "-gateway")
    assert [each["metadata"]["name"] for each in rendered.all("Deployment")] == [
        "em-expertmesh-controller"
    ]
    spec = workload["spec"]
    assert spec["serviceName"] == rendered.one("Service", "-gateway")["metadata"]["name"]
    assert spec["replicas"] == 2
    assert spec["selector"]["matchLabels"].items() <= spec["template"]["metadata"]["labels"].items()
    (claim,) = spec["volumeClaimTemplates"]
    pod = spec["template"]["spec"]
    assert journal_mount(pod["containers"][0])["name"] == claim["metadata"]["name"]
    assert claim["spec"] == {
        "accessModes": ["ReadWriteOnce"],
        "storageClassName": "fast",
        "resources": {"requests": {"storage": "2Gi"}},
    }
    assert all(volume["name"] != "journal" for volume in pod["volumes"])
    words = "exec statefulset/em-expertmesh-gateway -- expertmesh keys create"
    assert words in notes(**{"gateway.journal.persistent": True})
    assert "exec deployment/em-expertmesh-gateway" in notes()


def test_helm_test_asks_the_gateway_for_its_health(rendered: Rendered) -> None:
    pod = rendered.one("Pod", "-gateway-health")
    assert pod["metadata"]["annotations"]["helm.sh/hook"] == "test"
    script = pod["spec"]["containers"][0]["command"][-1]
    compile(script, "gateway-health", "exec")
    service = rendered.one("Service", "-gateway")
    address = f"http://{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
    assert address in script
    assert "/healthz" in script


def notes(**values: Any) -> str:
    arguments = [f"--set-json={path}={json.dumps(value)}" for path, value in values.items()]
    done = helm("install", "em", str(CHART), "-n", "models", "--dry-run=client", *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout.partition("\nNOTES:\n")[2]


def test_the_notes_say_what_is_missing_and_how_to_get_to_a_first_request() -> None:
    text = notes()
    assert "does not know ray.io/v1" in text
    assert "create secret generic expertmesh-tokens" in text
    assert "store.existingSecret" in text
    assert "raycluster/em-expertmesh-ray" in text
    assert "expertmesh keys create --tenant" in text


def test_the_notes_name_the_secrets_that_gateways_wait_for() -> None:
    text = notes(**{**PROVIDER_SECRETS, **pools_with()})
    assert "the Secret providers exists (key api, for EXAMPLE_API_KEY)" in text


def test_the_notes_lead_to_the_console_and_to_ray_s_dashboard() -> None:
    text = notes()
    assert "port-forward service/em-expertmesh-controller 8090:8090" in text
    assert "exec deployment/em-expertmesh-controller -- expertmesh status --link\n" in text
    assert "port-forward service/em-expertmesh-ray-head-svc 8265:8265" in text
    assert "get secret expertmesh-tokens -o jsonpath='{.data.auth_token}'" in text
    assert "monitoring.dashboards.enabled" in text
    moved = notes(**{"platform.controller.port": 9000})
    assert "expertmesh status --link --controller-url http://127.0.0.1:9000" in moved
    grafana = notes(**{"monitoring.dashboards.enabled": True})
    assert "monitoring.dashboards.enabled" not in grafana


def test_the_notes_say_what_ends_with_a_pod() -> None:
    text = notes()
    assert "open requests may run for 120 s" in text
    assert "All groups end with it" in text
    kept = notes(
        **{"ray.redis": {"address": "redis:6379", "existingSecret": "", "key": "password"}}
    )
    assert "All groups end with it" not in kept
    assert "Evictions of workers are refused" not in text
    guarded = notes(**{"ray.workerDefaults.podDisruptionBudget.enabled": True})
    assert "Evictions of workers are refused" in guarded


def test_the_console_s_chat_is_off_until_the_gateway_has_an_address() -> None:
    def arguments(**values: Any) -> list[str]:
        spec = render(values=values).one("Deployment", "-controller")["spec"]["template"]["spec"]
        found: list[str] = spec["containers"][0]["args"]
        return found

    assert "--gateway-url" not in arguments()
    given = arguments(**{"controller.gatewayUrl": "https://llm.example.com"})
    assert given[given.index("--gateway-url") + 1] == "https://llm.example.com"


def test_the_notes_warn_of_limits_that_each_gateway_counts_alone() -> None:
    words = "2 gateways count tenants' limits each on its own"
    assert words in notes(**{"gateway.replicas": 2})
    assert words not in notes()
    redis = {"store": "redis", "redis_url_variable": "REDIS_URL"}
    shared = {
        "gateway.replicas": 2,
        "platform.gateway.limits": redis,
        "gateway.secretEnv": {"REDIS_URL": {"name": "redis", "key": "url"}},
    }
    assert words not in notes(**shared)


def test_the_notes_warn_of_gpus_with_the_image_for_cpus() -> None:
    words = "pool gpus has accelerators, and images.ray has neither tag nor digest"
    gpus = on_gpus()
    assert words in notes(**gpus)
    assert words not in notes(**gpus, **{"images.ray.tag": "0.1.0-gpu"})
    assert words not in notes(**gpus, **{"images.ray.digest": f"sha256:{'a' * 64}"})
    own = {"gpus": {"image": {"repository": "r.example.com/ray", "tag": "1"}}}
    assert words not in notes(**gpus, **{"ray.workers": own})
    assert "has accelerators" not in notes()


def test_the_notes_warn_of_tokens_in_values() -> None:
    tokens = {"existingSecret": "", "value": "for-a-trial"}
    text = notes(**{"secrets.mesh": {**tokens, "key": "mesh_token"}, "secrets.ray": tokens})
    assert "WARNING: a token came as a value" in text
    assert "for-a-trial" not in text
    assert "create secret" not in text
