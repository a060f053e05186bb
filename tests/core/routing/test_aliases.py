from dataclasses import replace

from tests.core.routing.fleets import model

from expertmesh.core.domain.fleet import Fleet
from expertmesh.core.routing.aliases import models_by_name


def test_names_and_aliases() -> None:
    large = replace(model("large"), aliases=("gpt-4o", "default", "small"))
    small = replace(model("small"), aliases=("default", "gpt-4o-mini", "small"))
    table = models_by_name(Fleet(1, (large, small)))
    assert table == {
        "large": large,
        "small": small,
        "gpt-4o": large,
        "default": large,
        "gpt-4o-mini": small,
    }
    assert models_by_name(Fleet(1)) == {}


def test_a_name_wins_over_an_alias_in_any_order() -> None:
    named, other = model("m"), replace(model("other"), aliases=("m",))
    for models in ((named, other), (other, named)):
        assert models_by_name(Fleet(1, models))["m"] is named
