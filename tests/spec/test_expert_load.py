"""Loads of experts as ranks answer them: what is read, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from expertmesh.errors import ManifestError
from expertmesh.spec.expert_load import expert_load, read_file


def answer(rank: int, *layers: dict[str, int]) -> dict[str, Any]:
    return {
        "group": "em-m-p-1",
        "rank": rank,
        "layers": [{"layer": n, "tokens": tokens} for n, tokens in enumerate(layers)],
    }


def test_ranks_and_layers_add_up() -> None:
    ranks = [answer(0, {"0": 5}, {"1": 2}), answer(1, {"3": 7, "0": 1}, {"2": 4})]
    found = expert_load("here", ranks, experts=4)
    assert found.layers == ((6, 0, 0, 7), (0, 2, 4, 0))
    assert (found.source, found.experts) == ("here", 4)
    assert expert_load("here", [ranks], 4) == found


def test_a_file_holds_one_answer_or_several(tmp_path: Path) -> None:
    file = tmp_path / "loads.json"
    for content in (answer(0, {"0": 5}), [answer(0, {"0": 5})]):
        file.write_text(json.dumps(content))
        assert expert_load(str(file), [read_file(file)], 2).layers == ((5, 0),)


@pytest.mark.parametrize(
    ("document", "words"),
    [
        (answer(0), "no rank has reported"),
        (answer(0, {"0": 0}), "no expert has been asked yet; send traffic"),
        (answer(0, {"9": 1}), "tokens of expert 9, but the model has 4 experts"),
        (answer(0, {"0": -1}), "negative"),
        ({"layers": [{"layer": 0}]}, "0.layers.0.tokens"),
        ({"groups": []}, "0.groups"),
        ("text", "write what GET /em/experts answers"),
    ],
)
def test_what_is_no_load_is_refused(document: Any, words: str) -> None:
    with pytest.raises(ManifestError) as caught:
        expert_load("here", [document], 4)
    message = str(caught.value)
    assert message.startswith("--expert-load: here: ") and words in message
    assert len(message.splitlines()) == 1


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    file = tmp_path / "loads.json"
    with pytest.raises(ManifestError, match="no such file"):
        read_file(file)
    file.write_text("{")
    with pytest.raises(ManifestError, match="is no JSON"):
        read_file(file)
    with pytest.raises(ManifestError, match="cannot be read"):
        read_file(tmp_path)
