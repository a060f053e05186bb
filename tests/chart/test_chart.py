"""The chart through the real helm: it renders, it refuses, and what it renders holds together."""

import json
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
from expertmesh.spec.load import load_system

pytestmark = pytest.mark.integration

CASES = (None, *PROFILES)
RAY_CLUSTER_SCHEMA = json.loads(Path(__file__).with_name("raycluster.schema.json").read_text())

# Objects that an administrator makes before the release, as values.yaml and the profile say.
EXTERNAL_SECRETS = {"expertmesh-tokens", "expertmesh-store", "huggingface"}
EXTERNAL_CLAIMS = {"models"}


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
    (tiny / "config.json").write_text(json.dumps({"num_experts": 16, "num_experts_per_tok": 4}))
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
    }
    command, controller = flags("-controller")
    assert command == ["expertmesh", "controller"]
    assert controller.keys() == {"-f", "--dashboard-url", "--store", "--host", "--port"}
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
                if "valueFrom" in variable:
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
            if not where.startswith("Ray"):
                assert security["readOnlyRootFilesystem"] is True, where
                assert spec["securityContext"]["runAsNonRoot"] is True, where
        # Only the head's autoscaler speaks to Kubernetes, with the account that KubeRay makes.
        if where != "Ray head":
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
    api = {"name": "api", "market": "external", "usd_per_node_hour": 0}
    rendered = render(values={"platform.pools": [*pools, api]})
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
    assert all(len(each["metadata"]["name"]) <= 63 for each in rendered.objects)
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


def test_the_notes_warn_of_tokens_in_values() -> None:
    tokens = {"existingSecret": "", "value": "for-a-trial"}
    text = notes(**{"secrets.mesh": {**tokens, "key": "mesh_token"}, "secrets.ray": tokens})
    assert "WARNING: a token came as a value" in text
    assert "for-a-trial" not in text
    assert "create secret" not in text
