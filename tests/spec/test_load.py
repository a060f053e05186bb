"""Manifests: what loads, and that every mistake is named with file, field, value and remedy."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from expertmesh.core.domain.deployment import ScalingMode
from expertmesh.core.domain.fleet import Parallelism
from expertmesh.core.domain.option import GroupRates
from expertmesh.core.perf.start import UNPLANNED_S
from expertmesh.errors import ManifestError
from expertmesh.spec.load import load_system

REPOSITORY = Path(__file__).parents[2]

PLATFORM = {
    "kind": "Platform",
    "name": "local",
    "pools": [
        {
            "name": "small",
            "market": "local",
            "usd_per_node_hour": 0.3,
            "nodes": {"min": 2, "max": 2},
        },
        {
            "name": "large",
            "market": "local",
            "usd_per_node_hour": 0.5,
            "cpus_per_node": 4,
            "nodes": {"min": 1, "max": 2},
        },
    ],
}
DEPLOYMENT = {
    "kind": "ModelDeployment",
    "name": "tiny",
    "model": {"source": "./model", "max_model_len": 512},
    "parallelism": {"expert": 2},
    "pools": ["small", "large"],
}
CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "moe_intermediate_size": 32,
    "vocab_size": 128,
    "max_position_embeddings": 1024,
}
DENSE = {
    "architectures": ["Qwen3ForCausalLM"],
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "vocab_size": 128,
}


class Folder:
    """A folder with a platform file, a model and its manifest, to be spoilt by a test."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.platform = json.loads(json.dumps(PLATFORM))
        self.deployment = json.loads(json.dumps(DEPLOYMENT))
        self.config = dict(CONFIG)
        self.model = path / "model"
        self.model.mkdir()
        (self.model / "model.safetensors").touch()

    def write(self) -> list[Path]:
        files = [self.path / "platform.yaml", self.path / "tiny.yaml"]
        files[0].write_text(yaml.safe_dump(self.platform))
        files[1].write_text(yaml.safe_dump(self.deployment))
        if self.model.exists():
            (self.model / "config.json").write_text(json.dumps(self.config))
        return files

    def refusal(self) -> str:
        with pytest.raises(ManifestError) as caught:
            load_system(self.write())
        return str(caught.value)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def test_the_shipped_manifests_load() -> None:
    system = load_system(
        [REPOSITORY / "deployments/local.yaml", REPOSITORY / "deployments/tiny-moe.yaml"]
    )
    assert [model.name for model in system.models] == ["tiny-moe"]
    assert len({pool.usd_per_node_hour for pool in system.pools}) == 2
    assert sum(pool.max_nodes for pool in system.pools) >= 4


def test_a_deployment_becomes_plain_values(folder: Folder) -> None:
    model = load_system(folder.write()).models[0]
    assert model.source == str(folder.model)
    assert model.parallelism == Parallelism(tensor=1, data=2, expert=2)
    assert model.shape is not None and model.shape.experts is not None
    assert model.shape.experts.count == 16 and model.shape.experts.per_token == 4


def test_how_it_is_scaled_becomes_plain_values(folder: Folder) -> None:
    folder.platform["budget"] = {"usd_per_hour": 9}
    folder.platform["pools"][0]["zone"] = "here-a"
    folder.deployment["scaling"] = {
        "budget": {"usd_per_day": 50},
        "mode": "advise",
        "priority": -2,
        "down_delay_s": 7,
    }
    system = load_system(folder.write())
    assert system.usd_per_hour_budget == 9
    assert [pool.zone for pool in system.pools] == ["here-a", None]
    rules = system.models[0].scaling
    assert (rules.usd_per_hour_budget, rules.usd_per_day_budget) == (None, 50)
    assert (rules.mode, rules.priority, rules.down_delay_s) == (ScalingMode.ADVISE, -2, 7)


def test_what_is_not_said_about_scaling(folder: Folder) -> None:
    system = load_system(folder.write())
    rules = system.models[0].scaling
    assert system.usd_per_hour_budget is None
    assert (rules.usd_per_hour_budget, rules.usd_per_day_budget) == (None, None)
    assert (rules.mode, rules.priority, rules.down_delay_s) == (ScalingMode.ACT, 0, None)


def test_each_pool_has_an_option_with_the_manifest_s_arguments(folder: Folder) -> None:
    folder.deployment["engine"] = {"seed": 3}
    model = load_system(folder.write()).models[0]
    assert [option.name for option in model.options] == ["small/t1d2e2", "large/t1d2e2"]
    for option, price in zip(model.options, (0.6, 0.25), strict=True):
        assert option.usd_per_hour == pytest.approx(price)
        assert option.engine == {"seed": 3}
        assert option.rates == GroupRates(16.0)
        assert option.start_s == UNPLANNED_S


def test_tensor_parallel_workers_share_a_rank(folder: Folder) -> None:
    folder.deployment["parallelism"] = {"expert": 4, "tensor": 2}
    folder.deployment["pools"] = ["large"]
    assert load_system(folder.write()).models[0].parallelism == Parallelism(2, 2, 4)


def test_a_dense_model_is_served_without_expert_parallelism(folder: Folder) -> None:
    folder.config = dict(DENSE)
    folder.deployment["parallelism"] = {"expert": 1}
    model = load_system(folder.write()).models[0]
    assert model.shape is not None and model.shape.experts is None
    assert model.shape.dense_layers == 4


def test_an_unknown_architecture_is_read_as_one_that_the_manifest_names(folder: Folder) -> None:
    folder.config["architectures"] = ["NewMoeForCausalLM"]
    assert "'NewMoeForCausalLM' is not known" in folder.refusal()
    folder.deployment["model"]["shape"] = {"read_as": "Qwen3MoeForCausalLM", "num_experts": 8}
    shape = load_system(folder.write()).models[0].shape
    assert shape is not None and shape.experts is not None
    assert (shape.architecture, shape.experts.count) == ("NewMoeForCausalLM", 8)


def set_field(path: str, value: object) -> Callable[[Folder], None]:
    def change(folder: Folder) -> None:
        root, *parts = path.split(".")
        if not parts:
            setattr(folder, root, value)
            return
        target = getattr(folder, root)
        for part in parts[:-1]:
            target = target[int(part)] if part.isdigit() else target[part]
        target[parts[-1]] = value

    return change


def remove_model(folder: Folder) -> None:
    (folder.model / "model.safetensors").unlink()
    folder.model.rmdir()


def remove_weights(folder: Folder) -> None:
    (folder.model / "model.safetensors").unlink()


def make_dense(folder: Folder) -> None:
    folder.config = dict(DENSE)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        pytest.param(
            set_field("deployment.scaling", {"gruops": {"min": 1}}),
            ("tiny.yaml", "scaling.gruops", "unknown key", "did you mean 'groups'"),
            id="unknown key",
        ),
        pytest.param(
            set_field("deployment.model.max_model_len", "long"),
            ("tiny.yaml", "model.max_model_len", "'long'", "integer"),
            id="wrong type",
        ),
        pytest.param(
            set_field("deployment.kind", "Deployment"),
            ("tiny.yaml", "kind", "'Deployment'", "ModelDeployment"),
            id="unknown kind",
        ),
        pytest.param(
            remove_model, ("tiny.yaml", "model.source", "no such folder"), id="missing model folder"
        ),
        pytest.param(
            set_field("config", {"architectures": ["Qwen3MoeForCausalLM"], "num_experts": 4}),
            ("tiny.yaml", "model.source", "config.json", "num_hidden_layers is missing"),
            id="config without layers",
        ),
        pytest.param(
            remove_weights, ("tiny.yaml", "model.source", "no *.safetensors"), id="missing weights"
        ),
        pytest.param(
            make_dense, ("tiny.yaml", "model.source", "no mixture of experts"), id="dense model"
        ),
        pytest.param(
            set_field("deployment.parallelism", {"expert": 3}),
            ("tiny.yaml", "parallelism.expert", "3", "does not divide", "1, 2, 4, 8, 16"),
            id="expert size that does not divide the experts",
        ),
        pytest.param(
            set_field("deployment.parallelism", {"expert": 4, "tensor": 3}),
            ("tiny.yaml", "parallelism", "no multiple of tensor 3"),
            id="expert size that is no multiple of the tensor size",
        ),
        pytest.param(
            set_field("deployment.pools", ["small", "huge"]),
            ("tiny.yaml", "pools.1", "'huge'", "no such pool", "small, large"),
            id="pool that does not exist",
        ),
        pytest.param(
            set_field("deployment.parallelism", {"expert": 4}),
            ("tiny.yaml", "pools.0", "'small'", "holds at most 2 workers, a group needs 4"),
            id="group larger than its pool",
        ),
        pytest.param(
            set_field("deployment.model.max_model_len", 2048),
            ("tiny.yaml", "model.max_model_len", "2048", "at most 1024"),
            id="context longer than the model's",
        ),
        pytest.param(
            set_field("deployment.scaling", {"groups": {"min": 3, "max": 2}}),
            ("tiny.yaml", "scaling.groups", "min 3 is above max 2"),
            id="min above max",
        ),
        pytest.param(
            set_field("deployment.parallelism", [{"expert": 2}, {"expert": 3}]),
            ("tiny.yaml", "parallelism.1.expert", "3", "does not divide"),
            id="one of several sizes does not divide the experts",
        ),
        pytest.param(
            set_field("deployment.scaling", {"budget": {}}),
            ("tiny.yaml", "scaling.budget", "write usd_per_hour, usd_per_day or both"),
            id="budget of nothing",
        ),
        pytest.param(
            set_field("deployment.scaling", {"budget": {"usd_per_day": 0}}),
            ("tiny.yaml", "scaling.budget.usd_per_day", "0", "greater than 0"),
            id="budget of no dollars a day",
        ),
        pytest.param(
            set_field("deployment.scaling", {"mode": "dry-run"}),
            ("tiny.yaml", "scaling.mode", "'dry-run'", "'observe', 'advise' or 'act'"),
            id="unknown mode",
        ),
        pytest.param(
            set_field("deployment.scaling", {"priority": 1.5}),
            ("tiny.yaml", "scaling.priority", "1.5", "integer"),
            id="priority that is no whole number",
        ),
        pytest.param(
            set_field("deployment.scaling", {"down_delay_s": -1}),
            ("tiny.yaml", "scaling.down_delay_s", "-1", "greater than or equal to 0"),
            id="negative delay",
        ),
        pytest.param(
            set_field("platform.budget", {"usd_per_hour": -5}),
            ("platform.yaml", "budget.usd_per_hour", "-5", "greater than 0"),
            id="negative budget of the platform",
        ),
        pytest.param(
            set_field("platform.pools.0.zone", ""),
            ("platform.yaml", "pools.0.zone", "''", "at least 1 character"),
            id="empty zone",
        ),
        pytest.param(
            set_field("platform.pools.0.usd_per_node_hour", -1),
            ("platform.yaml", "pools.0.usd_per_node_hour", "-1", "greater than or equal to 0"),
            id="negative price",
        ),
        pytest.param(
            set_field("platform.pools.1.name", "small"),
            ("platform.yaml", "pools named twice: small"),
            id="two pools of one name",
        ),
        pytest.param(
            set_field("platform.gateway", {"port": 70000}),
            ("platform.yaml", "gateway.port", "70000", "65535"),
            id="port out of range",
        ),
        pytest.param(
            set_field("platform.gateway", {"port": 8265}),
            ("platform.yaml", "need different ports"),
            id="one port for two services",
        ),
    ],
)
def test_a_mistake_is_named(
    folder: Folder, spoil: Callable[[Folder], None], words: tuple[str, ...]
) -> None:
    spoil(folder)
    message = folder.refusal()
    assert all(word in message for word in words), message
    assert len(message.splitlines()) == 1


def test_all_mistakes_of_the_manifests_are_named_at_once(folder: Folder) -> None:
    folder.platform["pools"][0]["usd_per_node_hour"] = -1
    folder.deployment["colour"] = "red"
    message = folder.refusal()
    assert "usd_per_node_hour" in message and "colour" in message


def test_two_models_of_one_name_are_refused(folder: Folder) -> None:
    files = folder.write()
    other = folder.path / "other.yaml"
    other.write_text(files[1].read_text())
    with pytest.raises(ManifestError, match=r"other\.yaml: name: 'tiny': is also the name"):
        load_system([*files, other])


def test_a_platform_is_needed_once(folder: Folder) -> None:
    platform, deployment = folder.write()
    with pytest.raises(ManifestError, match="exactly one Platform manifest, found 0"):
        load_system([deployment])
    with pytest.raises(ManifestError, match="exactly one Platform manifest, found 2"):
        load_system([platform, platform, deployment])
    with pytest.raises(ManifestError, match="no ModelDeployment manifest"):
        load_system([platform])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("kind: [", "is no YAML"),
        ("", "is empty"),
        ("- a\n- b\n", "write a mapping"),
    ],
)
def test_a_file_that_is_no_manifest_is_refused(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "broken.yaml"
    file.write_text(text)
    with pytest.raises(ManifestError, match=words):
        load_system([file])


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match=r"nowhere\.yaml: no such file"):
        load_system([tmp_path / "nowhere.yaml"])
