"""One shared secret, or two while it is replaced."""

from itertools import pairwise

import pytest

from expertmesh.core.domain.mesh_token import MeshToken


@pytest.mark.parametrize(
    ("own", "given", "is_admitted"),
    [
        ("old", b"old", True),
        ("old", b"new", False),
        ("old", b"", False),
        ("old", b"ol", False),
        ("new,old", b"old", True),
        ("new,old", b"new", True),
        ("new , old", b"old", True),
        ("new,old", b"new,older", True),
        ("old", b"new,old", True),
        ("new,old", b",", False),
        ("with a space", b"with a space", True),
        ("old", b"1,2,3,4,old", False),
    ],
)
def test_who_is_admitted(own: str, given: bytes, is_admitted: bool) -> None:
    assert MeshToken(own).admits(given) is is_admitted


def test_at_each_step_of_a_replacement_all_trust_each_other() -> None:
    for before, after in pairwise(["old", "new,old", "new"]):
        assert MeshToken(before).admits(after.encode())
        assert MeshToken(after).admits(before.encode())
    assert not MeshToken("new").admits(b"old")


@pytest.mark.parametrize("text", ["", " ", ",", " , "])
def test_an_empty_token_is_none(text: str) -> None:
    with pytest.raises(ValueError, match="must not be empty"):
        MeshToken(text)
