"""Scenario files: what is read, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from expertmesh.errors import ManifestError
from expertmesh.spec.scenario import read_scenario

OPTION: dict[str, Any] = {
    "pool": "od",
    "market": "on-demand",
    "parallelism": {"expert": 8},
    "nodes": 1,
    "max_groups": 4,
    "usd_per_hour": 10,
    "start": {"median_s": 60},
    "service": {
        "alpha_s": 0.02,
        "beta_s": 2e-5,
        "gamma_s": 0,
        "kv_tokens": 1000,
        "max_seqs": 10,
        "max_batched_tokens": 100,
    },
}
SPOT = OPTION | {"market": "spot"}
SCENARIO: dict[str, Any] = {
    "kind": "Scenario",
    "name": "small",
    "typical_request": {"prompt_tokens": 1, "output_tokens": 1},
    "options": [OPTION],
}


def write(folder: Path, document: Any) -> Path:
    file = folder / "scenario.yaml"
    file.write_text(document if isinstance(document, str) else yaml.safe_dump(document))
    return file


def refusal(folder: Path, document: Any) -> str:
    file = write(folder, document)
    with pytest.raises(ManifestError) as caught:
        read_scenario(file)
    assert str(file) in str(caught.value)
    return str(caught.value)


def test_defaults(tmp_path: Path) -> None:
    manifest = read_scenario(write(tmp_path, SCENARIO))
    assert (manifest.max_wait_s, manifest.tick_s, manifest.seed) == (30.0, 10.0, 1)
    assert manifest.options[0].start.sigma == 0.15


@pytest.mark.parametrize("file", sorted(Path("benchmarks/scenarios").glob("*.yaml")), ids=str)
def test_the_benchmark_s_scenarios_are_read(file: Path) -> None:
    assert read_scenario(file).name in (file.stem, "azure")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"kind": "Cluster"}, "kind: 'Cluster': unknown; write Scenario"),
        ({"kind": "Platform"}, "holds no measured service times"),
        ({"options": []}, "options"),
        ({"min_groups": 5}, "above the options' 4 groups"),
        ({"tick_s": 0}, "tick_s: 0"),
        ({"slow": 1}, "slow: unknown key; did you mean 'slo'?"),
        ({"seed": -1}, "seed: -1"),
    ],
)
def test_mistakes_in_the_scenario(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    assert said in refusal(tmp_path, SCENARIO | changes)


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (OPTION | {"market": "external"}, "holds no groups"),
        (OPTION | {"initial_groups": 5}, "initial_groups 5 is above max_groups 4"),
        (OPTION | {"availability": {"generated_hours": 1}}, "is for market: spot"),
        (SPOT | {"availability": {"at_s": [0, 1], "nodes": [1]}}, "has 2 times and 1 counts"),
        (SPOT | {"availability": {}}, "has 0 times and 0 counts"),
        (SPOT | {"availability": {"at_s": [1], "nodes": [1]}}, "must begin with 0 and grow"),
        (SPOT | {"availability": {"at_s": [0, 0], "nodes": [1, 2]}}, "must begin with 0 and grow"),
        (
            SPOT | {"availability": {"at_s": [0], "nodes": [1], "generated_hours": 1}},
            "write one of them",
        ),
        (
            OPTION
            | {
                "plan_error": 1.1,
                "rates": {"in_flight": 1, "prefill_tokens_per_s": 1, "decode_tokens_per_s": 1},
            },
            "remove plan_error",
        ),
        (OPTION | {"start": {"median_s": 1, "failure_probability": 2}}, "failure_probability: 2"),
        (OPTION | {"usd_per_hour": float("nan")}, "usd_per_hour"),
    ],
)
def test_mistakes_in_an_option(tmp_path: Path, option: dict[str, Any], said: str) -> None:
    assert said in refusal(tmp_path, SCENARIO | {"options": [option]})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds 0 documents"),
        ("kind: Scenario\n---\nkind: Scenario\n", "holds 2 documents"),
        ("- 1", "holds a list"),
        ("{", "is no YAML"),
    ],
)
def test_files_that_are_no_scenario(tmp_path: Path, text: str, said: str) -> None:
    assert said in refusal(tmp_path, text)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="no such file"):
        read_scenario(tmp_path / "none.yaml")
