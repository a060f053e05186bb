"""Where a model's config comes from: a folder, the hub or the catalog."""

import json
from pathlib import Path
from typing import Any

import pytest

from expertmesh.core.domain.model_shape import Dtype
from expertmesh.core.perf.parameters import checkpoint_bytes, prediction_bytes
from expertmesh.errors import ManifestError, UpstreamUnavailable
from expertmesh.spec.catalog import models
from expertmesh.spec.model_config import Origin, load_shape

TINY = Path(__file__).parents[2] / "models/tiny-qwen3-moe"
DEEPSEEK = "deepseek-ai/DeepSeek-V3"


def write(folder: Path, name: str, content: object) -> None:
    (folder / name).write_text(json.dumps(content))


def write_index(folder: Path, size: float) -> None:
    write(folder, "model.safetensors.index.json", {"metadata": {"total_size": size}})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model of the catalog, as if it lay in a folder."""
    write(tmp_path, "config.json", dict(models()[DEEPSEEK].config))
    return tmp_path


def test_a_folder_needs_no_weights(folder: Path) -> None:
    loaded = load_shape(str(folder))
    assert loaded.shape == models()[DEEPSEEK].shape
    assert (loaded.origin, loaded.warning) == (Origin.FOLDER, None)


def test_the_model_of_the_repository() -> None:
    loaded = load_shape(str(TINY))
    assert loaded.shape.experts is not None
    assert (loaded.shape.experts.count, loaded.shape.experts.per_token) == (16, 4)
    assert loaded.shape.tied_embeddings and loaded.warning is None


@pytest.mark.parametrize("factor", [0.975, 1.0, 1.025])
def test_an_index_that_agrees(folder: Path, factor: float) -> None:
    shape = models()[DEEPSEEK].shape
    write_index(folder, checkpoint_bytes(shape) * factor)
    assert load_shape(str(folder)).warning is None
    write_index(folder, (checkpoint_bytes(shape) + prediction_bytes(shape)) * factor)
    assert load_shape(str(folder)).warning is None


def test_the_index_of_deepseek_v3_agrees(folder: Path) -> None:
    """Its total_size, with the layer of multi-token prediction and a copy of both tables."""
    write_index(folder, 688_586_727_753)
    assert load_shape(str(folder)).warning is None


@pytest.mark.parametrize("difference", [0.1, -0.1, 0.04])
def test_an_index_that_differs(folder: Path, difference: float) -> None:
    shape = models()[DEEPSEEK].shape
    with_prediction = checkpoint_bytes(shape) + prediction_bytes(shape)
    nearest = checkpoint_bytes(shape) if difference > 0 else with_prediction
    write_index(folder, nearest / (1 + difference))
    warning = load_shape(str(folder)).warning
    assert warning is not None
    assert f"{nearest / 1e9:.2f} GB by its config ({difference:+.1%})" in warning
    assert f"{nearest / (1 + difference) / 1e9:.2f} GB by model.safetensors.index.json" in warning


@pytest.mark.parametrize("index", [{}, {"metadata": None}, {"metadata": {"total_size": 0}}])
def test_an_index_without_a_size_says_nothing(folder: Path, index: dict[str, Any]) -> None:
    write(folder, "model.safetensors.index.json", index)
    assert load_shape(str(folder)).warning is None


def test_modelopt_keeps_the_format_in_a_file_of_its_own(folder: Path) -> None:
    config = {**models()[DEEPSEEK].config, "quantization_config": None}
    write(folder, "config.json", config)
    assert load_shape(str(folder)).shape.quantisation.experts is Dtype.BF16
    quantised = {"quant_algo": "NVFP4", "exclude_modules": ["model.layers.*.self_attn*"]}
    write(folder, "hf_quant_config.json", {"quantization": quantised})
    stored = load_shape(str(folder)).shape.quantisation
    assert (stored.experts, stored.others) == (Dtype.FP4, Dtype.BF16)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "holds no config.json"),
        ("{", "config.json is no JSON"),
        ("[]", "config.json holds no mapping"),
        ('{"architectures": ["NewForCausalLM"]}', "'NewForCausalLM' is not known"),
    ],
)
def test_a_folder_that_cannot_be_read(tmp_path: Path, content: str | None, words: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ManifestError) as caught:
        load_shape(str(tmp_path))
    assert str(caught.value).startswith(f"{tmp_path}: ") and words in str(caught.value)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="no such folder"):
        load_shape(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("source", ["", "qwen", "a/b/c", "https://example.com/model", "a b/c"])
def test_what_is_neither_a_folder_nor_an_id(source: str) -> None:
    with pytest.raises(ManifestError, match="no Hugging Face id"):
        load_shape(source)


class Hub:
    """Stands for the hub: holds files, or cannot be asked."""

    def __init__(self, files: dict[str, Path] | None) -> None:
        self.files = files
        self.asked: list[tuple[str, str, str]] = []

    def __call__(self, source: str, revision: str, name: str) -> Path | None:
        self.asked.append((source, revision, name))
        if self.files is None:
            raise UpstreamUnavailable("no connection")
        return self.files.get(name)


def test_the_hub_is_asked_first(folder: Path) -> None:
    config = {**models()[DEEPSEEK].config, "n_routed_experts": 128}
    write(folder, "config.json", config)
    hub = Hub({"config.json": folder / "config.json"})
    loaded = load_shape(DEEPSEEK, revision="v2", fetch=hub)
    assert loaded.origin is Origin.HUB
    assert loaded.shape.experts is not None and loaded.shape.experts.count == 128
    assert hub.asked[0] == (DEEPSEEK, "v2", "config.json")
    assert not any(name.endswith(".safetensors") for _, _, name in hub.asked)


def test_the_catalog_answers_when_the_hub_does_not() -> None:
    for fetch in (None, Hub(None)):
        loaded = load_shape(DEEPSEEK, fetch=fetch)
        assert loaded.shape == models()[DEEPSEEK].shape
        assert (loaded.origin, loaded.warning) == (Origin.CATALOG, None)


def test_overrides_change_a_model_of_the_catalog() -> None:
    loaded = load_shape(DEEPSEEK, overrides={"max_position_embeddings": 4096})
    assert loaded.shape.max_position_embeddings == 4096


def test_second_hand_numbers_are_said() -> None:
    warning = load_shape("zai-org/GLM-4.5-Air").warning
    assert warning is not None and "second-hand" in warning


def test_a_model_that_nobody_knows_says_both() -> None:
    with pytest.raises(UpstreamUnavailable) as offline:
        load_shape("Qwen/Qwen3-31B-A3B", fetch=Hub(None))
    message = str(offline.value)
    assert "hub cannot be asked (no connection)" in message
    assert "catalog has no such model" in message and "Qwen/Qwen3-30B-A3B" in message
    with pytest.raises(ManifestError, match=r"hub was not asked and the catalog has no such model"):
        load_shape("nobody/nothing")


def test_a_model_without_a_config_on_the_hub() -> None:
    with pytest.raises(ManifestError, match=r"nobody/nothing: holds no config\.json"):
        load_shape("nobody/nothing", fetch=Hub({}))
