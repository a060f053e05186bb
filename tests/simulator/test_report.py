import io
import json

import pytest
from rich.console import Console
from tests.simulator.small import Script, load, scenario

from expertmesh.simulator.fluid import simulate_fluid
from expertmesh.simulator.oracle import Least, least_cost, problem
from expertmesh.simulator.outcome import Outcome
from expertmesh.simulator.report import comparison, comparison_json, headers, rows

LOAD = load(*[40.0] * 360)


def outcomes() -> list[Outcome]:
    dear, cheap = scenario(initial_groups=(3,)), scenario(initial_groups=(1,))
    return [simulate_fluid(each, LOAD, Script) for each in (dear, cheap)]


def oracle() -> Least:
    least = least_cost(problem(scenario(), LOAD))
    assert isinstance(least, Least)
    return least


def test_the_cheapest_comes_first_after_the_oracle() -> None:
    first, second, third = rows(outcomes(), oracle())
    assert first[:3] == ("oracle", "36", "1.00")
    assert second[:6] == ("script", "36", "1.00", "0.63", "99.99%", "100.0%")
    assert third[:4] == ("script", "108", "3.00", "1.88")
    assert {len(first), len(second), len(third)} == {len(headers())}


def test_without_an_oracle_nothing_is_compared_with_it() -> None:
    assert [row[2] for row in rows(outcomes(), None)] == ["", ""]
    assert comparison_json(outcomes(), None)["oracle"] is None


def test_json_says_which_bound_it_is() -> None:
    plain = json.loads(json.dumps(comparison_json(outcomes(), oracle()), allow_nan=False))
    assert plain["oracle"]["usd"] == pytest.approx(36)
    assert "bin of 60 s" in plain["oracle"]["bound"]
    assert [policy["times_oracle"] for policy in plain["policies"]] == pytest.approx([1, 3])


def test_the_table_shows_every_figure() -> None:
    console = Console(width=200, file=io.StringIO())
    console.print(comparison(outcomes(), oracle(), "R1"))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(header in text for header in headers())
    assert "the least cost of fleets" in text and "3.00" in text
