import re

from hypothesis import given
from hypothesis import strategies as st

from expertmesh.core.scaling.naming import NAME_LIMIT, group_name, next_free_name, number_of

NAMES = st.from_regex(r"\A[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?\Z")


def test_short_names_are_written_in_full() -> None:
    assert group_name("tiny-moe", "cpu-small", 12) == "em-tiny-moe-cpu-small-12"


@given(NAMES, NAMES, st.integers(min_value=1, max_value=10**6))
def test_every_name_is_short_and_gives_its_number_back(model: str, pool: str, n: int) -> None:
    name = group_name(model, pool, n)
    assert len(name) <= NAME_LIMIT
    assert re.fullmatch(r"em-[a-z0-9-]+-[0-9]+", name)
    assert number_of(name) == n


def test_cut_names_of_different_models_differ() -> None:
    first = group_name("a" * 40, "pool", 1)
    assert first != group_name("a" * 39 + "b", "pool", 1)


def test_a_name_that_another_model_has_is_skipped() -> None:
    assert group_name("a-b", "c", 1) == group_name("a", "b-c", 1)
    assert next_free_name("a", "b-c", 1, {"em-a-b-c-1"}) == ("em-a-b-c-2", 2)


def test_names_without_a_number_count_as_zero() -> None:
    assert number_of("em-model-pool-x") == 0
