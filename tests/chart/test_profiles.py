"""The profiles and the defaults of the chart: models that load, fit and can be started."""

from pathlib import Path

import pytest
import yaml
from tests.chart.rendering import PROFILES, REPOSITORY

from expertmesh.core.domain.fleet import Parallelism
from expertmesh.spec.load import System, load_system


def loaded(values: Path, folder: Path) -> System:
    """As the controller reads them, in files as the chart writes them."""
    documents = yaml.safe_load(values.read_text())
    (folder / "models").symlink_to(REPOSITORY / "models")
    (folder / "deployments").mkdir()
    platform, models = (folder / "deployments" / f"{name}.yaml" for name in ("platform", "models"))
    platform.write_text(yaml.safe_dump({"kind": "Platform", **documents["platform"]}))
    models.write_text(yaml.safe_dump_all(documents["models"]))
    return load_system([platform, models])


@pytest.mark.parametrize("profile", PROFILES, ids=lambda file: file.stem)
def test_the_planner_has_rates_of_every_group_on_gpus(profile: Path, tmp_path: Path) -> None:
    """It fits with its engine arguments, meets its targets, and vLLM has kernels for it."""
    system = loaded(profile, tmp_path)
    with_gpus = {pool.name for pool in system.pools if pool.accelerator}
    for model in system.models:
        chosen = system.chosen[model.name]
        assert {n: why for n, why in chosen.unrated.items() if n.split("/")[0] in with_gpus} == {}
        for option in model.options:
            if option.pool in with_gpus:
                assert option.rates.decode_tokens_per_s and option.rates.prefill_tokens_per_s
                budget = model.scaling.usd_per_hour_budget
                assert budget is None or option.usd_per_hour <= budget


def test_a_profile_is_checked_with_its_arguments(tmp_path: Path) -> None:
    (profile,) = (file for file in PROFILES if file.stem == "h200-gke")
    documents = yaml.safe_load(profile.read_text())
    documents["models"][0]["engine"] = {
        "all2all_backend": "deepep_low_latency",
        "max_num_batched_tokens": 16384,
    }
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(yaml.safe_dump(documents))
    (chosen,) = loaded(wrong, tmp_path).chosen.values()
    assert chosen.unrated and all("does not fit" in why for why in chosen.unrated.values())


def test_two_nodes_of_h200_hold_a_group(tmp_path: Path) -> None:
    (profile,) = (file for file in PROFILES if file.stem == "h200-gke")
    (model,) = loaded(profile, tmp_path).models
    assert {option.parallelism for option in model.options} == {Parallelism(1, 16, 16)}
    assert min(option.rates.in_flight for option in model.options) > 100
